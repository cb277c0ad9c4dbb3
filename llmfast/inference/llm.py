"""`LLM`: a model and its tokenizer, from prompts to text and to log-probabilities.

prompt -> tokenizer -> ids -> decode loop -> ids -> text
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmfast.inference.arguments import whole_number
from llmfast.inference.constraint import Constraint, Vocabulary, grammar_of
from llmfast.inference.decoders import Decoder, NativeModel
from llmfast.inference.decoders.speculating import MOST_GUESSES
from llmfast.inference.decoding import Decoding, Windows, decode
from llmfast.inference.execution import Runner, chosen_backend, each_under
from llmfast.inference.generation import MOST_ALTERNATIVES, Generation, Observer
from llmfast.inference.sampling import Sampler, SamplingSettings
from llmfast.inference.scoring import (
    TOKENS_AT_ONCE,
    Prediction,
    Progress,
    Window,
    half_overlapping,
    predictions,
    score_on,
    step_of,
    windows,
)
from llmfast.inference.text import TextStream, TextWriter, stop_strings
from llmfast.models import LanguageModel, ModelConfig
from llmfast.tokenizers import Tokenizer, gpt2_tokenizer
from llmfast.weights.adapter import read_adapter

if TYPE_CHECKING:
    from llmfast.chat.template import ChatTemplate, Message

GPT2_VOCAB_SIZE = 50257


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text: its tokens and the natural logarithm of each one's probability."""

    ids: list[int]
    log_probabilities: Tensor  # (len(ids),) float32; nan where nothing comes before the first token

    @property
    def total(self) -> float:
        """The log-probability of the whole."""
        return float(self.log_probabilities.nansum())


