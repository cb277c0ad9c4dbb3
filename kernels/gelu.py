"""GELU (Hendrycks and Gimpel, arXiv:1606.08415), forward and backward.

    "none":  gelu(x) = x * Phi(x),  Phi(x) = (1 + erf(x / sqrt 2)) / 2
    "tanh":  gelu(x) = x * (1 + tanh u) / 2,  u = sqrt(2 / pi) * (x + 0.044715 x^3)          (GPT-2's)

(1 + tanh u) / 2 is the sigmoid of 2u, and 1 / (1 + exp(-2u)) cancels nowhere: an exponential that overflows gives 0,
one that underflows 1. The derivatives, with s = sigmoid(2u) and phi the normal density:

    "none":  Phi(x) + x * phi(x)
    "tanh":  s + x * s * (1 - s) * 2 u',  u' = sqrt(2 / pi) * (1 + 3 * 0.044715 x^2)
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import ceil_div, on_device
from .tuning import choose
from .tuning import describe as describe_tile

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
_CUBIC = tl.constexpr(0.044715)
_THREE_CUBIC = tl.constexpr(0.134145)


@dataclass(frozen=True)
class ElementwiseTile:
    """Elements a program, and its warps."""

    block: int
    warps: int


CANDIDATES = [ElementwiseTile(block, warps) for block in (512, 1024, 2048, 4096, 8192) for warps in (2, 4, 8)]


@triton.jit
def gelu_of(x, TANH: tl.constexpr):
    """gelu(x) of a float32 tile; other kernels use it in their epilogue."""
    if TANH:
        twice_u = x * _TWO_SQRT_2_OVER_PI * (1.0 + x * x * _CUBIC)
        return x / (1.0 + tl.exp2(twice_u * _MINUS_LOG2_E))
    else:
        return 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))


@triton.jit
def gelu_derivative_of(x, TANH: tl.constexpr):
    """d gelu(x) / dx of a float32 tile."""
    if TANH:
        # Beyond +-10 the derivative is 1 or 0 in float32, and inside nothing overflows. (where, not minimum: a NaN
        # stays one.)
        x = tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))
        twice_u = x * _TWO_SQRT_2_OVER_PI * (1.0 + x * x * _CUBIC)
        exponential = tl.exp2(twice_u * _MINUS_LOG2_E)
        sigmoid = 1.0 / (1.0 + exponential)
        twice_u_derivative = (1.0 + x * x * _THREE_CUBIC) * _TWO_SQRT_2_OVER_PI
        return sigmoid + x * sigmoid * (exponential * sigmoid) * twice_u_derivative
    else:
        cumulative = 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF))
        density = tl.exp2(x * x * _MINUS_HALF_LOG2_E) * _INVERSE_SQRT_2_PI
        return cumulative + x * density


@triton.jit(do_not_specialize=["count"])
def _gelu_kernel(x, out, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if first + BLOCK <= count:  # a whole block: no mask, so that loads are vectors whatever count is
        values = tl.load(x + first + offsets).to(tl.float32)
        tl.store(out + first + offsets, gelu_of(values, TANH).to(out.dtype.element_ty))
    else:
        mask = offsets < count - first
        values = tl.load(x + first + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + first + offsets, gelu_of(values, TANH).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _gelu_backward_kernel(grad_out, x, dx, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        values = tl.load(x + first + offsets).to(tl.float32)
        gradient = tl.load(grad_out + first + offsets).to(tl.float32)
        tl.store(dx + first + offsets, (gradient * gelu_derivative_of(values, TANH)).to(dx.dtype.element_ty))
    else:
        mask = offsets < count - first
        values = tl.load(x + first + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(grad_out + first + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + first + offsets, (gradient * gelu_derivative_of(values, TANH)).to(dx.dtype.element_ty), mask=mask)


def _is_tanh(approximate: str) -> bool:
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu: approximate must be "tanh" or "none", not {approximate!r}')
    return approximate == "tanh"


def gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu(x), of any shape."""
    tanh = _is_tanh(approximate)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out

    def launch(tile: ElementwiseTile) -> None:
        with on_device(x):
            _gelu_kernel[(ceil_div(x.numel(), tile.block),)](
                x, out, x.numel(), TANH=tanh, BLOCK=tile.block, num_warps=tile.warps
            )

    launch(choose("gelu", ElementwiseTile, x, CANDIDATES, launch))
    return out


def gelu_backward(grad_out: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The gradient of x."""
    tanh = _is_tanh(approximate)
    grad_out, x = grad_out.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx

    def launch(tile: ElementwiseTile) -> None:
        with on_device(x):
            _gelu_backward_kernel[(ceil_div(x.numel(), tile.block),)](
                grad_out, x, dx, x.numel(), TANH=tanh, BLOCK=tile.block, num_warps=tile.warps
            )

    launch(choose("gelu", ElementwiseTile, x, CANDIDATES, launch))
    return dx


def describe(x: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `gelu` takes for this tensor."""
    return describe_tile("gelu", ElementwiseTile, x)
