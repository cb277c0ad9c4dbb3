"""The place of a linear layer for what is added to its product, whatever its weight is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmfast import ops


class Adaptable(nn.Module):
    """A linear layer with its activation fused in, (..., K) -> (..., N).

    An `adapter` is a module that adds its own to the product before the activation: it is called with x and this layer,
    and gives (..., N). `weight` is W (N, K) as floats.
    """

    adapter: nn.Module | None
    weight: Tensor

    def product(self, x: Tensor, activation: str | None = None) -> Tensor:
        """activation(x Wᵀ + b)"""
        raise NotImplementedError

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        if self.adapter is None:
            return self.product(x, activation)
        return activated(self.adapter(x, self), activation)


def activated(x: Tensor, activation: str | None) -> Tensor:
    """One of `ops.ACTIVATIONS` by itself, or none."""
    if activation is None:
        return x
    if activation == "silu":
        return nn.functional.silu(x)
    return ops.gelu(x, "none" if activation == "gelu" else "tanh")


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) · up, of any shape. Only these two are kept for backward, where the product of three would keep
    what the activation gives, too."""
    return _Gated.apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            inner = gate.detach().requires_grad_()
            active = activated(inner, ctx.activation)
        (dgate,) = torch.autograd.grad(active, inner, grad * up)
        return dgate, active.detach().mul_(grad), None
