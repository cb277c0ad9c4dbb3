"""Guessing ahead: a decoder that checks several tokens in one step, where the text repeats itself.

Speculative decoding (Leviathan et al., 2023) with the text itself as the draft model (Saxena's prompt lookup, 2023).
A step that takes k guesses along reads the weights once for all of them, and has the logits after each ready if it
turns out to be the token that is chosen. Choosing goes on as ever, from the same logits with the same bits, so the
text is the same, greedy or sampled; a wrong guess costs its share of one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmfast.inference.arguments import whole_number
from llmfast.inference.constraint import Constraint
from llmfast.inference.decoders.native import BLOCK_ROWS, NativeDecoder, chosen
from llmfast.inference.decoders.protocol import Decoder
from llmfast.inference.sampling import Sampler

MOST_GUESSES = BLOCK_ROWS - 1  # with the token before them, as many as have the same bits as in a step of their own


class PromptLookup:
    """The tokens so far, and what came after each run of `longest` to 1 of them when it was last there.

    >>> PromptLookup([1, 2, 3, 4, 1, 2]).guess(2)
    [3, 4]
    """

    def __init__(self, tokens: list[int], longest: int = 3):
        self.tokens: list[int] = []
        self.longest = longest
        self._after: dict[tuple[int, ...], int] = {}  # a run of tokens -> the position after it
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        end = len(self.tokens)
        for n in range(1, min(self.longest, end) + 1):
            self._after[tuple(self.tokens[end - n :])] = end
        self.tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens: those after the longest run that the text now ends in, if it was there before."""
        for n in range(min(self.longest, len(self.tokens)), 0, -1):
            position = self._after.get(tuple(self.tokens[-n:]))
            if position is not None:
                return self.tokens[position : position + count]
        return []


class SpeculatingDecoder(Decoder):
    """A `NativeDecoder` of one sequence that takes up to `guesses` guessed tokens along with every step, or those that
    have to come because the text must have a form."""

    def __init__(self, decoder: NativeDecoder, guesses: int):
        if decoder.batch != 1:
            raise ValueError("guessing ahead works on one sequence at a time")
        self.decoder, self.guesses = decoder, whole_number("speculate", guesses, least=0, most=MOST_GUESSES)
        self._constraint: Constraint | None = None
        self.steps = 0  # of the decoder below
        self._forget([])

    def _forget(self, tokens: list[int]) -> None:
        self._lookup = PromptLookup(tokens)
        self._waiting: list[int] = []  # guesses whose logits are there
        self._logits, self._best, self._row = torch.empty(0, 0), torch.empty(0, dtype=torch.int64), 0

    @property
    def best(self) -> Tensor:
        return self._best[self._row : self._row + 1]

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self._forget(prompts[0])
        self._logits, self._best = self.decoder.prefill(prompts), self.decoder.best
        self.kept = self.decoder.kept
        return self._logits

    def step(self, tokens: Tensor) -> Tensor:
        token, length = int(tokens[0]), len(self._lookup.tokens)
        self._lookup.append(token)
        if self._waiting and self._waiting[0] == token:
            self._waiting.pop(0)
            self._row += 1
        else:
            self.decoder.rewind(length)  # guesses that did not come true
            room = self.decoder.capacity - length - 1
            forced = self._constraint.forced() if self._constraint is not None else []
            self._waiting = forced[: min(MOST_GUESSES, room)] or self._lookup.guess(min(self.guesses, room))
            self._logits = self.decoder.step_block(torch.tensor([token, *self._waiting]))
            self._best, self._row = self.decoder.best, 0
            self.steps += 1
        return self._logits[self._row : self._row + 1]

    def close(self) -> None:
        self.decoder.close()

    def begin(self, sampler: Sampler) -> None:
        self.decoder.begin(sampler)
        self._constraint = sampler.constraints[0] if sampler.constraints is not None else None

    def choose(self, logits: Tensor, sampler: Sampler) -> Tensor:
        return chosen(logits, self.best, sampler)

    def describe(self, weights: str) -> str:
        guessed = f", up to {self.guesses} tokens guessed" if self.guesses else ""
        return self.decoder.describe(weights) + guessed
