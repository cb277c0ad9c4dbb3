"""The decode loop: prompts -> prefill -> logits -> choice -> step -> logits -> … : token ids in, token ids out.

A native decoder chooses tokens in C++, a static one on its device; for the others `next_token` does. Where a row has
filled the context, what is left of it is prefilled again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.inference.decoders import Decoder, NativeDecoder, SpeculatingDecoder, StaticDecoder, native
from llmfast.inference.sampling import SamplingSettings, next_token
from llmfast.threads import fork_safe_torch


class Windows:
    """The tokens that the model sees of each row: they grow, and lose their older half when the context is full.

    What becomes of the rows in `finished`, to which the caller may add, no longer matters.
    """

    def __init__(self, rows: list[list[int]], context: int, finished: Collection[int] = ()):
        self.rows, self.context, self.finished = rows, context, finished
        self._warned = False

    @property
    def room(self) -> int:
        """How many tokens fit before some row is full."""
        return self.context - max(map(len, self.rows))

    def append(self, tokens: list[int]) -> bool:
        """Adds a token to every row; whether some of them lost tokens, so that a cache has to start over."""
        context = self.context
        full = {row for row, window in enumerate(self.rows) if len(window) == context}
        if not self._warned and not full.issubset(self.finished):
            warnings.warn(
                f"the text outgrew the context of {context} tokens; the model goes on seeing only its newer half",
                stacklevel=3,
            )
            self._warned = True
        for row, token in enumerate(tokens):
            if row in full:
                self.rows[row] = self.rows[row][context // 2 :] if context > 1 and row not in self.finished else []
            self.rows[row].append(token)
        return bool(full)


@dataclass(frozen=True)
class DecodeLoop:
    """A decoder, and how it chooses: among the first `vocabulary` tokens, by `settings`.

    `seed` None draws one. `using_backend` is entered around every model call rather than a whole text: what a consumer
    does between tokens is not ours.
    """

    decoder: Decoder
    settings: SamplingSettings
    vocabulary: int
    seed: int | None
    device: torch.device
    using_backend: Callable[[], AbstractContextManager[None]]

    def tokens(self, windows: Windows, count: int) -> Iterator[Tensor]:
        """The next `count` tokens of all rows, (B,) int64 a step."""
        if count == 0:
            return iter(())
        rows = len(windows.rows)
        generators = row_generators(self.seed, rows) if self.settings.temperature > 0 else None
        seen = None
        if self.settings.repetition_penalty != 1:
            seen = torch.zeros(rows, self.vocabulary, dtype=torch.bool, device=self.device)
            for row, window in enumerate(windows.rows):
                seen[row, window] = True
        if isinstance(self.decoder, StaticDecoder):
            return self._on_device(self.decoder, windows, count, generators, seen)
        return self._step_by_step(windows, count, generators, seen)

    def _step_by_step(
        self, windows: Windows, count: int, generators: list[torch.Generator] | None, seen: Tensor | None
    ) -> Iterator[Tensor]:
        with self.using_backend():
            logits = self.decoder.prefill(windows.rows)
        for step in range(1, count + 1):
            tokens = self._choose(logits, generators, seen)
            yield tokens
            if step == count:
                return
            if seen is not None:
                seen.scatter_(1, tokens.unsqueeze(1), True)
            slid = windows.append(tokens.tolist())
            with self.using_backend():
                logits = self.decoder.prefill(windows.rows) if slid else self.decoder.step(tokens)

    def _choose(self, logits: Tensor, generators: list[torch.Generator] | None, seen: Tensor | None) -> Tensor:
        decoder, settings = self.decoder, self.settings
        # A native decoder has found the likeliest token on the way, and draws one faster than PyTorch's operators.
        if isinstance(decoder, (NativeDecoder, SpeculatingDecoder)) and seen is None:
            if settings.temperature == 0:
                return decoder.best
            return native.next_token(logits, settings, generators, self.vocabulary)
        with fork_safe_torch():
            return next_token(logits[:, : self.vocabulary], settings, generators, seen)

    def _on_device(
        self,
        decoder: StaticDecoder,
        windows: Windows,
        count: int,
        generators: list[torch.Generator] | None,
        seen: Tensor | None,
    ) -> Iterator[Tensor]:
        """The decoder chooses by itself, up to where a row is full."""
        while count:
            now = min(count, windows.room + 1)
            run = decoder.generate(windows.rows, now, self.settings, self.vocabulary, generators, seen)
            with contextlib.closing(run) as steps:
                for _ in range(now):
                    with self.using_backend():
                        tokens = next(steps)
                    yield tokens
                    count -= 1
                    if count:
                        windows.append(tokens.tolist())
            seen = None if seen is None else decoder.seen


def row_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """On the CPU, wherever the model is: one number a token, and the same ones everywhere."""
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))  # torch.manual_seed makes this repeatable too
    return [torch.Generator().manual_seed((seed + row) % 2**63) for row in range(rows)]
