"""The gated product of a Llama's feed-forward layer (Shazeer, arXiv:2002.05202): two products and what joins them.

    gate = x Wg^T + bg        up = x Wu^T + bu        out = activation(gate) * up
    dgate = dout * up * activation'(gate)             dup = dout * activation(gate)
    dx = dgate Wg + dup Wu    dWg = dgate^T x         dWu = dup^T x         dbg, dbu = sums over rows of dgate, dup

A program makes one tile of both products, from tiles of x that it reads once, and joins them in float32. The products
of the backward pass are matmul.py's; dgate and dup, and the float32 parts of the biases' gradients, share one pass.
"""

import torch
import triton
import triton.language as tl

from .activations import activate, check_activation, derivative
from .launch import ceil_div, multiprocessors, on_device, scheduled
from .matmul import (
    CANDIDATES,
    ROWS_TOGETHER,
    MatrixTile,
    add_product,
    aligned_rows,
    choose_size,
    grouped_tile,
    multiply_matrices,
    precision,
    sum_parts,
    unseen_zero,
)
from .tuning import choose
from .tuning import describe as describe_tile

# The tile of the pass over dout.
GRADIENT_ROWS, GRADIENT_COLUMNS = 32, 64


@triton.jit
def _multiply_both(
    x, gate_weight, up_weight, first_row, first_column, rows, columns, inner_size, x_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLUMNS) tile of x Wg^T and of x Wu^T, in float32. Along the inner dimension only the last step is
    masked.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    x += tl.cast(first_row, tl.int64) * x_stride + (row[:, None] * x_stride + inner[None, :])
    weight_offsets = tl.cast(first_column, tl.int64) * weight_stride + (
        column[None, :] * weight_stride + inner[:, None]
    )
    gate_weight += weight_offsets
    up_weight += weight_offsets
    x_mask = first_row + row[:, None] < rows
    weight_mask = first_column + column[None, :] < columns
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    zero = unseen_zero(rows)
    whole = inner_size // INNER
    for _ in range(0, whole):
        x_tile = tl.load(x, mask=x_mask, other=0.0)
        gate_tile = tl.load(gate_weight, mask=weight_mask, other=0.0)
        up_tile = tl.load(up_weight, mask=weight_mask, other=0.0)
        gate = add_product(gate, x_tile, gate_tile, zero, PRECISION)
        up = add_product(up, x_tile, up_tile, zero, PRECISION)
        x += INNER
        gate_weight += INNER
        up_weight += INNER
    left = inner_size - whole * INNER
    if left > 0:
        x_tile = tl.load(x, mask=x_mask & (inner[None, :] < left), other=0.0)
        gate_tile = tl.load(gate_weight, mask=weight_mask & (inner[:, None] < left), other=0.0)
        up_tile = tl.load(up_weight, mask=weight_mask & (inner[:, None] < left), other=0.0)
        gate = add_product(gate, x_tile, gate_tile, zero, PRECISION)
        up = add_product(up, x_tile, up_tile, zero, PRECISION)
    return gate, up


@triton.jit
def _add_bias(product, bias, columns, mask):
    if bias is not None:
        product += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return product


@triton.jit(do_not_specialize=["rows", "inner"])
def _gated_linear_kernel(
    x, gate_weight, up_weight, gate_bias, up_bias, out, gate_out, up_out, rows, columns, inner, x_stride,
    weight_stride, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    ROWS_TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out, and of both products where they are to be saved."""
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), ROWS_TOGETHER
    )
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    gate, up = _multiply_both(
        x, gate_weight, up_weight, first_row=first_row, first_column=first_column, rows=rows, columns=columns,
        inner_size=inner, x_stride=x_stride, weight_stride=weight_stride, ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER,
        PRECISION=PRECISION,
    )  # fmt: skip
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    gate = _add_bias(gate, gate_bias, column, column < columns)
    up = _add_bias(up, up_bias, column, column < columns)
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    if gate_out is not None:
        tl.store(gate_out + offsets, gate.to(gate_out.dtype.element_ty), mask=mask)
        tl.store(up_out + offsets, up.to(up_out.dtype.element_ty), mask=mask)
    tl.store(out + offsets, (activate(gate, ACTIVATION) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gradient_kernel(
    grad_out, gate, up, dgate, dup, gate_partial, up_partial, rows, N, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate and dup of every P-th tile of rows (P programs along the rows), and their column sums where wanted."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = row[:, None] * N + columns[None, :]
        mask = (row[:, None] < rows) & (columns[None, :] < N)
        gradient = tl.load(grad_out + offsets, mask=mask, other=0.0).to(tl.float32)
        gate_values = tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
        up_values = tl.load(up + offsets, mask=mask, other=0.0).to(tl.float32)
        gate_gradient = gradient * up_values * derivative(gate_values, ACTIVATION)
        up_gradient = gradient * activate(gate_values, ACTIVATION)
        tl.store(dgate + offsets, gate_gradient.to(dgate.dtype.element_ty), mask=mask)
        tl.store(dup + offsets, up_gradient.to(dup.dtype.element_ty), mask=mask)
        if gate_partial is not None:
            gate_sums += gate_gradient
        if up_partial is not None:
            up_sums += up_gradient
    first = tl.program_id(1).to(tl.int64) * N
    if gate_partial is not None:
        tl.store(gate_partial + first + columns, tl.sum(gate_sums, 0), mask=columns < N)
    if up_partial is not None:
        tl.store(up_partial + first + columns, tl.sum(up_sums, 0), mask=columns < N)


# ------------------------------------------------------------------------------------------------------------ launching


def _key(x: torch.Tensor, rows: int, columns: int) -> dict[str, int | str]:
    return {"element_bytes": x.element_size(), "size": choose_size(x, rows, columns, False, "gated_linear")}


def gated_linear(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (..., K), weights (N, K) -> out (..., N), and gate and up if they are to be saved, else empty tensors."""
    check_activation("gated_linear", activation)
    columns, inner = gate_weight.shape
    rows = x.shape[:-1].numel()
    out = x.new_empty((*x.shape[:-1], columns))
    gate = torch.empty_like(out) if save else x.new_empty(0)
    up = torch.empty_like(out) if save else x.new_empty(0)
    if out.numel() == 0:
        return out, gate, up
    x = aligned_rows(x.contiguous().view(rows, inner))
    gate_weight, up_weight = aligned_rows(gate_weight.contiguous()), aligned_rows(up_weight.contiguous())
    gate_bias, up_bias = (None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias))

    def launch(tile: MatrixTile) -> None:
        with on_device(x):
            _gated_linear_kernel[(ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns),)](
                x, gate_weight, up_weight, gate_bias, up_bias, out, gate if save else None, up if save else None,
                rows, columns, inner, x.stride(0), gate_weight.stride(0), ACTIVATION=activation, ROWS=tile.rows,
                COLUMNS=tile.columns, INNER=tile.inner, ROWS_TOGETHER=ROWS_TOGETHER, PRECISION=precision(x),
                **scheduled(tile),
            )  # fmt: skip

    launch(choose("gated_linear", MatrixTile, x, CANDIDATES, launch, **_key(x, rows, columns)))
    return out, gate, up


