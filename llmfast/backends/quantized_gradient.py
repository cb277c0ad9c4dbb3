"""The gradient of `quantized_linear` to its input, the same for all kernels: y = activation(x Wᵀ + b), W as integers.

W is made floats again in backward, one layer at a time, and not kept: what a graph holds of a layer is x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmfast.backends.derivatives import once_only
from llmfast.quantization.formats import dequantize

Product = Callable[..., Tensor]  # a backend's quantized_linear


def differentiable(
    product: Product, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None, activation: str | None
) -> Tensor:
    """`product(x, **parts, bias=bias, activation=activation)`, with gradients for x and bias where they are wanted."""
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and wanted):
        return product(x, **parts, bias=bias, activation=activation)
    out: Tensor = _Product.apply(x, bias, product, activation, list(parts), *parts.values())
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Any, product: Product, activation: Any, names: list[str], *parts: Any
    ) -> Tensor:
        ctx.product, ctx.activation, ctx.names = product, activation, names
        ctx.save_for_backward(x, bias, *parts)
        return product(x, **dict(zip(names, parts, strict=True)), bias=bias, activation=activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, bias, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _Product.gradients(ctx, grad, x, bias, saved)
        if torch.is_grad_enabled():  # they are to be differentiated
            gradients = [None if each is None else _Last.apply(each, x, bias) for each in gradients]
        return *gradients, *[None] * (3 + len(saved))

    @staticmethod
    def gradients(ctx: Any, grad: Tensor, x: Tensor, bias: Any, saved: list[Tensor]) -> list[Tensor | None]:
        parts = dict(zip(ctx.names, saved, strict=True))
        if ctx.activation is not None:  # what it was applied to is computed again
            with torch.enable_grad():
                inside = ctx.product(x, **parts, bias=bias, activation=None).detach().requires_grad_()
                (grad,) = torch.autograd.grad(activated(inside, ctx.activation), inside, grad)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dequantize(parts, x.shape[-1]).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            dbias = grad.float().flatten(0, -2).sum(dim=0).to(grad.dtype)
        return [dx, dbias]


class _Last(torch.autograd.Function):
    """A gradient of x and bias that has none itself."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, bias: Any) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise once_only("quantized_linear")


def activated(x: Tensor, activation: str) -> Tensor:
    """In float32, rounded once, as the contract has it."""
    if activation == "silu":
        return torch.nn.functional.silu(x.float()).to(x.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x.float(), approximate=approximate).to(x.dtype)
