"""GELU, forward and backward, of any shape; activations.py has its formulas.

"none":  x * Phi(x), by erf        "tanh":  GPT-2's
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .activations import activate, derivative
from .launch import Schedule, ceil_div, on_device, scheduled
from .tuning import choose
from .tuning import describe as describe_tile


@dataclass(frozen=True)
class ElementwiseTile(Schedule):
    """Elements a program, and its warps."""

    block: int
    warps: int


CANDIDATES = [ElementwiseTile(block, warps) for block in (512, 1024, 2048, 4096, 8192) for warps in (2, 4, 8)]


@triton.jit(do_not_specialize=["count"])
def _gelu_kernel(x, out, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if first + BLOCK <= count:  # a whole block: no mask, so that loads are vectors whatever count is
        values = tl.load(x + first + offsets).to(tl.float32)
        tl.store(out + first + offsets, activate(values, ACTIVATION).to(out.dtype.element_ty))
    else:
        mask = offsets < count - first
        values = tl.load(x + first + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + first + offsets, activate(values, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _gelu_backward_kernel(grad_out, x, dx, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        values = tl.load(x + first + offsets).to(tl.float32)
        gradient = tl.load(grad_out + first + offsets).to(tl.float32)
        tl.store(dx + first + offsets, (gradient * derivative(values, ACTIVATION)).to(dx.dtype.element_ty))
    else:
        mask = offsets < count - first
        values = tl.load(x + first + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(grad_out + first + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + first + offsets, (gradient * derivative(values, ACTIVATION)).to(dx.dtype.element_ty), mask=mask)


def _activation(approximate: str) -> str:
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu: approximate must be "tanh" or "none", not {approximate!r}')
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu(x), of any shape."""
    activation = _activation(approximate)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out

    def launch(tile: ElementwiseTile) -> None:
        with on_device(x):
            _gelu_kernel[(ceil_div(x.numel(), tile.block),)](
                x, out, x.numel(), ACTIVATION=activation, BLOCK=tile.block, **scheduled(tile)
            )

    launch(choose("gelu", ElementwiseTile, x, CANDIDATES, launch))
    return out


def gelu_backward(grad_out: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    """The gradient of x."""
    activation = _activation(approximate)
    grad_out, x = grad_out.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx

    def launch(tile: ElementwiseTile) -> None:
        with on_device(x):
            _gelu_backward_kernel[(ceil_div(x.numel(), tile.block),)](
                grad_out, x, dx, x.numel(), ACTIVATION=activation, BLOCK=tile.block, **scheduled(tile)
            )

    launch(choose("gelu", ElementwiseTile, x, CANDIDATES, launch))
    return dx


def describe(x: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `gelu` takes for this tensor."""
    return describe_tile("gelu", ElementwiseTile, x)
