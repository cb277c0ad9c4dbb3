"""The whole text again for every token, O(T²) in all: what a cache saves, and a check on it."""

from __future__ import annotations

from torch import Tensor

from llmfast.inference.decoders.protocol import Decoder, Reader


class UncachedDecoder(Decoder):
    """Keeps the tokens, and at every step has a `Reader` replay all of them."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.prompts, self.following = [list(prompt) for prompt in prompts], list[Tensor]()
        return self.reader.replay(self.prompts, self.following)

    def step(self, tokens: Tensor) -> Tensor:
        self.following.append(tokens)
        return self.reader.replay(self.prompts, self.following)

    def describe(self, weights: str) -> str:
        return f"{self.reader.describe(weights)}, no cache"
