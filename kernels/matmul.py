"""Tiled matrix multiplication, which the linear layers and the loss are built on.

    out = activation(multiplier * A B + bias)

Operands are row-major, or read as their transpose. The bias and the activation are applied to the float32 accumulator.
Programs walk the tiles of the output in groups of rows, so that a group's operands stay in the cache (Triton's matrix
multiplication tutorial). Where the output has few tiles and the inner dimension is long, as in a weight's gradient, the
inner dimension is split between programs: float32 parts, then one reduction in a fixed order, so the same bits every
time.

Only the last step along the inner dimension is masked: the others load whole vectors, whatever the size. Operands
whose rows start anywhere are copied to where rows are aligned first. float32 multiplies in IEEE float32, not TF32, and
each step's products are summed by themselves before they are added to the rest (blocked summation: Higham, Accuracy and
Stability of Numerical Algorithms, 4.2), so that rounding errors grow with the root of INNER + K / INNER and not of K.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from .activations import activate
from .configurations import configuration
from .launch import Schedule, ceil_div, gpu_family, multiprocessors, on_device, scheduled
from .tuning import choose, describe

# From the largest tile to the smallest.
SIZES = ("large", "medium", "small")
ROWS_TOGETHER = 8
# A part of a split inner dimension is at least this long, and there are at most so many.
SMALLEST_PART = 512
LARGEST_SPLIT = 32
SUM_BLOCK = 1024


@dataclass(frozen=True)
class MatrixTile(Schedule):
    """A tile of the output, the step along the inner dimension, and how Triton schedules it."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


CANDIDATES = [
    MatrixTile(rows, columns, inner, warps, stages)
    for rows in (16, 32, 64, 128)
    for columns in (32, 64, 128, 256)
    for inner in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]


@triton.jit
def grouped_tile(program, row_tiles, column_tiles, ROWS_TOGETHER: tl.constexpr):
    """(row tile, column tile) of a program: down ROWS_TOGETHER row tiles, then on to the next column."""
    in_group = ROWS_TOGETHER * column_tiles
    group = program // in_group
    first = group * ROWS_TOGETHER
    height = tl.minimum(row_tiles - first, ROWS_TOGETHER)
    within = program - group * in_group
    return first + within % height, within // height


@triton.jit
def unseen_zero(count):
    """0.0, whatever the count. The compiler must not know: it turns x + dot(a, b, 0) into dot(a, b, x)."""
    return tl.minimum(count, 0).to(tl.float32)


@triton.jit
def add_product(accumulator, a, b, zero, PRECISION: tl.constexpr):
    """accumulator + a b; in float32 the products are summed first, from `zero` on."""
    if PRECISION == "ieee":
        return accumulator + tl.dot(a, b, tl.full(accumulator.shape, zero, tl.float32), input_precision=PRECISION)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def multiply(
    a, b, first_row, first_column, rows, columns, start, end, a_stride, b_stride, A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLUMNS) tile of A B over the inner indices start .. end - 1, in float32.

    A (rows, inner) is stored row by row with a_stride between rows, or if A_TRANSPOSED as (inner, rows); B (inner,
    columns) likewise. Along a contiguous output dimension loads are masked by the stride, not by the size: rows and
    columns past the end are garbage.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    if A_TRANSPOSED:
        a_pointers = a + tl.cast(start, tl.int64) * a_stride + first_row + (inner[None, :] * a_stride + row[:, None])
        a_mask = first_row + row < a_stride
        a_step = INNER * a_stride
    else:
        a_pointers = a + tl.cast(first_row, tl.int64) * a_stride + start + (row[:, None] * a_stride + inner[None, :])
        a_mask = first_row + row < rows
        a_step = INNER
    if B_TRANSPOSED:
        b_pointers = (
            b + tl.cast(first_column, tl.int64) * b_stride + start + (column[None, :] * b_stride + inner[:, None])
        )
        b_mask = first_column + column < columns
        b_step = INNER
    else:
        b_pointers = (
            b + tl.cast(start, tl.int64) * b_stride + first_column + (inner[:, None] * b_stride + column[None, :])
        )
        b_mask = first_column + column < b_stride
        b_step = INNER * b_stride

    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    zero = unseen_zero(rows)
    whole = tl.maximum(end - start, 0) // INNER
    for _ in range(0, whole):
        a_tile = tl.load(a_pointers, mask=a_mask[:, None], other=0.0)
        b_tile = tl.load(b_pointers, mask=b_mask[None, :], other=0.0)
        accumulator = add_product(accumulator, a_tile, b_tile, zero, PRECISION)
        a_pointers += a_step
        b_pointers += b_step
    left = end - start - whole * INNER
    if left > 0:
        a_tile = tl.load(a_pointers, mask=a_mask[:, None] & (inner[None, :] < left), other=0.0)
        b_tile = tl.load(b_pointers, mask=b_mask[None, :] & (inner[:, None] < left), other=0.0)
        accumulator = add_product(accumulator, a_tile, b_tile, zero, PRECISION)
    return accumulator


