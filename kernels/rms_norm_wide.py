"""RMSNorm of rows too wide for a program's registers: the formulas of rms_norm.py, a row read in pieces.

The mean square, then the result, each in one pass over the row, which the cache still holds.
"""

import torch
import triton
import triton.language as tl

from .norm_rows import PIECE, PIECE_WARPS, load_float, load_sum


@triton.jit
def _forward_wide_kernel(
    x, residual, weight, out, total, rstd_out, inverse_n, eps, N: tl.constexpr, BLOCK: tl.constexpr
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = load_sum(x, residual, None, row * N + columns, columns < N)
        squares += values * values
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) * inverse_n + eps)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        values = load_sum(x, residual, total, row * N + columns, mask)
        result = values * rstd * load_float(weight, columns, mask)
        tl.store(out + row * N + columns, result.to(out.dtype.element_ty), mask=mask)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _backward_wide_kernel(grad_out, grad_sum, x, weight, rstd, dx, inverse_n, N: tl.constexpr, BLOCK: tl.constexpr):
    """dx of one row."""
    row = tl.program_id(0).to(tl.int64)
    row_rstd = tl.load(rstd + row)
    projections = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        scaled = load_float(grad_out, row * N + columns, mask) * load_float(weight, columns, mask)
        projections += scaled * load_float(x, row * N + columns, mask) * row_rstd
    projection = tl.sum(projections, 0) * inverse_n
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        scaled = load_float(grad_out, row * N + columns, mask) * load_float(weight, columns, mask)
        result = row_rstd * (scaled - load_float(x, row * N + columns, mask) * row_rstd * projection)
        if grad_sum is not None:
            result += load_float(grad_sum, row * N + columns, mask)
        tl.store(dx + row * N + columns, result.to(dx.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launching


def forward_wide(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
) -> None:
    """Fills out, total and rstd."""
    N = x.shape[-1]
    _forward_wide_kernel[(rstd.numel(),)](
        x, residual, weight, out, total, rstd, 1.0 / N, eps, N=N, BLOCK=PIECE, num_warps=PIECE_WARPS
    )


def backward_wide(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
) -> None:
    """Fills dx."""
    N = x.shape[-1]
    _backward_wide_kernel[(rstd.numel(),)](
        grad_out, grad_sum, x, weight, rstd, dx, 1.0 / N, N=N, BLOCK=PIECE, num_warps=PIECE_WARPS
    )
