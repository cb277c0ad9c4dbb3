"""What every decoder does: prompts to logits, tokens to logits, and with a choice between them whole texts."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

from torch import Tensor

from llmfast.inference.sampling import Sampler
from llmfast.models import ModelConfig


class Decoder:
    """A batch of B sequences that grow by a token a step. Not for two threads at once.

    Neither `prefill` nor `step` may take a sequence past the model's context.
    """

    kept = 0  # how many tokens of the last prompt it held before and did not compute again

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Starts over: B prompts of any lengths, at least one token each -> logits (B, V) float32."""
        raise NotImplementedError

    def step(self, tokens: Tensor) -> Tensor:
        """One token more for every sequence: (B,) int64 -> logits (B, V) float32."""
        raise NotImplementedError

    def describe(self, weights: str) -> str:
        """Who computes, in which precision, and where, in a few words, under the backends chosen around the call.

        `weights` is the precision of the model's weights.
        """
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], count: int, sampler: Sampler) -> Generator[Tensor, None, None]:
        """Prefills, and yields `count` times the next token of every sequence, (B,) int64.

        `NonFiniteLogits` where there is none.
        """
        self.begin(sampler)
        logits = self.prefill(prompts)
        for step in range(1, count + 1):
            tokens = self.choose(logits, sampler)
            if sampler.observer is not None:
                sampler.observer.observe(logits, tokens)
            yield tokens
            if step < count:
                logits = self.step(tokens)

    def close(self) -> None:
        """Ends its use. A decoder that others may take over goes back to where it came from."""

    def begin(self, sampler: Sampler) -> None:
        """Before a text: what it takes to choose its tokens so."""

    def choose(self, logits: Tensor, sampler: Sampler) -> Tensor:
        return sampler.choose(logits)


class Reader(Protocol):
    """Runs a model over tokens that are given, which is all that scoring needs."""

    @property
    def config(self) -> ModelConfig: ...

    def read(self, sequences: list[list[int]], skip: list[int], rows: int) -> Iterator[Tensor]:
        """The logits (n, V) float32 after every token of each sequence but its first `skip`, for which the head does
        not run; one sequence after the other, up to `rows` at a time."""
        ...

    def replay(self, prompts: list[list[int]], following: list[Tensor]) -> Tensor:
        """The logits (B, V) float32 after B prompts and the tokens that followed, a (B,) int64 a step."""
        ...

    def describe(self, weights: str) -> str:
        """As `Decoder.describe`."""
        ...


def precision_label(weights: str, arithmetic: str) -> str:
    """The precision of a model's weights, and that of the arithmetic where it is another."""
    return weights if weights == arithmetic else f"{weights} weights in {arithmetic}"
