"""Text from a model: prefill the prompt, then decode token by token.

prompt -> tokenizer -> prefill -> logits -> next_token -> step -> logits -> … -> tokenizer -> text
"""

from __future__ import annotations

import codecs
import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.backends import use_backend
from llmfast.inference.decoders import (
    Decoder,
    DecoderPool,
    EagerDecoder,
    NativeDecoder,
    NativeModel,
    SpeculatingDecoder,
    StaticDecoder,
    UncachedDecoder,
    cuda_graph,
    native,
)
from llmfast.inference.decoding import DecodeLoop, Windows
from llmfast.inference.sampling import SamplingSettings
from llmfast.inference.scoring import half_overlapping, predictions, windows
from llmfast.models import LanguageModel, ModelConfig
from llmfast.tokenizers import Tokenizer, gpt2_tokenizer

GPT2_VOCAB_SIZE = 50257


def chosen_backend(backend: str | Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """`use_backend`, but for "auto" whatever the surrounding context has chosen."""
    return contextlib.nullcontext() if backend == "auto" else use_backend(backend)


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
    backends chosen are the C++ ones, and the module is not needed. Changing the module's parameters in place has them
    packed again (changes through `parameter.data`, which PyTorch does not count, go unnoticed).

    Generating from several threads at once is safe.
    """

    def __init__(
        self,
        model: LanguageModel | Callable[[], LanguageModel],
        tokenizer: Tokenizer | None = None,
        backend: str | Mapping[str, str] = "auto",
        native: NativeModel | None = None,
    ):
        self._model = model.eval() if isinstance(model, LanguageModel) else None
        self._read_model = model
        self._native = native
        self._lock = threading.Lock()  # around reading and packing
        self._packed_from = _fingerprint(self._model)
        self._recorded = DecoderPool()
        self.tokenizer = tokenizer
        self.backend = backend
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {self.config.vocab_size}"
            )

    @property
    def model(self) -> LanguageModel:
        """The PyTorch module."""
        with self._lock:
            if self._model is None:
                assert not isinstance(self._read_model, LanguageModel)
                with torch.inference_mode(False):  # parameters that can be trained, whoever asks
                    self._model = self._read_model().eval()
                self._packed_from = _fingerprint(self._model)
            return self._model

    @property
    def config(self) -> ModelConfig:
        return self._native.config if self._native is not None else self.model.config

    @property
    def precision(self) -> str:
        """fp32, bf16, fp16, int8, int4 or int4-all."""
        if self._native is not None:
            return self._native.precision
        return self.model.precision

    def native(self) -> NativeModel | None:
        """The packed weights, where generating runs natively under the current choice of backends; else None."""
        with self.using_backend():
            if self._native is None or native.why_not(self.config, self._device()) is not None:
                return None
        with self._lock:
            if (now := _fingerprint(self._model)) != self._packed_from:
                assert self._model is not None
                self._native = NativeModel(self.config, self._model.state_dict().items(), self._native.precision)
                self._packed_from = now
            return self._native

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        """A decoder with a KV cache for `batch` sequences of up to `capacity` tokens (default: the whole context).

        Its `prefill` and `step` give logits; generating natively it is a `NativeDecoder`, on a GPU a
        `CudaGraphDecoder`. Use it under `using_backend`.
        """
        packed = self.native()
        if packed is not None:
            return NativeDecoder(packed, batch, capacity)
        if self.why_not_cuda_graph() is None:
            return cuda_graph.CudaGraphDecoder(self.model.eval(), batch, capacity)
        return EagerDecoder(self.model, batch, capacity)

    def why_not_cuda_graph(self) -> str | None:
        """Why generating does not replay CUDA graphs under the current choice of backends, or None where it does."""
        if self.native() is not None:
            return "it runs natively, on the CPU"
        with self.using_backend():
            return cuda_graph.why_not(self.model)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self._model is None else self._model.device

    def save_pretrained(self, path: str | Path) -> None:
        """Writes model and tokenizer into the directory `path`, in Hugging Face's layout."""
        self.model.save_pretrained(path)
        if self.tokenizer is not None:
            self.tokenizer.save(path)

    def generate(
        self,
        prompt: str | list[str] | Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        num_return_sequences: int = 1,
        truncate: bool = False,
        use_cache: bool = True,
        speculate: int = 0,
    ) -> Any:
        """Continues `prompt`; what comes back includes it.

        A string gives a string, a list of strings (of any lengths, run as one batch) a list, and a tensor of token
        ids (T,) or (B, T) a tensor (…, T + max_new_tokens). With `num_return_sequences` n > 1 a string gives a list
        of n, a list gives a list of lists, and a tensor gives n rows for each of its own.

        Text ends at the tokenizer's end-of-text (left out), before a string in `stop`, or after `max_new_tokens`;
        ids run to `max_new_tokens`. `temperature=0` is greedy; the other settings are those of `SamplingSettings`. The
        same `seed` gives the same text on the same backend; row i draws from `seed + i`. A prompt longer than the
        context is a `ValueError`, unless `truncate` keeps only its end. Generation past the context drops the oldest
        half of what the model sees, with one warning. `use_cache=False` computes everything again for every token.

        `speculate=k` guesses up to k tokens ahead from what the text has said before, and checks them in one step: the
        same text, sooner where it repeats itself (one sequence, generating natively).
        """
        settings = SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty)
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be at least 1, got {num_return_sequences}")
        if isinstance(prompt, Tensor):
            if stop:
                raise ValueError("stop strings need a text prompt, not token ids")
            rows = self._check_ids(prompt)
            rows = [row for row in rows for _ in range(num_return_sequences)]
            run = self._decode(rows, max_new_tokens, settings, seed, truncate, use_cache, speculate)
            new = torch.stack([*run], dim=1) if max_new_tokens else torch.empty(len(rows), 0, dtype=torch.int64)
            result = torch.cat([torch.tensor(rows), new.cpu()], dim=1).to(prompt.device)
            return result[0] if prompt.ndim == 1 and num_return_sequences == 1 else result

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [ids for text in prompts for ids in [self._encode(text)] for _ in range(num_return_sequences)]
        writers = [_Writer(self.need_tokenizer(), _stop_strings(stop)) for _ in rows]
        pieces: list[list[str]] = [[] for _ in rows]
        finished: set[int] = set()
        if rows:
            vocabulary = writers[0].tokenizer.vocab_size
            steps = self._decode(
                rows, max_new_tokens, settings, seed, truncate, use_cache, speculate, finished, vocabulary
            )
            for tokens in steps:
                for row, token in enumerate(tokens.tolist()):
                    pieces[row].append(writers[row].push(token))
                    if writers[row].finished:
                        finished.add(row)
                if len(finished) == len(rows):
                    break
        new_texts = ["".join([*text, writer.close()]) for text, writer in zip(pieces, writers, strict=True)]
        n = num_return_sequences
        grouped = [[text + new for new in new_texts[i * n : (i + 1) * n]] for i, text in enumerate(prompts)]
        results = grouped if n > 1 else [group[0] for group in grouped]
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
        stop: str | list[str] | None = None,
        seed: int | None = None,
        truncate: bool = False,
        use_cache: bool = True,
        speculate: int = 0,
    ) -> TextStream:
        """The text that `generate` would add to `prompt`, piece by piece as it is made.

        A piece never ends inside a UTF-8 character, nor inside what may become a stop string. Arguments are checked
        at once, not at the first piece. `TextStream.tokens` counts the tokens made so far.
        """
        settings = SamplingSettings(temperature, top_k, top_p, min_p, repetition_penalty)
        writer = _Writer(self.need_tokenizer(), _stop_strings(stop))
        rows, vocabulary = [self._encode(prompt)], writer.tokenizer.vocab_size
        steps = self._decode(
            rows, max_new_tokens, settings, seed, truncate, use_cache, speculate, vocabulary=vocabulary
        )
        return TextStream(steps, writer)

    @property
    def start_token(self) -> int | None:
        """What a text's first token is predicted from: end-of-text, or None where the model has none."""
        start = self.tokenizer.end_of_text if self.tokenizer is not None else self.config.bos_token_id
        # Hugging Face's small configurations keep GPT-2's id.
        return None if start is not None and start >= self.config.vocab_size else start

    def score(self, text: str | Tensor) -> Score:
        """The log-probability of every token of `text` (or of ids (T,)) given those before it.

        The first token is predicted from end-of-text, where the model has one. Texts longer than the context are
        scored in windows that overlap by half, so that every token sees at least half a context.
        """
        if isinstance(text, Tensor) and text.ndim != 1:
            raise ValueError(f"score takes one text: ids of shape (T,), got {tuple(text.shape)}")
        ids = self._check_ids(text)[0] if isinstance(text, Tensor) else self._encode(text, allow_empty=True)
        start = self.start_token
        sequence = ids if start is None else [start, *ids]
        context = self.config.context
        pieces = windows(sequence, context, half_overlapping(context))
        values: list[Tensor] = [torch.empty(0)] * len(pieces)
        with self.using_backend():
            for index, prediction in predictions(self.native() or self.model, pieces):
                values[index] = prediction.log_probabilities
        unpredicted = torch.full((len(ids) - sum(map(len, values)),), float("nan"))
        return Score(ids, torch.cat([unpredicted, *values]))

    def _decode(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        settings: SamplingSettings,
        seed: int | None,
        truncate: bool,
        use_cache: bool,
        speculate: int,
        finished: Collection[int] = (),
        vocabulary: int | None = None,
    ) -> Iterator[Tensor]:
        """Checks the arguments, and returns an iterator over the new tokens of all rows, (B,) int64 a step.

        The caller may add rows to `finished` meanwhile: what becomes of them no longer matters. Tokens from
        `vocabulary` on are never chosen: an embedding may be larger than its tokenizer.
        """
        context = self.config.context
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        longest = max(map(len, prompts))
        if longest > context and not truncate:
            raise ValueError(
                f"the prompt has {longest} tokens, the model's context only {context}; "
                "shorten it, or pass truncate=True to keep its end"
            )
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")
        rows = [prompt[-context:] for prompt in prompts]
        vocabulary = self.config.vocab_size if vocabulary is None else vocabulary
        capacity = min(context, longest + max_new_tokens)
        decoder = self._new_decoder(len(rows), capacity, use_cache, speculate, vocabulary)
        loop = DecodeLoop(decoder, settings, vocabulary, seed, self._device(), self.using_backend)
        return self._tokens(loop, Windows(rows, context, finished), max_new_tokens)

    def _tokens(self, loop: DecodeLoop, windows: Windows, count: int) -> Iterator[Tensor]:
        try:
            yield from loop.tokens(windows, count)
        finally:
            if isinstance(loop.decoder, StaticDecoder):
                self._recorded.give_back(loop.decoder)

    def _new_decoder(self, batch: int, capacity: int, use_cache: bool, speculate: int, vocabulary: int) -> Decoder:
        packed = self.native() if use_cache else None
        if packed is None:
            if speculate:
                raise ValueError("speculate needs the native decoder and its cache: a CPU, and the C++ backend")
            self.model.eval()  # whoever trained it meanwhile left dropout on
            if not use_cache:
                return UncachedDecoder(self.model)
            if self.why_not_cuda_graph() is None:
                return self._recorded.take(self.model, batch, capacity)
            return EagerDecoder(self.model, batch, capacity)
        decoder = NativeDecoder(packed, batch, capacity, vocabulary=vocabulary)
        return SpeculatingDecoder(decoder, speculate) if speculate else decoder

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

    def _encode(self, text: str, allow_empty: bool = False) -> list[int]:
        tokenizer = self.need_tokenizer()
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be a string, got {type(text).__name__}")
        ids = tokenizer.encode(text)
        if not ids and not allow_empty:
            if tokenizer.end_of_text is None:
                raise ValueError("the prompt is empty, and the tokenizer has no end-of-text token to start from")
            return [tokenizer.end_of_text]
        return ids

    def _check_ids(self, ids: Tensor) -> list[list[int]]:
        if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
            raise ValueError(f"token ids must be integers of shape (T,) or (B, T), got {ids.dtype} {tuple(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is not in the vocabulary of {self.config.vocab_size}")
        return ids.reshape(-1, ids.shape[-1]).tolist()


