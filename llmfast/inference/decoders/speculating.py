"""Guessing ahead: a decoder that checks several tokens in one step, where the text repeats itself.

Speculative decoding (Leviathan et al., 2023) with the text itself as the draft model (Saxena's prompt lookup, 2023).
A step that takes k guesses along reads the weights once for all of them, and has the logits after each ready if it
turns out to be the token that is chosen. Choosing goes on as ever, from the same logits with the same bits, so the
text is the same, greedy or sampled; a wrong guess costs its share of one step.

Without a number of guesses the decoder finds it by itself. What it would have guessed is held to what came, which costs
nothing; it guesses where the last tokens would have been guessed right, as many as were in a row; and an `Account` of
the time ends it where that has cost more than a hundredth.
"""

from __future__ import annotations

import time
from itertools import islice

import torch
from torch import Tensor

from llmfast.inference.arguments import whole_number
from llmfast.inference.constraint import Constraint
from llmfast.inference.decoders.native import BLOCK_ROWS, NativeDecoder, chosen, forced
from llmfast.inference.decoders.protocol import Decoder
from llmfast.inference.sampling import Sampler

MOST_GUESSES = BLOCK_ROWS - 1  # with the token before them, as many as have the same bits as in a step of their own
RIGHT_IN_A_ROW = 2  # so many tokens would have been guessed before the first guess is made
MOST_LOST = 0.01  # of the time of a text


class PromptLookup:
    """The tokens so far, and what came after each run of `longest` to 1 of them when it was last there.

    >>> PromptLookup([1, 2, 3, 4, 1, 2]).guess(2)
    [3, 4]
    """

    def __init__(self, tokens: list[int], longest: int = 3):
        self.tokens = list(tokens)
        self.longest = longest
        self._after: dict[tuple[int, ...], int] = {}  # a run of tokens -> the position after it, of the last one
        for n in range(1, longest + 1):
            runs = zip(*(islice(tokens, i, None) for i in range(n)), strict=False)
            self._after.update(zip(runs, range(n, len(tokens)), strict=False))  # the run at the end has nothing after

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


class Account:
    """Whether guessing pays, by the clock: what steps with guesses took, and what one step for each of the tokens that
    they gave would have taken."""

    def __init__(self) -> None:
        self.spent = self.gained = 0.0  # seconds
        self.single: float | None = None  # seconds of a step of one token

    def note(self, seconds: float, guesses: int, right: int) -> None:
        """A step took so long, and so many of its guesses were right."""
        self.spent += seconds
        if not guesses:  # one that had to wait for the processor says little
            self.single = min(seconds, 0.9 * (self.single or seconds) + 0.1 * seconds)
        elif self.single is not None:
            self.gained += (1 + right) * self.single - seconds

    @property
    def allows_guesses(self) -> bool:
        return self.single is not None and self.gained >= -MOST_LOST * self.spent


class SpeculatingDecoder(Decoder):
    """A `NativeDecoder` of one sequence that takes up to `guesses` guessed tokens along with every step (None: as many
    as pay), or those that have to come because the text must have a form."""

    def __init__(self, decoder: NativeDecoder, guesses: int | None):
        if decoder.batch != 1:
            raise ValueError("guessing ahead works on one sequence at a time")
        self.decoder = decoder
        self.guesses = None if guesses is None else whole_number("speculate", guesses, least=0, most=MOST_GUESSES)
        self._constraint: Constraint | None = None
        self.steps = 0  # of the decoder below
        self._forget([])

    def _forget(self, tokens: list[int]) -> None:
        self._lookup = PromptLookup(tokens)
        self._account, self._seconds, self._guessed = Account(), 0.0, 0
        self._expected: list[int] = []  # what would be guessed
        self._right = 0  # so many tokens in a row were expected
        self._waiting: list[int] = []  # guesses whose logits are there
        self._forced = False  # they are no guesses, but have to come
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
        if self.guesses is None:
            self._right = self._right + 1 if self._expected == [token] else 0
            self._expected = self._lookup.guess(1)
        if self._waiting and self._waiting[0] == token:
            self._waiting.pop(0)
            self._row += 1
        else:
            self.decoder.rewind(length)  # guesses that did not come true
            if self._seconds and not self._forced:
                self._account.note(self._seconds, self._guessed, self._row)
            room = self.decoder.capacity - length - 1
            coming = self._constraint.forced() if self._constraint is not None else []
            self._forced = bool(coming)
            self._waiting = coming[: min(MOST_GUESSES, room)] or self._lookup.guess(min(self._most(), room))
            self._guessed = len(self._waiting)
            start = time.perf_counter()
            self._logits = self.decoder.step_block(torch.tensor([token, *self._waiting]))
            self._seconds = time.perf_counter() - start
            self._best, self._row = self.decoder.best, 0
            self.steps += 1
        return self._logits[self._row : self._row + 1]

    def _most(self) -> int:
        """How many guesses a step may take along."""
        if self.guesses is not None:
            return self.guesses
        return min(self._right, MOST_GUESSES) if self._right >= RIGHT_IN_A_ROW and self._account.allows_guesses else 0

    def close(self) -> None:
        self.decoder.close()

    def begin(self, sampler: Sampler) -> None:
        self.decoder.begin(sampler)
        self._constraint = sampler.constraints[0] if sampler.constraints is not None else None

    def choose(self, logits: Tensor, sampler: Sampler) -> Tensor:
        if self._forced and self._waiting:
            return forced(self._waiting[0], self.best, sampler)
        return chosen(logits, self.best, sampler)

    def describe(self, weights: str) -> str:
        guessed = f", up to {self.guesses} tokens guessed" if self.guesses else ""
        return self.decoder.describe(weights) + guessed
