"""Who turns a batch of token ids into vectors of texts: a module, op by op, or packed weights in one C++ call.

`execution.py` chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmfast.inference.decoders.native import NativeModel
from llmfast.inference.pooling import Pooling
from llmfast.threads import thread_count


class Encoder(Protocol):
    tokens_at_once: ClassVar[int]  # of a batch

    def encode(self, rows: list[list[int]], pooling: Pooling) -> Tensor:
        """Ids of texts, each of one at least, the longest first -> (B, C) float32 on the CPU."""
        ...


class EagerEncoder:
    """`hidden(ids, lengths)` gives the last hidden states: (B, T), (B,) or None where all have T -> (B, T, C)."""

    tokens_at_once: ClassVar[int] = 2048  # padding included: what it computes stays near the CPU

    def __init__(self, hidden: Callable[[Tensor, Tensor | None], Tensor], device: torch.device):
        self.hidden, self.device = hidden, device

    def encode(self, rows: list[list[int]], pooling: Pooling) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows])
        longest = len(rows[0])
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        ragged = len(rows[-1]) < longest
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        return pooling(self.hidden(ids, lengths if ragged else None), lengths).cpu()


class NativeEncoder:
    """Texts stand one behind the other, without padding; a vector has the same bits whatever texts go with it."""

    tokens_at_once: ClassVar[int] = 16384  # shared out to the threads in groups (csrc/encoder/encoder_step.inl)

    def __init__(self, model: NativeModel):
        self.model = model

    def encode(self, rows: list[list[int]], pooling: Pooling) -> Tensor:
        ids = torch.tensor(list(chain.from_iterable(rows)))
        lengths = [len(row) for row in rows]
        number, threads = self.model._number, thread_count()
        return pooling.scaled(torch.ops.llmfast.native_encode(number, ids, lengths, pooling.kind, threads))