class LLM:
    """A model, its tokenizer (None where it has none), and the backend that they run on.

    `model` is a `LanguageModel`, put into evaluation mode, or a function that reads one, called when `LLM.model` is
    first asked for. `native` holds the same weights packed for this CPU: with it, generating runs natively wherever the
    backends chosen are the C++ ones, and the module is not needed (see `execution.Runner`). `end_tokens` are ids that
    end a text beside those of the tokenizer and the configuration.

    Generating from several threads at once is safe.
    """

    def __init__(
        self,
        model: LanguageModel | Callable[[], LanguageModel],
        tokenizer: Tokenizer | None = None,
        backend: str | Mapping[str, str] = "auto",
        native: NativeModel | None = None,
        end_tokens: Collection[int] = (),
    ):
        self.runner = Runner(model, native)
        self.tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._template: ChatTemplate | None = None
        self._vocabulary: Vocabulary | None = None  # made when a text must have a form
        self.backend = backend
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {self.config.vocab_size}"
            )

    def __repr__(self) -> str:
        family = type(self.config).__name__.removesuffix("Config")
        tokenizer = "no tokenizer" if self.tokenizer is None else type(self.tokenizer).__name__
        size = f"{self.config.num_parameters:,} parameters"
        return f"LLM({family}, {size}, {tokenizer}, {self.precision}, backend {self.backend!r} on {self.runner.device})"

    @property
    def model(self) -> LanguageModel:
        """The PyTorch module."""
        return self.runner.model

    @property
    def config(self) -> ModelConfig:
        return self.runner.config

    @property
    def precision(self) -> str:
        """fp32, bf16, fp16, or how the weights are quantised: int8, int4, … (`quantization.plan.PRECISIONS`)."""
        return self.runner.precision

    def native(self) -> NativeModel | None:
        """The packed weights, where generating runs natively under the current choice of backends; else None."""
        with self.using_backend():
            return self.runner.packed()

    def why_not_cuda_graph(self) -> str | None:
        """Why generating does not replay CUDA graphs under the current choice of backends, or None where it does."""
        with self.using_backend():
            return self.runner.why_not_cuda_graph()

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        """A decoder with a KV cache for `batch` sequences of up to `capacity` tokens (default: the whole context).

        Its `prefill` and `step` give logits; generating natively it is a `NativeDecoder`, on a GPU a
        `CudaGraphDecoder`. Use it under `using_backend`.
        """
        with self.using_backend():
            return self.runner.decoder(batch, self.config.context if capacity is None else capacity)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes model and tokenizer into the directory `path`, in Hugging Face's layout."""
        self.model.save_pretrained(path)
        if self.tokenizer is not None:
            self.tokenizer.save(path)

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Puts the adapter in the directory `path`, from `llmfast finetune` or peft, beside the weights, which stay as
        they are: `generate`, `stream` and `chat` take its name. One of that name before is replaced.

        `FileNotFoundError` or `ValueError` in one line where it can't be used with this model.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name must be a string that is not empty, got {name!r}")
        adapter = read_adapter(path, self.config)
        if adapter.score is not None:
            raise ValueError(f"{path} is a classifier, which generates no text: llmfast classify takes it")
        self.runner.adapters[name] = adapter

    def generate(
        self,
        prompt: str | list[str] | Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        num_return_sequences: int = 1,
        truncate: bool = False,
        use_cache: bool = True,
        speculate: int | None = None,
        logprobs: int | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        adapter: str | None | Sequence[str | None] = None,
    ) -> Any:
        """Continues `prompt`; what comes back includes it.

        A string gives a string, a list of strings (of any lengths, run as one batch) a list, and a tensor of token
        ids (T,) or (B, T) a tensor (…, T + max_new_tokens). With `num_return_sequences` n > 1 a string gives a list
        of n, a list gives a list of lists, and a tensor gives n rows for each of its own.

        Text ends at the tokenizer's end-of-text (left out), before a string in `stop`, or after `max_new_tokens`;
        ids run to `max_new_tokens`. `temperature=0` is greedy; the other settings are those of `SamplingSettings`. The
        same `seed` gives the same text on the same backend; row i draws from `seed + i`. A prompt longer than the
        context is a `ValueError`, unless `truncate` keeps only its end. Generation past the context drops the oldest
        half of what the model sees, with one warning. `use_cache=False` computes everything again for every token: the
        same text. `NonFiniteLogits` where the model gives no probabilities to choose by.

        `speculate=k` guesses up to k tokens ahead from what the text has said before, and checks them in one step: the
        same text, sooner where it repeats itself (one sequence, generating natively). By default as many as pay, by
        the clock, and none with less than 32 MB of weights; 0 guesses none.

        With `logprobs=n` every text becomes a `Generation`: the same text, the log-probability of each token, and the n
        likeliest at its place (0 to 100). `logit_bias` adds to the logits of some tokens, {id: from -10000 to 10000};
        -inf rules a token out.

        One of `json_schema` (a dictionary, JSON, or a Pydantic model), `regex` and `grammar` (in Lark's notation) gives
        what is added a form: JSON that is valid by the schema, unless `max_new_tokens` cuts it off.

        `adapter` is the name that `add_adapter` gave one, for all prompts, or one (or None) for each of them.
        """
        settings = SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias)
        count = whole_number("num_return_sequences", num_return_sequences, least=1)
        decode = partial(
            self._decode,
            max_new_tokens=max_new_tokens,
            settings=settings,
            seed=seed,
            truncate=truncate,
            use_cache=use_cache,
            speculate=speculate,
        )
        if isinstance(prompt, Tensor):
            if stop or (json_schema, regex, grammar) != (None, None, None):
                raise ValueError("stop strings need a text prompt, not token ids, and so do forms")
            rows = [row for row in self._check_ids(prompt) for _ in range(count)]
            observer = self._observer(len(rows), logprobs)
            adapters = self._adapters(adapter, len(rows) // count, count)
            decoding = decode(rows, observer=observer, adapters=adapters)
            new = []
            for tokens in decoding.steps:
                new.append(tokens.tolist())
                if observer is not None:
                    observer.note_all()
            ids = torch.tensor([[*row, *(tokens[i] for tokens in new)] for i, row in enumerate(rows)]).to(prompt.device)
            if observer is None:
                return ids[0] if prompt.ndim == 1 and count == 1 else ids
            generations = [Generation(None, *of_row) for of_row in zip(ids, observer.choices, strict=True)]
            return generations[0] if prompt.ndim == 1 and count == 1 else generations

        if not isinstance(prompt, (str, Sequence)) or isinstance(prompt, bytes):
            raise ValueError(f"a prompt must be a string, strings, or a tensor of ids, got {type(prompt).__name__}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [ids for text in prompts for ids in [self._prompt(text)] for _ in range(count)]
        constraints = self._constraints(len(rows), json_schema, regex, grammar)
        writers = [
            TextWriter(self.need_tokenizer(), stop_strings(stop), self.end_tokens, constraint)
            for constraint in (constraints if constraints is not None else [None] * len(rows))
        ]
        pieces: list[list[str]] = [[] for _ in rows]
        finished: set[int] = set()
        observer = self._observer(len(rows), logprobs)
        adapters = self._adapters(adapter, len(prompts), count)
        if rows:
            vocabulary = writers[0].tokenizer.vocab_size
            decoding = decode(
                rows,
                finished=finished,
                vocabulary=vocabulary,
                constraints=constraints,
                observer=observer,
                adapters=adapters,
            )
            steps = decoding.steps
            with contextlib.closing(steps):
                for tokens in steps:
                    for row, token in enumerate(tokens.tolist()):
                        if observer is not None and row not in finished:
                            observer.note(row)
                        pieces[row].append(writers[row].push(token))
                        if writers[row].finished:
                            finished.add(row)
                    if len(finished) == len(rows):
                        break
        new_texts = ["".join([*text, writer.close()]) for text, writer in zip(pieces, writers, strict=True)]
        made: list[Any] = [prompts[i // count] + new for i, new in enumerate(new_texts)]
        if observer is not None:
            made = [Generation.of(*of_row) for of_row in zip(made, rows, observer.choices, strict=True)]
        results = [made[i : i + count] for i in range(0, len(made), count)] if count > 1 else made
        return results[0] if isinstance(prompt, str) else results

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        truncate: bool = False,
        use_cache: bool = True,
        speculate: int | None = None,
        logprobs: int | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        adapter: str | None = None,
    ) -> TextStream:
        """The text that `generate` would add to `prompt`, piece by piece as it is made.

        A piece never ends inside a UTF-8 character, nor inside what may become a stop string. Arguments are checked
        at once, not at the first piece. `TextStream.tokens` counts the tokens made so far, `TextStream.how` says who
        makes them, and with `logprobs` `TextStream.choices` are they, as in a `Generation`.
        """
        settings = SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias)
        form = self._constraints(1, json_schema, regex, grammar)
        return self._text_stream(
            self._prompt(prompt),
            max_new_tokens,
            settings,
            stop,
            seed,
            speculate,
            logprobs,
            form,
            truncate,
            use_cache,
            adapter=adapter,
        )

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 512,
        temperature: float = 0.5,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        stream: bool = False,
        speculate: int | None = None,
        logprobs: int | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        adapter: str | None = None,
        **variables: Any,
    ) -> Any:
        """The assistant's reply to `messages`, each {"role": "system", "user" or "assistant", "content": "…"}, written
        by the model's own template: a string (with `logprobs` a `Generation`), or with `stream` a `TextStream` of its
        pieces.

        What a message says never becomes a special token. `variables` go to the template. The other settings are those
        of `generate`. A chat longer than the context loses its oldest turns, but not what the system says, with a
        warning; a reply ends at the latest where the context is full. What the chat so far has in common with an
        earlier one is not computed again. `ValueError` for a model without a template.
        """
        from llmfast.chat.turns import fitting  # a floor that only chats enter

        template = self.chat_template
        prompt = fitting(messages, lambda some: template.encode(some, **variables), self.config.context, max_new_tokens)
        settings = SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty, logit_bias)
        reply = self.reply(
            prompt, max_new_tokens, settings, stop, seed, speculate, logprobs, json_schema, regex, grammar, adapter
        )
        if stream:
            return reply
        text = "".join(reply)
        return text if logprobs is None else Generation.of(text, prompt, reply.choices)

    def reply(
        self,
        prompt: list[int],
        max_new_tokens: int,
        settings: SamplingSettings,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        speculate: int | None = None,
        logprobs: int | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        adapter: str | None = None,
    ) -> TextStream:
        """The text that continues the ids of a chat, from where the cache of an earlier one differs; it ends where the
        context is full. Bits may differ from those of a chat that starts over."""
        count = min(whole_number("max_new_tokens", max_new_tokens, least=0), self.config.context - len(prompt) + 1)
        form = self._constraints(1, json_schema, regex, grammar)
        return self._text_stream(
            prompt, count, settings, stop, seed, speculate, logprobs, form, exact=False, adapter=adapter
        )

    def _text_stream(
        self,
        prompt: list[int],
        max_new_tokens: int,
        settings: SamplingSettings,
        stop: str | list[str] | None,
        seed: int | None,
        speculate: int | None,
        logprobs: int | None,
        constraints: list[Constraint] | None,
        truncate: bool = False,
        use_cache: bool = True,
        exact: bool = True,
        adapter: str | None = None,
    ) -> TextStream:
        """The text that continues one prompt; not `exact`: its bits may differ from those of one that starts over."""
        constraint = constraints[0] if constraints else None
        writer = TextWriter(self.need_tokenizer(), stop_strings(stop), self.end_tokens, constraint)
        vocabulary = writer.tokenizer.vocab_size
        decoding = self._decode(
            [prompt],
            max_new_tokens,
            settings,
            seed,
            truncate,
            use_cache,
            speculate,
            (),
            vocabulary,
            constraints,
            self._observer(1, logprobs),
            exact,
            self._adapters(adapter, 1),
        )
        return TextStream(decoding, writer)

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's own. `ValueError` where it has none, or none that can be used."""
        tokenizer = self.need_tokenizer()
        if tokenizer.chat_template is None:
            raise ValueError(
                "this model has no chat template: it continues text (generate), and was not made to answer in turns"
            )
        if self._template is None or self._template.tokenizer is not tokenizer:
            from llmfast.chat.template import ChatTemplate

            self._template = ChatTemplate(tokenizer.chat_template, tokenizer)
        return self._template

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text: the tokenizer's own, and special tokens that the model's files name."""
        if self.tokenizer is None:
            return frozenset()
        # Configurations that say nothing have a family's ids, which may be any word of another tokenizer.
        special = self.tokenizer.special_tokens.values()
        return self.tokenizer.end_tokens | ({*self._end_tokens, *self.config.end_tokens} & {*special})

    @property
    def start_token(self) -> int | None:
        """What a text's first token is predicted from: the tokenizer's start-of-text, or else end-of-text, or None."""
        return start_token_of(self.config, self.tokenizer)

    def score(self, text: str | Tensor) -> Score:
        """The log-probability of every token of `text` (or of ids (T,)) given those before it.

        The first token is predicted from `start_token`, where the model has one. Texts longer than the context are
        scored in windows that overlap by half, so that every token sees at least half a context. `NonFiniteLogits`
        where the model gives no probabilities. Natively, what a text has in common with one scored before is not
        computed again.
        """
        if isinstance(text, Tensor) and text.ndim != 1:
            raise ValueError(f"score takes one text: ids of shape (T,), got {tuple(text.shape)}")
        ids = self._check_ids(text)[0] if isinstance(text, Tensor) else self._encode(text)
        start = self.start_token
        sequence = ids if start is None else [start, *ids]
        values = self._log_probabilities(sequence)
        unpredicted = torch.full((len(ids) - sum(map(len, values)),), float("nan"))
        return Score(ids, torch.cat([unpredicted, *values]))

    def _log_probabilities(self, sequence: list[int]) -> list[Tensor]:
        """Of all tokens but the first, in pieces."""
        context = self.config.context
        if 2 <= len(sequence) <= context + 1:
            with self.using_backend():
                scorer = self.runner.scorer(sequence[:-1], step_of(self.config.vocab_size))
                if scorer is not None:
                    with contextlib.closing(scorer):
                        return [score_on(scorer, sequence)]
        pieces = windows(sequence, context, half_overlapping(context))
        values: list[Tensor] = [torch.empty(0)] * len(pieces)
        for index, prediction in self.predictions(pieces):
            values[index] = prediction.log_probabilities
        return values

    def predictions(
        self, windows: Sequence[Window], tokens_per_batch: int = TOKENS_AT_ONCE, progress: Progress | None = None
    ) -> Iterator[tuple[int, Prediction]]:
        """`scoring.predictions` of this model."""
        with self.using_backend():
            reader = self.runner.reader()
        return each_under(self.using_backend, predictions(reader, windows, tokens_per_batch, progress))

    def _decode(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        settings: SamplingSettings,
        seed: int | None,
        truncate: bool,
        use_cache: bool,
        speculate: int | None,
        finished: Collection[int] = (),
        vocabulary: int | None = None,
        constraints: list[Constraint] | None = None,
        observer: Observer | None = None,
        exact: bool = True,
        adapters: list[str | None] | None = None,
    ) -> Decoding:
        """Checks the arguments, and returns the texts in the making.

        The caller may add rows to `finished` meanwhile: what becomes of them no longer matters. Tokens from
        `vocabulary` on are never chosen: an embedding may be larger than its tokenizer. `exact` as in `Runner.decoder`.
        """
        context = self.config.context
        count = whole_number("max_new_tokens", max_new_tokens, least=0)
        guesses = None if speculate is None else whole_number("speculate", speculate, least=0, most=MOST_GUESSES)
        if seed is not None:
            seed = whole_number("seed", seed, least=0, most=2**63 - 1)
        longest = max(map(len, prompts))
        if longest > context and not truncate:
            raise ValueError(
                f"the prompt has {longest} tokens, the model's context only {context}; "
                "shorten it, or pass truncate=True to keep its end"
            )
        rows = [prompt[-context:] for prompt in prompts]
        with self.using_backend():
            vocabulary = self.config.vocab_size if vocabulary is None else vocabulary
            sampler = Sampler.of(settings, vocabulary, seed, rows, self.runner.device, constraints, observer)
            decoder = self.runner.decoder(
                len(rows),
                min(context, longest + count),
                use_cache,
                guesses,
                True,
                rows[0],
                exact,
                bool(constraints),
                sampler.recordable,
                adapters,
            )
            how = decoder.describe(self.precision)
        steps = decode(decoder, Windows(rows, context, finished), count, sampler, self.using_backend)
        return Decoding(steps, decoder, how, min(longest, context), observer)

    def _adapters(
        self, chosen: str | None | Sequence[str | None], prompts: int, count: int = 1
    ) -> list[str | None] | None:
        """A name, or None, for each of `count` texts of every prompt; None where there are none at all."""
        names = [chosen] * prompts if chosen is None or isinstance(chosen, str) else list(chosen)
        if len(names) != prompts:
            raise ValueError(f"adapter has {len(names)} names for {prompts} prompts")
        for name in names:
            if name is not None and name not in self.runner.adapters:
                known = ", ".join(self.runner.adapters) or "none: add_adapter(name, path) adds one"
                raise ValueError(f"this model has no adapter {name!r}; it has {known}")
        return [name for name in names for _ in range(count)] if any(names) else None

    def _observer(self, rows: int, logprobs: int | None) -> Observer | None:
        """What notes how likely the tokens of so many texts are, where that is asked for."""
        if logprobs is None:
            return None
        return Observer(rows, whole_number("logprobs", logprobs, least=0, most=MOST_ALTERNATIVES), self.tokenizer)

    def _constraints(
        self, rows: int, json_schema: Any, regex: str | None, grammar: str | None
    ) -> list[Constraint] | None:
        """What gives so many texts their form, or None where they are free."""
        form = grammar_of(json_schema, regex, grammar)
        if form is None:
            return None
        tokenizer = self.need_tokenizer()
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(tokenizer, self.end_tokens)
        return [Constraint(self._vocabulary, form) for _ in range(rows)]

    def using_backend(self) -> contextlib.AbstractContextManager[None]:
        """Around every model call rather than a whole stream: what a consumer does between pieces is not ours."""
        return chosen_backend(self.backend)

    def need_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. A checkpoint of GPT-2's vocabulary without files of its own gets GPT-2's."""
        if self.tokenizer is None:
            instead = "give token ids (a tensor) instead of text"
            if self.config.vocab_size != GPT2_VOCAB_SIZE:
                raise ValueError(f"this model has no tokenizer: {instead}")
            try:
                self.tokenizer = gpt2_tokenizer()
            except FileNotFoundError as error:
                raise ValueError(f"this model has no tokenizer files: {instead}. {error}") from None
        return self.tokenizer

    def _encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be a string, got {type(text).__name__}")
        return self.need_tokenizer().encode(text)

    def _prompt(self, text: str) -> list[int]:
        """The ids of a text to continue, after the token that the model expects before any."""
        tokenizer, ids = self.need_tokenizer(), self._encode(text)
        if (start := _start_of_text(tokenizer)) is not None:
            return [start, *ids]
        if not ids:
            if tokenizer.end_of_text is None:
                raise ValueError("the prompt is empty, and the tokenizer has no end-of-text token to start from")
            return [tokenizer.end_of_text]
        return ids

    def _check_ids(self, ids: Tensor) -> list[list[int]]:
        kind = ids.dtype
        if ids.ndim not in (1, 2) or kind.is_floating_point or kind.is_complex or kind == torch.bool or not ids.numel():
            raise ValueError(f"token ids must be integers of shape (T,) or (B, T), got {kind} {tuple(ids.shape)}")
        rows: list[list[int]] = ids.reshape(-1, ids.shape[-1]).tolist()
        for wrong in (min(map(min, rows)), max(map(max, rows))):
            if not 0 <= wrong < self.config.vocab_size:
                raise ValueError(f"token id {wrong} is not in the vocabulary of {self.config.vocab_size}")
        return rows


def start_token_of(config: ModelConfig, tokenizer: Tokenizer | None) -> int | None:
    """What the first token of a text is predicted from (see `LLM.start_token`)."""
    start = config.bos_token_id
    if tokenizer is not None:
        start, end = _start_of_text(tokenizer), tokenizer.end_of_text
        start = end if start is None else start
    # Hugging Face's small configurations keep GPT-2's id.
    return None if start is not None and start >= config.vocab_size else start


def _start_of_text(tokenizer: Tokenizer) -> int | None:
    """Tokenizers of one's own need not know of it."""
    return getattr(tokenizer, "start_of_text", None)
