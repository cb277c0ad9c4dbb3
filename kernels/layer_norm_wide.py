"""LayerNorm of rows too wide for a program's registers: the formulas of layer_norm.py, a row read in pieces.

The mean, then the variance, then the result, each in one pass over the row, which the cache still holds.
"""

import torch
import triton
import triton.language as tl

from .norm_rows import PIECE, PIECE_WARPS, load_float, load_sum


@triton.jit
def _forward_wide_kernel(
    x, residual, weight, bias, out, total, mean_out, rstd_out, inverse_n, eps, N: tl.constexpr, BLOCK: tl.constexpr
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        sums += load_sum(x, residual, None, row * N + columns, columns < N)
    mean = tl.sum(sums, 0) * inverse_n
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = load_sum(x, residual, None, row * N + columns, columns < N)
        centred = tl.where(columns < N, values - mean, 0.0)
        squares += centred * centred
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) * inverse_n + eps)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        values = load_sum(x, residual, total, row * N + columns, mask)
        result = (values - mean) * rstd * load_float(weight, columns, mask)
        if bias is not None:
            result += load_float(bias, columns, mask)
        tl.store(out + row * N + columns, result.to(out.dtype.element_ty), mask=mask)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _backward_wide_kernel(
    grad_out, grad_sum, x, weight, mean, rstd, dx, inverse_n, N: tl.constexpr, BLOCK: tl.constexpr
):
    """dx of one row."""
    row = tl.program_id(0).to(tl.int64)
    row_mean = tl.load(mean + row)
    row_rstd = tl.load(rstd + row)
    projections = tl.zeros([BLOCK], tl.float32)
    averages = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        scaled = load_float(grad_out, row * N + columns, mask) * load_float(weight, columns, mask)
        values = load_float(x, row * N + columns, mask)
        projections += scaled * (values - row_mean) * row_rstd
        averages += scaled
    projection = tl.sum(projections, 0) * inverse_n
    average = tl.sum(averages, 0) * inverse_n
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        scaled = load_float(grad_out, row * N + columns, mask) * load_float(weight, columns, mask)
        values = load_float(x, row * N + columns, mask)
        result = row_rstd * (scaled - average - (values - row_mean) * row_rstd * projection)
        if grad_sum is not None:
            result += load_float(grad_sum, row * N + columns, mask)
        tl.store(dx + row * N + columns, result.to(dx.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launching


def forward_wide(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
) -> None:
    """Fills out, total, mean and rstd."""
    N = x.shape[-1]
    _forward_wide_kernel[(mean.numel(),)](
        x, residual, weight, bias, out, total, mean, rstd, 1.0 / N, eps, N=N, BLOCK=PIECE, num_warps=PIECE_WARPS
    )


def backward_wide(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
) -> None:
    """Fills dx."""
    N = x.shape[-1]
    _backward_wide_kernel[(mean.numel(),)](
        grad_out, grad_sum, x, weight, mean, rstd, dx, 1.0 / N, N=N, BLOCK=PIECE, num_warps=PIECE_WARPS
    )