class TextStream:
    """An iterator over pieces of new text; `tokens` counts the tokens so far."""

    def __init__(self, steps: Iterator[Tensor], writer: _Writer):
        self.tokens = 0
        self._pieces = self._run(steps, writer)

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, steps: Iterator[Tensor], writer: _Writer) -> Iterator[str]:
        for tokens in steps:
            self.tokens += 1
            if piece := writer.push(int(tokens[0])):
                yield piece
            if writer.finished:
                break
        if piece := writer.close():
            yield piece


def _fingerprint(model: LanguageModel | None) -> list[tuple[int, int]]:
    """Differs when parameters were replaced or changed in place."""
    if model is None:
        return []
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]


class _Writer:
    """Turns one row's tokens into text as far as it is certain, and notices where the text ends."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.tokenizer = tokenizer
        self.stop = stop
        self.finished = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that may turn out to begin a stop string

    def push(self, token: int) -> str:
        """The text that has become certain with `token`."""
        if self.finished:
            return ""
        if token == self.tokenizer.end_of_text:
            text = self.close()
            self.finished = True
            return text
        return self._release(self._utf8.decode(self.tokenizer.decode_bytes([token])), final=False)

    def close(self) -> str:
        """What was held back, when no more tokens come. A character of which only some bytes came is left out."""
        return "" if self.finished else self._release("", final=True)

    def _release(self, text: str, final: bool) -> str:
        text = self._held + text
        self._held = ""
        found = [position for stop in self.stop if (position := text.find(stop)) >= 0]
        if found:
            self.finished = True
            return text[: min(found)]
        if not final:
            keep = max((_overlap(text, stop) for stop in self.stop), default=0)
            if keep:
                text, self._held = text[:-keep], text[-keep:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _stop_strings(stop: str | list[str] | None) -> list[str]:
    strings = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if any(not isinstance(s, str) or not s for s in strings):
        raise ValueError(f"stop must be non-empty strings, got {stop!r}")
    return strings