@triton.jit(do_not_specialize=["rows", "columns", "inner", "part_steps"])
def _multiply_kernel(
    a, b, bias, multiplier, out, preactivation, rows, columns, inner, part_steps, a_stride, b_stride, out_stride,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, ROWS_TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out = activation(multiplier * A B + bias), over one part of the inner dimension; parts go to
    consecutive matrices.
    """
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), ROWS_TOGETHER
    )
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    part = tl.program_id(1)
    # A multiple of INNER that the compiler can see, so that loads from there on stay aligned.
    start = part * part_steps * INNER
    end = tl.minimum(start + part_steps * INNER, inner)
    result = multiply(
        a, b, first_row, first_column, rows, columns, start, end, a_stride, b_stride, A_TRANSPOSED, B_TRANSPOSED,
        ROWS, COLUMNS, INNER, PRECISION,
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    # The padding between columns and out_stride, where there is any, is written too.
    mask = (first_row + row[:, None] < rows) & (first_column + column[None, :] < out_stride)
    tile = (part.to(tl.int64) * rows + first_row) * out_stride + first_column
    offsets = row[:, None] * out_stride + column[None, :]
    if multiplier is not None:
        result *= tl.load(multiplier)
    if bias is not None:
        bias_row = tl.load(bias + first_column + column, mask=first_column + column < columns, other=0.0)
        result += bias_row.to(tl.float32)[None, :]
    if preactivation is not None:
        tl.store(preactivation + tile + offsets, result.to(preactivation.dtype.element_ty), mask=mask)
    result = activate(result, ACTIVATION)
    if ACCUMULATE:
        result += tl.load(out + tile + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + tile + offsets, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "parts"])
def _sum_parts_kernel(partial, multiplier, out, count, parts, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """out = multiplier * (sum of the parts), element by element, first part first."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        total += tl.load(partial + tl.cast(part, tl.int64) * count + offsets, mask=mask, other=0.0)
    if multiplier is not None:
        total *= tl.load(multiplier)
    if ACCUMULATE:
        total += tl.load(out + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launching


def precision(tensor: torch.Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # says nothing for half precision


def aligned_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself where its rows are whole vectors apart (the ordinary case), else one whose rows are longer."""
    return pad(matrix, (0, -matrix.shape[1] % 16)) if matrix.stride(0) % 16 else matrix


def choose_size(a: torch.Tensor, rows: int, columns: int, split: bool, kernel: str = "matrix_multiply") -> str:
    """The largest tile that is filled at least halfway down and, unless the inner dimension can be split, occupies
    the whole GPU. The number of rows chooses among these three and nothing else, so that it compiles nothing further.
    """
    tiles = _tiles(kernel, gpu_family(a), a.element_size())
    for size in SIZES[:-1]:
        programs = ceil_div(rows, tiles[size].rows) * ceil_div(columns, tiles[size].columns)
        if 2 * rows > tiles[size].rows and (split or programs >= multiprocessors(a)):
            return size
    return "small" if rows <= tiles["small"].rows else "medium"


@cache
def _tiles(kernel: str, family: str, element_bytes: int) -> dict[str, MatrixTile]:
    key = {"element_bytes": element_bytes}
    return {size: configuration(kernel, MatrixTile, family, **key, size=size) for size in SIZES}


def multiply_matrices(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    rows: int,
    columns: int,
    inner: int,
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
    bias: torch.Tensor | None = None,
    activation: str = "",
    preactivation: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    accumulate: bool = False,
    split: bool = False,
) -> None:
    """out (rows, columns) = activation(multiplier * A B + bias), added to out if accumulate.

    a holds A row by row, or (inner, rows) if a_transposed; b likewise. The row strides are the tensors' own. With
    `split` (then without bias and activation, and out contiguous) the inner dimension may be shared between programs.
    """
    if rows == 0 or columns == 0:
        return
    a, b = aligned_rows(a), aligned_rows(b)
    size = choose_size(a, rows, columns, split)

    def launch(tile: MatrixTile) -> None:
        programs = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
        parts = max(1, min(2 * multiprocessors(a) // programs, inner // SMALLEST_PART, LARGEST_SPLIT)) if split else 1
        part_steps = ceil_div(ceil_div(inner, parts), tile.inner)
        target, target_multiplier, target_accumulate = out, multiplier, accumulate
        if parts > 1:
            target = torch.empty((parts, rows, columns), dtype=torch.float32, device=a.device)
            target_multiplier, target_accumulate = None, False
        with on_device(a):
            _multiply_kernel[(programs, parts)](
                a, b, bias, target_multiplier, target, preactivation, rows, columns, inner, part_steps, a.stride(0),
                b.stride(0), target.stride(-2), A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed,
                ACTIVATION=activation, ACCUMULATE=target_accumulate, ROWS=tile.rows, COLUMNS=tile.columns,
                INNER=tile.inner, ROWS_TOGETHER=ROWS_TOGETHER, PRECISION=precision(a), **scheduled(tile),
            )  # fmt: skip
            if parts > 1:
                sum_parts(target, multiplier, out, accumulate)

    if accumulate:  # a search would add to out again and again
        launch(_tiles("matrix_multiply", gpu_family(a), a.element_size())[size])
    else:
        launch(choose("matrix_multiply", MatrixTile, a, CANDIDATES, launch, element_bytes=a.element_size(), size=size))


def sum_parts(partial: torch.Tensor, multiplier: torch.Tensor | None, out: torch.Tensor, accumulate: bool) -> None:
    """out = multiplier * partial.sum(0), or added to out if accumulate; partial (parts, ...) and float32."""
    _sum_parts_kernel[(ceil_div(out.numel(), SUM_BLOCK),)](
        partial, multiplier, out, out.numel(), partial.shape[0], ACCUMULATE=accumulate, BLOCK=SUM_BLOCK, num_warps=4
    )


def describe_multiply(a: torch.Tensor, rows: int, columns: int) -> str:
    """The configuration that `multiply_matrices` takes without a split."""
    size = choose_size(a, rows, columns, False)
    return describe("matrix_multiply", MatrixTile, a, element_bytes=a.element_size(), size=size)
