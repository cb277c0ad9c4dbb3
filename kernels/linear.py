"""Linear layers, x W^T + b, with GELU in the epilogue; and the tiled matrix multiplication that the loss kernels
build on too.

    pre = x W^T + b          out = activation(pre)
    dpre = dout * activation'(pre)
    dx = dpre W              dW = dpre^T x          db = sum over rows of dpre

One kernel multiplies all three: operands are row-major, or read as their transpose. The bias and the activation are
applied to the float32 accumulator. Programs walk the tiles of the output in groups of rows, so that a group's
operands stay in the cache (Triton's matrix multiplication tutorial). Where the output has few tiles and the inner
dimension is long, as in dW, the inner dimension is split between programs: float32 parts, then one reduction in a
fixed order, so the same bits every time.

Only the last step along the inner dimension is masked: the others load whole vectors, whatever the size. float32
multiplies in IEEE float32, not TF32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .gelu import gelu_backward, gelu_derivative_of, gelu_of
from .launch import ceil_div, multiprocessors, on_device


@dataclass(frozen=True)
class Tile:
    """A tile of the output, the step along the inner dimension, and how Triton schedules it."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# Keyed by bytes an element; from the largest tile to the smallest. The first that is not mostly empty and gives every
# multiprocessor work is taken: the number of rows chooses among these, and whether parts are summed, and nothing else.
TILES = {
    2: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 32, 128, 4, 4)),
    4: (Tile(64, 64, 16, 8, 3), Tile(32, 32, 32, 4, 3), Tile(16, 16, 64, 4, 3)),
}
ROWS_TOGETHER = 8
# A part of a split inner dimension is at least this long, and there are at most so many.
SMALLEST_PART = 512
LARGEST_SPLIT = 32
# The bias gradient: tile of rows and columns.
BIAS_ROWS, BIAS_COLUMNS = 32, 64
SUM_BLOCK = 1024


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
    whole = tl.maximum(end - start, 0) // INNER
    for _ in range(0, whole):
        a_tile = tl.load(a_pointers, mask=a_mask[:, None], other=0.0)
        b_tile = tl.load(b_pointers, mask=b_mask[None, :], other=0.0)
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision=PRECISION)
        a_pointers += a_step
        b_pointers += b_step
    left = end - start - whole * INNER
    if left > 0:
        a_tile = tl.load(a_pointers, mask=a_mask[:, None] & (inner[None, :] < left), other=0.0)
        b_tile = tl.load(b_pointers, mask=b_mask[None, :] & (inner[:, None] < left), other=0.0)
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision=PRECISION)
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
        a,
        b,
        first_row,
        first_column,
        rows,
        columns,
        start,
        end,
        a_stride,
        b_stride,
        A_TRANSPOSED,
        B_TRANSPOSED,
        ROWS,
        COLUMNS,
        INNER,
        PRECISION,
    )
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
    if ACTIVATION != "":
        if preactivation is not None:
            tl.store(preactivation + tile + offsets, result.to(preactivation.dtype.element_ty), mask=mask)
        result = gelu_of(result, ACTIVATION == "gelu_tanh")
    elif preactivation is not None:
        tl.store(preactivation + tile + offsets, result.to(preactivation.dtype.element_ty), mask=mask)
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


