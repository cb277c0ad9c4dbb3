"""The place of a linear layer for what is added to its product, whatever its weight is made of."""

from __future__ import annotations

from torch import Tensor, nn

from llmfast import ops


class Adaptable(nn.Module):
    """A linear layer with its activation fused in, (..., K) -> (..., N).

    An `adapter` is a module that adds its own to the product before the activation: it is called with x and the
    function that multiplies it, and gives (..., N).
    """

    adapter: nn.Module | None

    def product(self, x: Tensor, activation: str | None = None) -> Tensor:
        """activation(x Wᵀ + b)"""
        raise NotImplementedError

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        if self.adapter is None:
            return self.product(x, activation)
        return activated(self.adapter(x, self.product), activation)


def activated(x: Tensor, activation: str | None) -> Tensor:
    """One of `ops.ACTIVATIONS` by itself, or none."""
    if activation is None:
        return x
    if activation == "silu":
        return nn.functional.silu(x)
    return ops.gelu(x, "none" if activation == "gelu" else "tanh")
