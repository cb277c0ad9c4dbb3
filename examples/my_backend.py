"""A backend of your own: operations in a file that the package knows nothing of.

    llmfast verify --backend examples/my_backend.py          # is it right?
    llmfast bench ops --backend examples/my_backend.py       # is it fast?

A backend is a module with functions named as in `llmfast.ops`. It defines the operations that it wants to; here they
are GELU and LayerNorm, forward and backward, written by hand with PyTorch's tensors. docs/write-your-own-kernel.md
comes to this file step by step, and says how kernels in Triton and in C++ take the place of the formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run there, or None where it can. Optional: without it, everything defined here is offered."""
    if dtype not in (torch.float32, torch.bfloat16):
        return "my kernels know float32 and bfloat16"
    return None


# --- GELU: x · Φ(x) ---------------------------------------------------------------------------------------------------


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    return _TanhGelu.apply(x) if approximate == "tanh" else _ErfGelu.apply(x)


class _TanhGelu(torch.autograd.Function):
    """y = ½ x (1 + t) with t = tanh(u), u = √(2/π) (x + 0.044715 x³)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float()  # in float32 whatever the dtype: bfloat16 has 8 bits, and every step would round to them
        return (0.5 * wide * (1 + torch.tanh(_inner(wide)))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = x.float()
        t = torch.tanh(_inner(wide))
        slope_of_u = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * wide * wide)
        slope = 0.5 * (1 + t) + 0.5 * wide * (1 - t * t) * slope_of_u
        return (grad.float() * slope).to(x.dtype)


def _inner(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)


class _ErfGelu(torch.autograd.Function):
    """y = x Φ(x) with Φ(x) = ½ (1 + erf(x / √2)), whose slope is φ(x) = exp(-x²/2) / √(2π)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x.float() * _phi(x.float())).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = x.float()
        density = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
        return (grad.float() * (_phi(wide) + wide * density)).to(x.dtype)


def _phi(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# --- LayerNorm: (x - mean) / √(variance + eps) · weight + bias --------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    return _LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The residual step of a transformer, which a real kernel would do in one pass over memory."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


class _LayerNorm(torch.autograd.Function):
    """x is (..., N). With n the normalised row, r = 1 / deviation and g = grad · weight:

    dx = r (g - mean(g) - n · mean(g · n)), dweight = Σ grad · n and dbias = Σ grad over the rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        mean = x.float().mean(-1, keepdim=True)  # statistics in float32
        centred = x.float() - mean
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        # Two numbers a row are kept, not the normalised rows: backward makes those again, which takes less memory.
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        out = centred * rstd * weight.float()
        return (out if bias is None else out + bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        normed = (x.float() - mean) * rstd
        grad = grad.float()
        g = grad * weight.float()
        dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
        rows = tuple(range(x.ndim - 1))  # weight and bias are shared by all rows: their gradients are sums over them
        dweight = (grad * normed).sum(rows) if rows else grad * normed
        dbias = (grad.sum(rows) if rows else grad) if ctx.has_bias else None
        return dx.to(x.dtype), dweight.to(x.dtype), None if dbias is None else dbias.to(x.dtype), None
