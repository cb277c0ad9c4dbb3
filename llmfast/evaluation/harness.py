"""Models of this package in EleutherAI's lm-evaluation-harness, under the name `llmfast` (extra `[eval]`).

From Python, with any of the harness's tasks or one's own:

    import lm_eval
    from llmfast.evaluation.harness import HarnessLM

    lm_eval.simple_evaluate(HarnessLM("stories"), tasks=["blimp"])

From the command line this module is the harness's own command, to which the name is known:

    python -m llmfast.evaluation.harness run --model llmfast --model_args pretrained=stories --tasks blimp
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import llmfast
from llmfast.inference.llm import LLM
from llmfast.inference.scoring import Window, half_overlapping, windows

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f'{error}: lm-evaluation-harness comes with pip install "llmfast-kernels[eval]"') from None

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("llmfast")
class HarnessLM(TemplateLM):
    """An `LLM` as the harness asks for it. `pretrained` is one, or the name of a model as `llmfast.load` takes it.

    Scoring needs no batch size: sentences of like length share a batch. `batch_size` is how many texts are generated at
    once.
    """

    def __init__(
        self,
        pretrained: str | Path | LLM = "stories",
        backend: str = "auto",
        precision: str = "auto",
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not isinstance(pretrained, LLM):
            pretrained = llmfast.load(pretrained, backend, precision, device or "auto")
        self.llm = pretrained
        self.batch_size = min(16 if batch_size == "auto" else int(batch_size), max_batch_size or 1 << 30)
        self.max_gen_toks = 256

    @property
    def tokenizer_name(self) -> str:
        return type(self.llm.need_tokenizer()).__name__

    @property
    def max_length(self) -> int:
        return self.llm.config.context

    @property
    def eot_token_id(self) -> int:
        """What a text without a context begins with."""
        if (token := self.llm.start_token) is None:
            raise ValueError("the model has no end-of-text token, from which a text without a context is predicted")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.llm.need_tokenizer().encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation) the log-probability of the continuation, and whether it is greedy.

        The oldest of the context is left out where both are too long for the model. A continuation that is too long by
        itself is predicted in windows that overlap by half.
        """
        pieces: list[Window] = []
        owners = []
        for owner, (_, context, continuation) in enumerate(requests):
            made = self._windows(context, continuation)
            pieces += made
            owners += [owner] * len(made)
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        total = sum(len(window.ids) - window.first for window in pieces)
        with tqdm(total=total, desc="tokens scored", disable=disable_tqdm) as bar:
            for index, prediction in self.llm.predictions(pieces, progress=lambda done, _: bar.update(done - bar.n)):
                totals[owners[index]] += float(prediction.log_probabilities.double().sum())
                greedy[owners[index]] &= bool(prediction.likeliest.all())
        return list(zip(totals, greedy, strict=True))

    def _windows(self, context: list[int], continuation: list[int]) -> list[Window]:
        context = context or [self.prefix_token_id]
        if len(continuation) > self.max_length:
            return windows([*context[-1:], *continuation], self.max_length, half_overlapping(self.max_length))
        ids = [*context, *continuation][-self.max_length - 1 :]
        return [Window(ids, len(ids) - len(continuation))] if continuation else []

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, from end-of-text on, in the windows that the harness prescribes."""
        parts: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            made = [(None, *make_disjoint_window(pair)) for pair in rolling]
            parts += made
            owners += [owner] * len(made)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(parts, disable_tqdm)
        for owner, (log_probability, _) in zip(owners, scored, strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations (greedy where the task does not say otherwise), each up to a stop string of its task."""
        results = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(index)
        with tqdm(total=len(requests), desc="texts generated", disable=disable_tqdm) as bar:
            for alike in by_settings.values():
                settings = normalize_gen_kwargs(requests[alike[0]].args[1], self.max_gen_toks)
                for start in range(0, len(alike), self.batch_size):
                    batch = alike[start : start + self.batch_size]
                    texts = self._continue([requests[index].args[0] for index in batch], dict(settings))
                    for index, text in zip(batch, texts, strict=True):
                        results[index] = text
                    bar.update(len(batch))
        return results

    def _continue(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        length, stop = settings.pop("max_gen_toks"), settings.pop("until")
        sampled = settings.pop("do_sample")
        if unknown := sorted(settings.keys() - {*SAMPLING, "seed"}):
            raise ValueError(f"this model can't generate with {', '.join(unknown)}; it knows {', '.join(SAMPLING)}")
        settings["temperature"] = settings.get("temperature", 1.0) if sampled else 0.0
        shortened = [self._shorten(prompt, length) for prompt in prompts]
        texts = self.llm.generate(shortened, length, stop=[text for text in stop if text], **settings)
        return [text[len(prompt) :] for text, prompt in zip(texts, shortened, strict=True)]

    def _shorten(self, prompt: str, new: int) -> str:
        """The end of a prompt, where all of it would not leave room for `new` tokens; at least half a context."""
        ids = self.tok_encode(prompt)
        room = max(1, self.max_length - new, self.max_length // 2)
        return prompt if len(ids) <= room else self.llm.need_tokenizer().decode(ids[-room:])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