def _product_gradients(
    grad_out: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate_bias: torch.Tensor | None,
    dup_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup (rows, columns) in one pass, which also fills the gradients of the biases that are wanted."""
    rows, columns = grad_out.shape
    dgate, dup = torch.empty_like(grad_out), torch.empty_like(grad_out)
    column_tiles = ceil_div(columns, GRADIENT_COLUMNS)
    parts = min(ceil_div(rows, GRADIENT_ROWS), ceil_div(4 * multiprocessors(grad_out), column_tiles))
    gate_partial, up_partial = (
        None if bias is None else grad_out.new_empty((parts, columns), dtype=torch.float32)
        for bias in (dgate_bias, dup_bias)
    )
    with on_device(grad_out):
        _gradient_kernel[(column_tiles, parts)](
            grad_out, gate, up, dgate, dup, gate_partial, up_partial, rows, columns,
            ACTIVATION=activation, ROWS=GRADIENT_ROWS, COLUMNS=GRADIENT_COLUMNS, num_warps=4,
        )  # fmt: skip
        for partial, bias in ((gate_partial, dgate_bias), (up_partial, dup_bias)):
            if partial is not None and bias is not None:
                sum_parts(partial, None, bias, False)
    return dgate, dup


def gated_linear_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    need_dx: bool,
    need_dgate_weight: bool,
    need_dup_weight: bool,
    need_dgate_bias: bool,
    need_dup_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dgate_weight, dup_weight, dgate_bias, dup_bias; those not needed are empty."""
    check_activation("gated_linear", activation)
    x, gate_weight, up_weight = x.contiguous(), gate_weight.contiguous(), up_weight.contiguous()
    columns, inner = gate_weight.shape
    rows = x.shape[:-1].numel()
    dx = x.new_empty(x.shape if need_dx else 0)
    dgate_weight = x.new_empty(gate_weight.shape if need_dgate_weight else 0)
    dup_weight = x.new_empty(up_weight.shape if need_dup_weight else 0)
    dgate_bias = x.new_empty(columns if need_dgate_bias else 0)
    dup_bias = x.new_empty(columns if need_dup_bias else 0)
    if rows == 0 or columns == 0:
        gradients = (dx, dgate_weight, dup_weight, dgate_bias, dup_bias)
        for gradient in gradients:
            gradient.zero_()
        return gradients
    dgate, dup = _product_gradients(
        grad_out.contiguous().view(rows, columns), gate.contiguous(), up.contiguous(), activation,
        dgate_bias if need_dgate_bias else None, dup_bias if need_dup_bias else None,
    )  # fmt: skip
    if need_dx:
        target = dx.view(rows, inner)
        multiply_matrices(dgate, gate_weight, target, rows, inner, columns, split=True)
        multiply_matrices(dup, up_weight, target, rows, inner, columns, split=True, accumulate=True)
    flat = x.view(rows, inner)
    if need_dgate_weight:
        multiply_matrices(dgate, flat, dgate_weight, columns, inner, rows, a_transposed=True, split=True)
    if need_dup_weight:
        multiply_matrices(dup, flat, dup_weight, columns, inner, rows, a_transposed=True, split=True)
    return dx, dgate_weight, dup_weight, dgate_bias, dup_bias


def describe(x: torch.Tensor, gate_weight: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `gated_linear` takes for these tensors."""
    return describe_tile("gated_linear", MatrixTile, x, **_key(x, x.shape[:-1].numel(), gate_weight.shape[0]))
