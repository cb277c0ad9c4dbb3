"""What LayerNorm and RMSNorm share: tiles of rows, the residual addition before a norm, and the sums over rows.

A program holds whole rows in registers, several where they are narrow; rows wider than LARGEST_BLOCK are read in
pieces. The gradients of weight and bias are sums over all rows, in two stages: a fixed number of programs, each
walking every P-th tile of rows with its own float32 partial sums, then one small reduction over the programs; no
atomics, so the same bits every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Schedule, ceil_div, multiprocessors, next_power_of_2

# The widest row that a program holds at once, and the piece of a wider one.
LARGEST_BLOCK = 8192
PIECE = 4096
PIECE_WARPS = 8
# The tile of the column sums, and how many programs share wide rows, for each multiprocessor.
ROWS, COLUMNS = 32, 64
PROGRAMS_A_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class RowsTile(Schedule):
    """Rows a program holds, and its warps."""

    rows: int
    warps: int


@dataclass(frozen=True)
class PersistentRowsTile(Schedule):
    """Rows a program holds at a time, its warps, and how many programs walk the rows, for each multiprocessor."""

    rows: int
    warps: int
    programs: int = 2


FORWARD_CANDIDATES = [RowsTile(rows, warps) for rows in (1, 2, 4, 8, 16, 32) for warps in (2, 4, 8, 16)]
BACKWARD_CANDIDATES = [
    PersistentRowsTile(rows, warps, programs)
    for rows in (1, 2, 4, 8, 16, 32)
    for warps in (4, 8, 16)
    for programs in (1, 2, 4)
]


@triton.jit
def load_float(x, offsets, mask):
    """x in float32, 0 where it is masked."""
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_sum(x, residual, total, offsets, mask):
    """What is normalised, in float32: x, or x + residual. The sum is rounded to x's dtype first, and stored in total
    where there is one.
    """
    values = load_float(x, offsets, mask)
    if residual is not None:
        rounded = (values + load_float(residual, offsets, mask)).to(x.dtype.element_ty)
        if total is not None:
            tl.store(total + offsets, rounded, mask=mask)
        values = rounded.to(tl.float32)
    return values


@triton.jit(do_not_specialize=["rows"])
def _wide_column_kernel(
    grad_out, x, mean, rstd, partial_dweight, partial_dbias, rows, N: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first stage for wide rows: one tile of columns, every P-th tile of rows. RMSNorm has no mean and no bias."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = row[:, None] * N + columns[None, :]
        mask = (row[:, None] < rows) & (columns[None, :] < N)
        gradient = load_float(grad_out, offsets, mask)
        values = load_float(x, offsets, mask)
        if mean is not None:
            values -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            dbias += gradient
        dweight += gradient * values * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    first = tl.program_id(1).to(tl.int64) * N
    tl.store(partial_dweight + first + columns, tl.sum(dweight, 0), mask=columns < N)
    if mean is not None:
        tl.store(partial_dbias + first + columns, tl.sum(dbias, 0), mask=columns < N)


@triton.jit(do_not_specialize=["parts"])
def _reduce_kernel(
    partial_dweight, partial_dbias, dweight, dbias, parts, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The second stage: one tile of columns, summed over the programs of the first."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        offsets = part[:, None] * N + columns[None, :]
        mask = (part[:, None] < parts) & (columns[None, :] < N)
        weight_sum += tl.load(partial_dweight + offsets, mask=mask, other=0.0)
        if dbias is not None:
            bias_sum += tl.load(partial_dbias + offsets, mask=mask, other=0.0)
    tl.store(dweight + columns, tl.sum(weight_sum, 0).to(dweight.dtype.element_ty), mask=columns < N)
    if dbias is not None:
        tl.store(dbias + columns, tl.sum(bias_sum, 0).to(dbias.dtype.element_ty), mask=columns < N)


# ------------------------------------------------------------------------------------------------------------ launching


def rows_key(N: int) -> dict[str, int]:
    """What a configuration is found under: the columns rounded up, narrow ones together."""
    return {"columns": max(64, next_power_of_2(N))}


def block_of(N: int) -> int:
    """The columns of a tile that holds rows of N."""
    return max(16, next_power_of_2(N))


def partial_sums(like: torch.Tensor, parts: int) -> torch.Tensor:
    """Where `parts` programs put their sums over rows."""
    return like.new_empty((parts, like.shape[-1]), dtype=torch.float32)


def wide_columns(
    grad_out: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The partial sums of dweight, and with a mean of dbias, for rows too wide to hold."""
    rows, column_tiles = rstd.numel(), ceil_div(x.shape[-1], COLUMNS)
    parts = min(ceil_div(rows, ROWS), ceil_div(PROGRAMS_A_MULTIPROCESSOR * multiprocessors(x), column_tiles))
    partial_dweight = partial_sums(x, parts)
    partial_dbias = None if mean is None else partial_sums(x, parts)
    _wide_column_kernel[(column_tiles, parts)](
        grad_out, x, mean, rstd, partial_dweight, partial_dbias, rows,
        N=x.shape[-1], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return partial_dweight, partial_dbias


def reduce_parts(
    partial_dweight: torch.Tensor, partial_dbias: torch.Tensor | None, dweight: torch.Tensor, dbias: torch.Tensor | None
) -> None:
    """Fills dweight, and dbias where there is one, from the partial sums."""
    parts, N = partial_dweight.shape
    _reduce_kernel[(ceil_div(N, COLUMNS),)](
        partial_dweight, partial_dbias, dweight, dbias, parts, N=N, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
