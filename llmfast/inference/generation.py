"""What was generated, token by token: how likely the model found each, and what else it might have said.

The probabilities are the model's own, as `LLM.score` gives them: of its whole vocabulary, before temperature, bias,
penalty and form change what is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.threads import fork_safe_torch
from llmfast.tokenizers import Tokenizer

MOST_ALTERNATIVES = 100


@dataclass(frozen=True)
class Alternative:
    """A token that might have come: its `id`, its `text` (bytes that are no whole character as �; empty without a
    tokenizer), and the natural logarithm of its probability."""

    id: int
    text: str
    log_probability: float


@dataclass(frozen=True)
class Choice(Alternative):
    """A token that was chosen, and the likeliest ones at its place, the likeliest first."""

    alternatives: Sequence[Alternative] = ()


@dataclass(frozen=True)
class Generation:
    """What `LLM.generate` and `LLM.chat` give where log-probabilities are asked for.

    `text` is what they give otherwise, None where the prompt was token ids; `ids` (T,) int64 are the prompt and all
    that was chosen; `choices` are the tokens chosen. An end token is the last of them, though not of the text.
    """

    text: str | None
    ids: Tensor
    choices: list[Choice]

    @classmethod
    def of(cls, text: str, prompt: list[int], choices: list[Choice]) -> Generation:
        return cls(text, torch.tensor([*prompt, *(choice.id for choice in choices)]), choices)

    @property
    def total(self) -> float:
        """The log-probability of all that was chosen."""
        return sum(choice.log_probability for choice in self.choices)


class Observer:
    """Notes of every step what was chosen among which logits, with `count` alternatives.

    `choices` are those of each row, as far as its text goes.
    """

    def __init__(self, rows: int, count: int, tokenizer: Tokenizer | None):
        self.count, self.tokenizer = count, tokenizer
        self._latest: tuple[list[int], list[float], list[list[int]], list[list[float]]] = [], [], [], []
        self._texts: dict[int, str] = {}
        self.choices: list[list[Choice]] = [[] for _ in range(rows)]

    @torch.inference_mode()
    def observe(self, logits: Tensor, tokens: Tensor) -> None:
        """Logits (B, V) and the tokens chosen, (B,) int64."""
        with fork_safe_torch():
            all_of_them = torch.log_softmax(logits.float(), dim=-1)
            chosen = all_of_them.gather(1, tokens.to(logits.device).unsqueeze(1))[:, 0]
            values, ids = all_of_them.topk(min(self.count, logits.shape[1]), dim=-1)
        self._latest = tokens.tolist(), chosen.tolist(), ids.tolist(), values.tolist()

    def note(self, row: int) -> None:
        """The latest token of this row belongs to its text."""
        tokens, chosen, ids, values = self._latest
        likeliest = zip(ids[row], values[row], strict=True)
        alternatives = [Alternative(i, self._text(i), value) for i, value in likeliest]
        self.choices[row].append(Choice(tokens[row], self._text(tokens[row]), chosen[row], alternatives))

    def note_all(self) -> None:
        for row in range(len(self.choices)):
            self.note(row)

    def _text(self, token: int) -> str:
        if self.tokenizer is None:
            return ""
        if token not in self._texts:
            try:
                text = self.tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")
            except ValueError:  # an embedding may have rows that no token has
                text = ""
            self._texts[token] = text
        return self._texts[token]
