"""LayerNorm of rows too wide for a program's registers: the formulas of layer_norm.py, a row read in pieces.

The mean, then the variance, then the result, each in one pass over the row, which the cache still holds. The column
sums of the backward pass have a kernel of their own, one tile of columns a program.
"""

import torch
import triton
import triton.language as tl

from .launch import ceil_div, multiprocessors

# The widest row that layer_norm.py holds at once, and the piece of a wider one.
LARGEST_BLOCK = 8192
PIECE = 4096
WARPS = 8
# Tiles of the column sums, and how many programs share the rows, for each multiprocessor.
ROWS, COLUMNS = 32, 64
PROGRAMS_A_MULTIPROCESSOR = 4


@triton.jit
def _forward_wide_kernel(
    x, residual, weight, bias, out, total, mean_out, rstd_out, inverse_n, eps, N: tl.constexpr, BLOCK: tl.constexpr
):
    """One row too wide to hold: its mean, then its variance, then its result, in pieces."""
    row = tl.program_id(0).to(tl.int64)
    x += row * N
    if residual is not None:
        residual += row * N
        total += row * N
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(x + columns, mask=columns < N, other=0.0).to(tl.float32)
        if residual is not None:
            values += tl.load(residual + columns, mask=columns < N, other=0.0).to(tl.float32)
            values = values.to(total.dtype.element_ty).to(tl.float32)
        sums += values
    mean = tl.sum(sums, 0) * inverse_n
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(x + columns, mask=columns < N, other=0.0).to(tl.float32)
        if residual is not None:
            values += tl.load(residual + columns, mask=columns < N, other=0.0).to(tl.float32)
            values = values.to(total.dtype.element_ty).to(tl.float32)
        centred = tl.where(columns < N, values - mean, 0.0)
        squares += centred * centred
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) * inverse_n + eps)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        values = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            values += tl.load(residual + columns, mask=mask, other=0.0).to(tl.float32)
            rounded = values.to(total.dtype.element_ty)
            tl.store(total + columns, rounded, mask=mask)
            values = rounded.to(tl.float32)
        result = (values - mean) * rstd * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            result += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * N + columns, result.to(out.dtype.element_ty), mask=mask)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _backward_wide_kernel(
    grad_out, grad_sum, x, weight, mean, rstd, dx, inverse_n, N: tl.constexpr, BLOCK: tl.constexpr
):
    """dx of one row too wide to hold."""
    row = tl.program_id(0).to(tl.int64)
    row_mean = tl.load(mean + row)
    row_rstd = tl.load(rstd + row)
    projections = tl.zeros([BLOCK], tl.float32)
    averages = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        scaled = tl.load(grad_out + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        scaled *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        projections += scaled * (values - row_mean) * row_rstd
        averages += scaled
    projection = tl.sum(projections, 0) * inverse_n
    average = tl.sum(averages, 0) * inverse_n
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        scaled = tl.load(grad_out + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        scaled *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        result = row_rstd * (scaled - average - (values - row_mean) * row_rstd * projection)
        if grad_sum is not None:
            result += tl.load(grad_sum + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * N + columns, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _wide_column_kernel(
    grad_out, x, mean, rstd, partial_dweight, partial_dbias, rows, N: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The column sums of a wide backward pass: one tile of columns, every P-th tile of rows."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = row[:, None] * N + columns[None, :]
        mask = (row[:, None] < rows) & (columns[None, :] < N)
        gradient = tl.load(grad_out + offsets, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        dweight += gradient * (values - row_mean) * row_rstd
        dbias += gradient
    first = tl.program_id(1).to(tl.int64) * N
    tl.store(partial_dweight + first + columns, tl.sum(dweight, 0), mask=columns < N)
    tl.store(partial_dbias + first + columns, tl.sum(dbias, 0), mask=columns < N)


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
        x, residual, weight, bias, out, total, mean, rstd, 1.0 / N, eps, N=N, BLOCK=PIECE, num_warps=WARPS
    )


def backward_wide(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
) -> list[torch.Tensor]:
    """Fills dx; the parts (P, N) of dweight and dbias."""
    N, rows = x.shape[-1], mean.numel()
    _backward_wide_kernel[(rows,)](
        grad_out, grad_sum, x, weight, mean, rstd, dx, 1.0 / N, N=N, BLOCK=PIECE, num_warps=WARPS
    )
    column_tiles = ceil_div(N, COLUMNS)
    parts = min(ceil_div(rows, ROWS), ceil_div(PROGRAMS_A_MULTIPROCESSOR * multiprocessors(x), column_tiles))
    partial = [x.new_empty((parts, N), dtype=torch.float32) for _ in range(2)]  # each of them aligned
    _wide_column_kernel[(column_tiles, parts)](
        grad_out, x, mean, rstd, *partial, rows, N=N, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
    return partial
