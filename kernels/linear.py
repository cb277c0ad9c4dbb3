"""Linear layers, x W^T + b, with an activation in the epilogue.

    pre = x W^T + b          out = activation(pre)
    dpre = dout * activation'(pre)
    dx = dpre W              dW = dpre^T x          db = sum over rows of dpre

All three products are matmul.py's. The gradient of the bias and the activation's derivative share one pass over dout;
the bias's column sums are float32 parts of a fixed number of programs, then one reduction in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .activations import check_activation, derivative
from .launch import ceil_div, multiprocessors, on_device
from .matmul import describe_multiply, multiply_matrices, sum_parts

# The tile of the pass over dout.
ROWS, COLUMNS = 32, 64


@triton.jit(do_not_specialize=["rows"])
def _preactivation_gradient_kernel(
    grad_out, preactivation, grad_preactivation, partial, rows, N, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dpre of every P-th tile of rows (P programs along the rows), where there is an activation, and its column sums,
    where they are wanted.
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
            gradient *= derivative(values, ACTIVATION)
            tl.store(grad_preactivation + offsets, gradient.to(grad_preactivation.dtype.element_ty), mask=mask)
        if partial is not None:
            sums += gradient
    if partial is not None:
        tl.store(partial + tl.program_id(1).to(tl.int64) * N + columns, tl.sum(sums, 0), mask=columns < N)


# ------------------------------------------------------------------------------------------------------------ launching


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, save_preactivation: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K), weight (N, K) -> activation(x W^T + b) (..., N), and x W^T + b if it is to be saved, else an empty
    tensor.
    """
    check_activation("linear", activation)
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


def _preactivation_gradient(
    grad_out: torch.Tensor, preactivation: torch.Tensor, activation: str, dbias: torch.Tensor | None
) -> torch.Tensor:
    """dpre (rows, columns) in one pass over grad_out, which also fills dbias where there is one."""
    rows, columns = grad_out.shape
    gradient = torch.empty_like(grad_out) if activation else None
    column_tiles = ceil_div(columns, COLUMNS)
    parts = min(ceil_div(rows, ROWS), ceil_div(4 * multiprocessors(grad_out), column_tiles))
    partial = grad_out.new_empty((parts, columns), dtype=torch.float32) if dbias is not None else None
    with on_device(grad_out):
        _preactivation_gradient_kernel[(column_tiles, parts)](
            grad_out, preactivation if activation else None, gradient, partial, rows, columns,
            ACTIVATION=activation, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        if partial is not None and dbias is not None:
            sum_parts(partial, None, dbias, False)
    return grad_out if gradient is None else gradient


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
    check_activation("linear", activation)
    x, weight = x.contiguous(), weight.contiguous()
    columns, inner = weight.shape
    rows = x.shape[:-1].numel()
    gradient = grad_out.contiguous().view(rows, columns)
    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(columns if need_dbias else 0)
    if gradient.numel() == 0:
        dbias.zero_()
    elif activation or need_dbias:
        preactivation = preactivation.contiguous()
        gradient = _preactivation_gradient(gradient, preactivation, activation, dbias if need_dbias else None)
    if need_dx:
        dx = torch.empty_like(x)
        multiply_matrices(gradient, weight, dx.view(rows, inner), rows, inner, columns, split=True)
    if need_dweight:
        dweight = torch.empty_like(weight)
        multiply_matrices(gradient, x.view(rows, inner), dweight, columns, inner, rows, a_transposed=True, split=True)
    return dx, dweight, dbias


def describe(x: torch.Tensor, weight: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `linear` takes for these tensors."""
    return describe_multiply(x, x.shape[:-1].numel(), weight.shape[0])
