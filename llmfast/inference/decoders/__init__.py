"""How one decode step runs.

A decoder holds a batch of sequences and turns new tokens into the logits of the next:

    logits = decoder.prefill(prompts)      # a list of B lists of token ids, of any lengths -> (B, V) float32
    logits = decoder.step(tokens)          # (B,) int64, one token more for every sequence -> (B, V) float32

`prefill` starts over. Neither may take a sequence past the model's context.

`EagerDecoder` runs the model itself, on any device and backend, `NativeDecoder` makes one C++ call a step, on a CPU,
and `CudaGraphDecoder` replays a recorded step, on a GPU; all have a KV cache that is allocated once.
`SpeculatingDecoder` guesses ahead on top of the native one, and `UncachedDecoder` computes everything again for every
token.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from llmfast.inference.decoders.cuda_graph import CudaGraphDecoder, DecoderPool
from llmfast.inference.decoders.eager import EagerDecoder, UncachedDecoder
from llmfast.inference.decoders.native import NativeDecoder, NativeModel
from llmfast.inference.decoders.speculating import SpeculatingDecoder
from llmfast.inference.decoders.static import StaticDecoder

__all__ = [
    "CudaGraphDecoder",
    "Decoder",
    "DecoderPool",
    "EagerDecoder",
    "NativeDecoder",
    "NativeModel",
    "SpeculatingDecoder",
    "StaticDecoder",
    "UncachedDecoder",
]


class Decoder(Protocol):
    def prefill(self, prompts: list[list[int]]) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...
