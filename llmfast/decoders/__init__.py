"""How one decode step runs.

A decoder holds a batch of sequences and turns new tokens into the logits of the next:

    logits = decoder.prefill(prompts)      # a list of B lists of token ids, of any lengths -> (B, V) float32
    logits = decoder.step(tokens)          # (B,) int64, one token more for every sequence -> (B, V) float32

`prefill` starts over. Neither may take a sequence past the model's context.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from llmfast.decoders.eager import EagerDecoder, UncachedDecoder

__all__ = ["Decoder", "EagerDecoder", "UncachedDecoder"]


class Decoder(Protocol):
    def prefill(self, prompts: list[list[int]]) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...