@triton.jit(do_not_specialize=["rows"])
def _bias_gradient_kernel(
    grad_out,
    preactivation,
    grad_preactivation,
    partial,
    rows,
    N,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Column sums of every P-th tile of rows (P programs along the rows); with an activation, its gradient on the
    way.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = row[:, None] * N + columns[None, :]
        mask = (row[:, None] < rows) & (columns[None, :] < N)
        gradient = tl.load(grad_out + offsets, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            values = tl.load(preactivation + offsets, mask=mask, other=0.0).to(tl.float32)
            gradient *= gelu_derivative_of(values, ACTIVATION == "gelu_tanh")
            tl.store(grad_preactivation + offsets, gradient.to(grad_preactivation.dtype.element_ty), mask=mask)
        sums += gradient
    tl.store(partial + tl.program_id(1).to(tl.int64) * N + columns, tl.sum(sums, 0), mask=columns < N)


# ------------------------------------------------------------------------------------------------------------ launching


def precision(tensor: torch.Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # says nothing for half precision


def choose_tile(a: torch.Tensor, rows: int, columns: int, split: bool) -> Tile:
    """The largest tile that is filled at least halfway down and, unless the inner dimension can be split, occupies
    the whole GPU.
    """
    tiles = TILES[a.element_size()]
    for tile in tiles[:-1]:
        programs = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
        if 2 * rows > tile.rows and (split or programs >= multiprocessors(a)):
            return tile
    return tiles[-1] if rows <= tiles[-1].rows else tiles[-2]


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
    tile = choose_tile(a, rows, columns, split)
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
            INNER=tile.inner, ROWS_TOGETHER=ROWS_TOGETHER, PRECISION=precision(a), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        if parts > 1:
            _sum_parts_kernel[(ceil_div(rows * columns, SUM_BLOCK),)](
                target, multiplier, out, rows * columns, parts, ACCUMULATE=accumulate, BLOCK=SUM_BLOCK, num_warps=4
            )


def _check_activation(activation: str) -> None:
    if activation not in ("", "gelu_tanh", "gelu"):
        raise ValueError(f'linear: activation must be "", "gelu_tanh" or "gelu", not {activation!r}')


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, save_preactivation: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K), weight (N, K) -> activation(x W^T + b) (..., N), and x W^T + b if it is to be saved, else an empty
    tensor.
    """
    _check_activation(activation)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    columns, inner = weight.shape
    out = x.new_empty((*x.shape[:-1], columns))
    preactivation = torch.empty_like(out) if save_preactivation else x.new_empty(0)
    rows = x.shape[:-1].numel()
    multiply_matrices(
        x.view(rows, inner), weight, out.view(rows, columns), rows, columns, inner, b_transposed=True, bias=bias,
        activation=activation, preactivation=preactivation if save_preactivation else None,
    )  # fmt: skip
    return out, preactivation


def _activation_and_bias_gradient(
    grad_out: torch.Tensor, preactivation: torch.Tensor, activation: str, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dpre, dbias) in one pass over grad_out (rows, columns)."""
    grad_preactivation = torch.empty_like(grad_out) if activation else None
    dbias = grad_out.new_empty(columns)
    if grad_out.numel() == 0:
        return grad_out, dbias.zero_()
    column_tiles = ceil_div(columns, BIAS_COLUMNS)
    parts = min(ceil_div(rows, BIAS_ROWS), ceil_div(4 * multiprocessors(grad_out), column_tiles))
    partial = torch.empty((parts, columns), dtype=torch.float32, device=grad_out.device)
    with on_device(grad_out):
        _bias_gradient_kernel[(column_tiles, parts)](
            grad_out, preactivation if activation else None, grad_preactivation, partial, rows, columns,
            ACTIVATION=activation, ROWS=BIAS_ROWS, COLUMNS=BIAS_COLUMNS, num_warps=4,
        )  # fmt: skip
        _sum_parts_kernel[(ceil_div(columns, SUM_BLOCK),)](
            partial, None, dbias, columns, parts, ACCUMULATE=False, BLOCK=SUM_BLOCK, num_warps=4
        )
    return grad_out if grad_preactivation is None else grad_preactivation, dbias


def linear_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    preactivation: torch.Tensor,
    activation: str,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias; those not needed are empty."""
    _check_activation(activation)
    x, weight = x.contiguous(), weight.contiguous()
    columns, inner = weight.shape
    rows = x.shape[:-1].numel()
    gradient = grad_out.contiguous().view(rows, columns)
    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_dbias:
        gradient, dbias = _activation_and_bias_gradient(gradient, preactivation.contiguous(), activation, rows, columns)
    elif activation:
        gradient = gelu_backward(
            gradient, preactivation.view(rows, columns), "tanh" if activation == "gelu_tanh" else "none"
        )
    if need_dx:
        dx = torch.empty_like(x)
        multiply_matrices(gradient, weight, dx.view(rows, inner), rows, inner, columns, split=True)
    if need_dweight:
        dweight = torch.empty_like(weight)
        multiply_matrices(gradient, x.view(rows, inner), dweight, columns, inner, rows, a_transposed=True, split=True)
    return dx, dweight, dbias
