"""Linear layers on weights of 8 and 4 bits: the weights are read as integers, and the products are in the dtype of x.

    int8   out = activation(scale[n] * sum over k of values[n, k] x[k] + b)          one float32 scale a row
    int4   out = activation(sum over k of (nibble[n, k] - 8) scale[n, k // 32] x[k] + b)   a bfloat16 one for each 32
    q8_0   out = activation(sum over k of values[n, k] scale[n, k // 32] x[k] + b)         a float16 one for each 32
    q4_1   out = activation(sum over k of (nibble[n, k] scale[n, k // 32] + minimum[n, k // 32]) x[k] + b)
    q4_k   the same, with a code of 8 bits for each scale and minimum, in units that 8 groups share

The formats are those of `llmfast/quantization/encodings.py`: int8 values (N, K), or uint8 values (N, 16 G) with scales
(N, G), G = ceil(K / 32), byte j of a row holding element 2j in its low nibble and 2j + 1 in its high one.

With few rows of x, as in decoding, reading the weights is all the time there is. So a program takes a few rows of the
weights and all rows of x, and multiplies out^T = W x^T: integers are converted in registers, and the matrix
instructions of Hopper take only their first operand from there. An int8 is exact in bfloat16 and float16, and its
scale waits for the float32 sum; where each group has its own, an integer is multiplied by it, and rounded to x's dtype.
The nibbles of a byte belong to neighbouring elements of x. It is x that is taken apart into even and odd elements, not
the weights that are put in order: there is much less of it.

Where the output has few tiles and K is long, K is split between programs: float32 parts, then one reduction in a fixed
order, so the same bits every time. With many rows of x (a prompt) larger tiles make this an ordinary matrix product.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from .activations import activate, check_activation
from .configurations import configuration
from .launch import ceil_div, gpu_family, multiprocessors, on_device, scheduled
from .matmul import CANDIDATES, MatrixTile, add_product, grouped_tile, precision, unseen_zero
from .tuning import choose
from .tuning import describe as describe_tile

GROUP_SIZE = 32  # elements of a row that share a scale
BLOCK_GROUPS = 8  # groups whose codes share a unit
# From many rows of x to few.
SIZES = ("large", "medium", "small")
ROWS_TOGETHER = 8
# A part of a split K is at least this long, and there are at most so many.
SMALLEST_PART = 512
LARGEST_SPLIT = 16
# The tile of the output that one program of the reduction makes.
SUM_ROWS, SUM_COLUMNS = 4, 256


@triton.jit
def _finish(result, scale, bias, first_column, column, columns, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(scale * result + bias) of a tile (COLUMNS, rows); the scales of groups are in the result already."""
    mask = first_column + column < columns
    if not GROUPED:
        result *= tl.load(scale + first_column + column, mask=mask, other=0.0)[:, None]
    if bias is not None:
        result += tl.load(bias + first_column + column, mask=mask, other=0.0).to(tl.float32)[:, None]
    return activate(result, ACTIVATION)


