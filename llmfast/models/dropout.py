"""Dropout (Srivastava et al., 2014) whose masks cost little on a CPU.

PyTorch draws a mask there number by number, on one thread: 45 ms for 3 million, a third of a small model's training
step. Here 64 random bits decide about four bfloat16 or two float32 numbers, and the mask is applied to their bits by
integer arithmetic, which every CPU does a vector at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(nn.Dropout):
    """x with each element zero with probability `p`, the others divided by 1 - p, in training; x itself otherwise.

    Drawn from torch's generator of the device. On a CPU `p` is rounded to a multiple of 2**-15 for numbers of 16 bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < self.p < 1:
            return super().forward(x)
        return _drop(x, self.p) if self.training else x


def _drop(x: Tensor, p: float) -> Tensor:
    integer = INTEGERS[x.element_size()]
    most = torch.iinfo(integer).max
    threshold = min(most, round(p * (most + 1)))
    words = torch.empty(-(-x.numel() * x.element_size() // 8), dtype=torch.int64).random_(-(2**63), None)
    words = words.view(integer)[: x.numel()].view(x.shape)
    # All bits become the sign of number - threshold, ones where the element is dropped; in place, as all is ours.
    kept = words.bitwise_and_(most).sub_(threshold).bitwise_right_shift_(8 * x.element_size() - 1).bitwise_not_()
    return _Keep.apply(x, kept, 1 / (1 - threshold / (most + 1)))


class _Keep(torch.autograd.Function):
    """x · scale where `kept` (integers of the same size) has all bits set, zero where it has none."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x.contiguous().view(kept.dtype) & kept).view(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _Keep.apply(gradient, kept, ctx.scale), None, None
