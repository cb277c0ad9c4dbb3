"""The decode loop: prompts -> prefill -> logits -> choice -> step -> logits -> … : token ids in, token ids out.

How a step runs and who chooses is the decoder's. Where a row has filled the context, what is left of it is prefilled
again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from llmfast.inference.decoders import Decoder
from llmfast.inference.execution import each_under
from llmfast.inference.generation import Observer
from llmfast.inference.sampling import Sampler


@dataclass(frozen=True)
class Decoding:
    """Texts in the making: the new tokens of all rows, (B,) int64 a step, and who makes them, in words too."""

    steps: Generator[Tensor, None, None]
    decoder: Decoder
    how: str
    prompt_tokens: int  # of the longest row, as far as the model sees it
    observer: Observer | None = None  # of how likely the tokens are


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

    def append(self, tokens: list[int]) -> None:
        """Adds a token to every row."""
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


def decode(
    decoder: Decoder,
    windows: Windows,
    count: int,
    sampler: Sampler,
    using_backend: Callable[[], AbstractContextManager[None]],
) -> Generator[Tensor, None, None]:
    """The next `count` tokens of all rows, (B,) int64 a step; the decoder is closed at the end.

    `using_backend` is entered around every model call rather than a whole text: what a consumer does between tokens is
    not ours.
    """
    with contextlib.closing(decoder):
        while count:
            until_full = min(count, windows.room + 1)
            with contextlib.closing(decoder.generate(windows.rows, until_full, sampler)) as steps:
                for tokens in each_under(using_backend, steps):
                    yield tokens
                    count -= 1
                    if count:
                        windows.append(tokens.tolist())
