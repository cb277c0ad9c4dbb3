"""Linear layers, x W^T + b, with GELU in the epilogue.

    pre = x W^T + b          out = activation(pre)
    dpre = dout * activation'(pre)
    dx = dpre W              dW = dpre^T x          db = sum over rows of dpre

All three products are matmul.py's. The gradient of the bias takes one pass over dout, which the activation's derivative
rides along with; its column sums are float32 parts of a fixed number of programs, then one reduction in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .gelu import gelu_backward, gelu_derivative_of
from .launch import ceil_div, multiprocessors, on_device
from .matmul import describe_multiply, multiply_matrices, sum_parts

# The bias gradient: tile of rows and columns.
BIAS_ROWS, BIAS_COLUMNS = 32, 64


@triton.jit(do_not_specialize=["rows"])
def _bias_gradient_kernel(
    grad_out, preactivation, grad_preactivation, partial, rows, N, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
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
        sum_parts(partial, None, dbias, False)
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


def describe(x: torch.Tensor, weight: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `linear` takes for these tensors."""
    return describe_multiply(x, x.shape[:-1].numel(), weight.shape[0])