@triton.jit
def _of_groups(
    numbers, codes, first_column, column, groups, first_group, group, mask, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    """The scales or minima of a step's groups in float32, each of them EACH times: (COLUMNS, GROUPS * EACH).

    `numbers` has one for each group; with `codes` one for BLOCK groups, and the codes of each.
    """
    COLUMNS: tl.constexpr = column.shape[0]
    GROUPS: tl.constexpr = group.shape[0]
    at = first_group + group[None, :]
    if codes is None:
        pointers = numbers + tl.cast(first_column, tl.int64) * groups + (column[:, None] * groups + at)
        found = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        units = tl.cdiv(groups, BLOCK)
        pointers = numbers + tl.cast(first_column, tl.int64) * units + (column[:, None] * units + at // BLOCK)
        code_pointers = codes + tl.cast(first_column, tl.int64) * groups + (column[:, None] * groups + at)
        found = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        found *= tl.load(code_pointers, mask=mask, other=0).to(tl.float32)
    found = tl.broadcast_to(found[:, :, None], [COLUMNS, GROUPS, EACH])
    return tl.reshape(found, [COLUMNS, GROUPS * EACH])


@triton.jit
def _multiply_bytes(
    accumulator, zero, x_pointers, values_pointers, scale, x_mask, column_mask, first_column, column, groups,
    first_group, group, inner, left, GROUPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one step along K: (COLUMNS, INNER) int8 times (INNER, ROWS)."""
    EACH: tl.constexpr = inner.shape[0] // group.shape[0]
    values_mask = column_mask
    group_mask = column_mask
    if MASKED:
        x_mask = x_mask & (inner[None, :] < left)
        values_mask = column_mask & (inner[None, :] < left)
        group_mask = column_mask & (group[None, :] * EACH < left)
    x_tile = tl.load(x_pointers, mask=x_mask, other=0.0)
    values_tile = tl.load(values_pointers, mask=values_mask, other=0)
    if GROUPED:
        of_values = _of_groups(scale, None, first_column, column, groups, first_group, group, group_mask, EACH, 1)
        values_tile = values_tile.to(tl.float32) * of_values
    return add_product(accumulator, values_tile.to(x_tile.dtype), tl.trans(x_tile), zero, PRECISION)


@triton.jit
def _multiply_nibbles(
    accumulator, zero, x_pointers, values_pointers, scale, minimum, scale_code, minimum_code, x_mask, column_mask,
    first_column, column, groups, first_group, group, inner, pair, left, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one step along K: (COLUMNS, INNER / 2) bytes times (INNER, ROWS)."""
    ROWS: tl.constexpr = x_pointers.shape[0]
    PAIRS: tl.constexpr = pair.shape[0]
    EACH: tl.constexpr = PAIRS // group.shape[0]
    values_mask = column_mask
    group_mask = column_mask
    if MASKED:
        x_mask = x_mask & (inner[None, :] < left)
        values_mask = column_mask & (2 * pair[None, :] < left)
        group_mask = column_mask & (group[None, :] * (2 * EACH) < left)
    x_tile = tl.load(x_pointers, mask=x_mask, other=0.0)
    even, odd = tl.split(tl.reshape(x_tile, [ROWS, PAIRS, 2]))
    bytes_tile = tl.load(values_pointers, mask=values_mask, other=0)
    low = (bytes_tile & 15).to(tl.float32)
    high = (bytes_tile >> 4).to(tl.float32)
    of_values = _of_groups(scale, scale_code, first_column, column, groups, first_group, group, group_mask, EACH, BLOCK)
    if minimum is None:
        low = (low - 8.0) * of_values
        high = (high - 8.0) * of_values
    else:
        least = _of_groups(
            minimum, minimum_code, first_column, column, groups, first_group, group, group_mask, EACH, BLOCK
        )
        low = low * of_values + least
        high = high * of_values + least
    accumulator = add_product(accumulator, low.to(x_tile.dtype), tl.trans(even), zero, PRECISION)
    return add_product(accumulator, high.to(x_tile.dtype), tl.trans(odd), zero, PRECISION)


@triton.jit(do_not_specialize=["rows", "part_steps"])
def _quantized_linear_kernel(
    x, values, scale, minimum, scale_code, minimum_code, bias, out, rows, columns, inner_size, part_steps,
    BITS: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    IN_PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    ROWS_TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the output, over one part of K; parts go to consecutive matrices as they are."""
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), ROWS_TOGETHER
    )
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    part = tl.program_id(1)
    # A multiple of INNER that the compiler can see, so that loads from there on stay aligned.
    start = part * part_steps * INNER
    end = tl.minimum(start + part_steps * INNER, inner_size)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    row_mask = first_row + row[:, None] < rows
    column_mask = first_column + column[:, None] < columns

    x_pointers = x + tl.cast(first_row, tl.int64) * inner_size + start + (row[:, None] * inner_size + inner[None, :])
    accumulator = tl.zeros([COLUMNS, ROWS], tl.float32)
    zero = unseen_zero(rows)
    steps = tl.maximum(end - start, 0) // INNER
    left = end - start - steps * INNER
    groups = tl.cdiv(inner_size, GROUP)
    group = tl.arange(0, INNER // GROUP)
    first_group = start // GROUP
    if BITS == 8:
        values_pointers = values + tl.cast(first_column, tl.int64) * inner_size + start
        values_pointers = values_pointers + (column[:, None] * inner_size + inner[None, :])
        for _ in range(0, steps):
            accumulator = _multiply_bytes(
                accumulator, zero, x_pointers, values_pointers, scale, row_mask, column_mask, first_column, column,
                groups, first_group, group, inner, left, GROUPED, False, PRECISION,
            )  # fmt: skip
            x_pointers += INNER
            values_pointers += INNER
            first_group += INNER // GROUP
        if left > 0:
            accumulator = _multiply_bytes(
                accumulator, zero, x_pointers, values_pointers, scale, row_mask, column_mask, first_column, column,
                groups, first_group, group, inner, left, GROUPED, True, PRECISION,
            )  # fmt: skip
    else:
        pair = tl.arange(0, INNER // 2)
        values_pointers = values + tl.cast(first_column, tl.int64) * (groups * (GROUP // 2)) + start // 2
        values_pointers = values_pointers + (column[:, None] * (groups * (GROUP // 2)) + pair[None, :])
        for _ in range(0, steps):
            accumulator = _multiply_nibbles(
                accumulator, zero, x_pointers, values_pointers, scale, minimum, scale_code, minimum_code, row_mask,
                column_mask, first_column, column, groups, first_group, group, inner, pair, left, False, BLOCK,
                PRECISION,
            )  # fmt: skip
            x_pointers += INNER
            values_pointers += INNER // 2
            first_group += INNER // GROUP
        if left > 0:
            accumulator = _multiply_nibbles(
                accumulator, zero, x_pointers, values_pointers, scale, minimum, scale_code, minimum_code, row_mask,
                column_mask, first_column, column, groups, first_group, group, inner, pair, left, True, BLOCK,
                PRECISION,
            )  # fmt: skip
    if not IN_PARTS:
        accumulator = _finish(accumulator, scale, bias, first_column, column, columns, GROUPED, ACTIVATION)
    tile = out + (part.to(tl.int64) * rows + first_row) * columns + first_column
    tl.store(
        tile + row[None, :] * columns + column[:, None],
        accumulator.to(out.dtype.element_ty),
        mask=(first_row + row[None, :] < rows) & column_mask,
    )


@triton.jit(do_not_specialize=["rows", "parts"])
def _sum_parts_kernel(
    partial, scale, bias, out, rows, columns, parts, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of out = activation(scale * (sum of the parts, first part first) + bias)."""
    first_column = tl.program_id(0) * COLUMNS
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row[None, :] < rows) & (first_column + column[:, None] < columns)
    offsets = row[None, :] * columns + first_column + column[:, None]
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for part in range(0, parts):
        total += tl.load(partial + tl.cast(part, tl.int64) * rows * columns + offsets, mask=mask, other=0.0)
    total = _finish(total, scale, bias, first_column, column, columns, GROUPED, ACTIVATION)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launching


def choose_size(x: torch.Tensor, bits: int, rows: int) -> str:
    """The smallest tile that holds all rows of x, or the largest there is."""
    tiles = _tiles(gpu_family(x), bits, x.element_size())
    return next((size for size in reversed(SIZES) if rows <= tiles[size].rows), SIZES[0])


@cache
def _tiles(family: str, bits: int, element_bytes: int) -> dict[str, MatrixTile]:
    key: dict[str, int | str] = {"bits": bits, "element_bytes": element_bytes}
    return {size: configuration("quantized_linear", MatrixTile, family, **key, size=size) for size in SIZES}


def _bits(values: torch.Tensor) -> int:
    return 8 if values.dtype == torch.int8 else 4


def quantized_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    minimum: torch.Tensor | None = None,
    scale_code: torch.Tensor | None = None,
    minimum_code: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., K), the parts of a weight (N, K) (see above) -> activation(x W^T + b) (..., N)."""
    check_activation("quantized_linear", activation)
    x, values, scale = x.contiguous(), values.contiguous(), scale.contiguous()
    bias, minimum, scale_code, minimum_code = (
        None if part is None else part.contiguous() for part in (bias, minimum, scale_code, minimum_code)
    )
    columns, inner = values.shape[0], x.shape[-1]
    rows = x.shape[:-1].numel()
    out = x.new_empty((*x.shape[:-1], columns))
    if out.numel() == 0:
        return out
    bits, grouped = _bits(values), scale.ndim == 2

    def launch(tile: MatrixTile) -> None:
        programs = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
        parts = max(1, min(2 * multiprocessors(x) // programs, inner // SMALLEST_PART, LARGEST_SPLIT))
        part_steps = ceil_div(ceil_div(inner, parts), tile.inner)
        target = out if parts == 1 else torch.empty((parts, rows, columns), dtype=torch.float32, device=x.device)
        with on_device(x):
            _quantized_linear_kernel[(programs, parts)](
                x, values, scale, minimum, scale_code, minimum_code, bias, target, rows, columns, inner, part_steps,
                BITS=bits, GROUPED=grouped, GROUP=GROUP_SIZE, BLOCK=BLOCK_GROUPS, ACTIVATION=activation,
                IN_PARTS=parts > 1, ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner,
                ROWS_TOGETHER=ROWS_TOGETHER, PRECISION=precision(x), **scheduled(tile),
            )  # fmt: skip
            if parts > 1:
                _sum_parts_kernel[(ceil_div(columns, SUM_COLUMNS), ceil_div(rows, SUM_ROWS))](
                    target, scale, bias, out, rows, columns, parts, GROUPED=grouped, ACTIVATION=activation,
                    ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4,
                )  # fmt: skip

    launch(choose("quantized_linear", MatrixTile, x, CANDIDATES, launch, **_key(x, values, rows)))
    return out


def _key(x: torch.Tensor, values: torch.Tensor, rows: int) -> dict[str, int | str]:
    bits = _bits(values)
    return {"bits": bits, "element_bytes": x.element_size(), "size": choose_size(x, bits, rows)}


def describe(x: torch.Tensor, values: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `quantized_linear` takes for these tensors."""
    return describe_tile("quantized_linear", MatrixTile, x, **_key(x, values, x.shape[:-1].numel()))
