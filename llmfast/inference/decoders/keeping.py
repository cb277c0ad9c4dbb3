"""Decoders that keep what they hold when their text ends: the next prompt that begins alike is computed only from
where it differs.

    chat      the conversation so far, whose every turn begins with all before it
    generate  a system prompt, a document, a few examples that many prompts share
    score     a question with many answers, whose log-probabilities are remembered beside it

What is kept are keys and values, which depend on the tokens before them alone. Their bits depend on how many tokens
went through the weights together, too, so that what has to come out the same to the bit begins again only at a place
where it would have been the same (`same_bits`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmfast.inference.decoders.adapted import NativeAdapter
from llmfast.inference.decoders.native import BLOCK_ROWS, MOST_ROWS, NativeDecoder, NativeModel
from llmfast.threads import thread_count

QUERIES_PER_TASK = 64  # csrc/decoder_step.inl: queries that attend together, counted from the first of a step
MOST_BYTES = 256 << 20  # of keys and values that wait for a prompt
MOST_DECODERS = 16
SMALLEST_CAPACITY = 1024  # memory that no token has reached costs nothing


def shared_beginning(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def same_bits(kept: int, length: int, step: int = MOST_ROWS) -> int:
    """How many of `kept` tokens that a prefill made stay, so that a prompt of `length` gives the bits of a prefill.

    A prefill takes `step` tokens a step, and within a step whole tasks of queries are independent of each other; what
    is left of a step must be more than `BLOCK_ROWS` tokens, as few are multiplied in another way than many.
    """
    kept = min(kept, length - 1) // QUERIES_PER_TASK * QUERIES_PER_TASK
    step_end = min(length, (kept // step + 1) * step)
    if kept % step and step_end - kept <= BLOCK_ROWS:
        kept -= QUERIES_PER_TASK
    return max(0, kept)


class KeepingDecoder(NativeDecoder):
    """A `NativeDecoder` of one sequence whose `prefill` goes on from what it holds already.

    `exact` asks for the bits of a prefill that starts over. `kept` is how many tokens the last prompt found here.
    """

    def __init__(self, model: NativeModel, capacity: int):
        super().__init__(model, 1, capacity)
        self.tokens: list[int] = []  # that it holds
        self.most_held = 0
        self.exact = True
        self.threads = thread_count()
        self._prefilled = 0  # of `tokens`, those that have the bits of a prefill
        self.log_probabilities = torch.empty(0)  # (n,) of the tokens after the first, as far as they were scored
        self.cache: PrefixCache | None = None  # where it goes back to

    @property
    def held_bytes(self) -> int:
        """The memory of keys and values that has been touched."""
        return self.nbytes * self.most_held // self.capacity

    def keepable(self, prompt: list[int], exact: bool) -> int:
        """How many of the tokens it holds a prompt can go on from."""
        shared = shared_beginning(self.tokens, prompt)
        if not exact:
            return min(shared, len(prompt) - 1)
        return same_bits(min(shared, self._prefilled), len(prompt)) if self.threads == thread_count() else 0

    def scorable(self, sequence: list[int], step: int) -> int:
        """How many of the tokens it holds scoring can go on from: the token after them has its log-probability."""
        shared = min(shared_beginning(self.tokens, sequence) - 1, len(self.log_probabilities), self._prefilled)
        return same_bits(shared, len(sequence), step) if shared > 0 and self.threads == thread_count() else 0

    def read_on(self, sequence: list[int], step: int) -> tuple[Tensor, Iterator[Tensor]]:
        """The log-probabilities (n,) of the tokens after the first that it remembers, and the logits (…, V) after every
        token from the n-th on, up to `step` at a time, a multiple of `QUERIES_PER_TASK`."""
        self.kept = self.scorable(sequence, step)
        remembered = self.log_probabilities[: self.kept]
        self.rewind(self.kept)
        if self.kept == 0:
            self.threads = thread_count()
        return remembered, self._read(sequence, step)

    def _read(self, sequence: list[int], step: int) -> Iterator[Tensor]:
        start = self.kept
        while start < len(sequence):
            end = min(len(sequence), (start // step + 1) * step)
            yield self.step_block(torch.tensor(sequence[start:end]))
            if end - start > BLOCK_ROWS:
                self._prefilled = end
            start = end

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """As `Decoder.prefill`, of one prompt; only what is not held is computed."""
        if len(prompts) != 1 or not prompts[0]:
            raise ValueError("prefill takes 1 prompt of at least one token")
        prompt = prompts[0]
        self.kept = self.keepable(prompt, self.exact)
        as_prefilled = self.kept <= self._prefilled and self.kept == same_bits(self.kept, len(prompt))
        self.rewind(self.kept)
        if self.kept == 0:
            self.threads = thread_count()
        start = self.kept
        while start < len(prompt):
            end = min(len(prompt), (start // MOST_ROWS + 1) * MOST_ROWS)
            logits = self.extend(torch.tensor([prompt[start:end]]))
            start = end
        self._prefilled = len(prompt) if as_prefilled else min(self._prefilled, self.kept)
        return logits

    def extend(self, tokens: Tensor) -> Tensor:
        logits = super().extend(tokens)
        self._hold(tokens[0])
        return logits

    def step_block(self, tokens: Tensor) -> Tensor:
        logits = super().step_block(tokens)
        self._hold(tokens)
        return logits

    def _hold(self, tokens: Tensor) -> None:
        self.tokens += tokens.tolist()
        self.most_held = max(self.most_held, len(self.tokens))

    def rewind(self, length: int) -> None:
        super().rewind(length)
        del self.tokens[length:]
        self._prefilled = min(self._prefilled, length)
        self.log_probabilities = self.log_probabilities[: max(0, length - 1)]

    def close(self) -> None:
        if self.cache is not None:
            self.cache.give_back(self)


class PrefixCache:
    """Decoders of one model, or of one with an `adapter`, that wait for a prompt which begins as theirs; the longest
    unused go first.

    A decoder that is taken has one user, until its `close`. It is taken where at least half of what it holds stays, so
    that a prompt that shares little with a long chat does not cost the chat its keys and values.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, adapter: NativeAdapter | None = None):
        self.most_bytes, self.adapter = most_bytes, adapter
        self._lock = threading.Lock()
        self._waiting: list[KeepingDecoder] = []  # the last used at the end

    def take(self, model: NativeModel, prompt: list[int], capacity: int, exact: bool) -> KeepingDecoder:
        """A decoder of at least the capacity, for a prompt that begins with these tokens."""
        decoder = self._of_those_that_keep(lambda decoder: decoder.keepable(prompt, exact), model, capacity)
        decoder.exact = exact
        return decoder

    def take_to_score(self, model: NativeModel, sequence: list[int], step: int) -> KeepingDecoder:
        """A decoder to read this sequence with."""
        return self._of_those_that_keep(lambda decoder: decoder.scorable(sequence, step), model, len(sequence))

    def _of_those_that_keep(
        self, kept_by: Callable[[KeepingDecoder], int], model: NativeModel, capacity: int
    ) -> KeepingDecoder:
        """The one that keeps most, or a new one."""
        best, most = None, 0
        with self._lock:
            self._waiting = [decoder for decoder in self._waiting if decoder.model is model]
            for decoder in self._waiting:
                kept = kept_by(decoder)
                if kept > most and 2 * kept >= len(decoder.tokens) and decoder.capacity >= capacity:
                    best, most = decoder, kept
            if best is not None:
                self._waiting.remove(best)
        if best is None:
            roomy = max(SMALLEST_CAPACITY, 1 << (capacity - 1).bit_length())
            best = KeepingDecoder(model, min(model.config.context, roomy))
            if self.adapter is not None:
                best.adapt([self.adapter])
        best.cache = self
        return best

    def give_back(self, decoder: KeepingDecoder) -> None:
        decoder.cache = None  # which holds the decoder: one that is given back twice would have two users
        with self._lock:
            waiting = [*self._waiting, decoder][-MOST_DECODERS:]
            while waiting and sum(each.held_bytes for each in waiting) > self.most_bytes:
                waiting.pop(0)
            self._waiting = waiting

    @property
    def nbytes(self) -> int:
        """Of the keys and values that wait."""
        with self._lock:
            return sum(decoder.held_bytes for decoder in self._waiting)

    def clear(self) -> None:
        with self._lock:
            self._waiting = []
