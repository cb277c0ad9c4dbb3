"""LayerNorm (Ba, Kiros and Hinton, arXiv:1607.06450) over the last dimension, alone or fused with the residual
addition before it.

    mean = sum(x) / N        variance = sum((x - mean)^2) / N        rstd = 1 / sqrt(variance + eps)
    normed = (x - mean) * rstd
    out = normed * weight + bias

Statistics are float32, and the mean is subtracted before squaring: sum(x^2) / N - mean^2 cancels where the mean is
large. Backward, with g = grad_out * weight:

    dx = rstd * (g - mean_N(g) - normed * mean_N(g * normed))
    dweight = sum over rows of grad_out * normed        dbias = sum over rows of grad_out

How rows and their sums are divided between programs is norm_rows.py's; rows too wide for a program's registers are
layer_norm_wide.py's.
"""

import torch
import triton
import triton.language as tl

from .launch import ceil_div, multiprocessors, on_device, scheduled
from .layer_norm_wide import backward_wide, forward_wide
from .norm_rows import (
    BACKWARD_CANDIDATES,
    FORWARD_CANDIDATES,
    LARGEST_BLOCK,
    PersistentRowsTile,
    RowsTile,
    block_of,
    load_float,
    load_sum,
    partial_sums,
    reduce_parts,
    rows_key,
    wide_columns,
)
from .tuning import choose
from .tuning import describe as describe_tile


@triton.jit
def _normalise(x, columns, N, inverse_n, eps):
    """(x - mean, mean, rstd) of a (rows, columns) tile that is 0 at columns past N."""
    mean = tl.sum(x, 1) * inverse_n
    centred = tl.where(columns[None, :] < N, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * inverse_n
    return centred, mean, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, residual, weight, bias, out, total, mean_out, rstd_out, rows, inverse_n, eps, N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    offsets = row[:, None] * N + columns[None, :]
    mask = (row[:, None] < rows) & (columns[None, :] < N)
    values = load_sum(x, residual, total, offsets, mask)
    centred, mean, rstd = _normalise(values, columns, N, inverse_n, eps)
    result = centred * rstd[:, None] * load_float(weight, columns, columns < N)[None, :]
    if bias is not None:
        result += load_float(bias, columns, columns < N)[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
    tl.store(mean_out + row, mean, mask=row < rows)
    tl.store(rstd_out + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_out, grad_sum, x, weight, mean, rstd, dx, partial_dweight, partial_dbias, rows, inverse_n, N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of every P-th tile of ROWS rows, where P is the number of programs, and this program's column sums."""
    columns = tl.arange(0, BLOCK)
    scale = load_float(weight, columns, columns < N)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = row[:, None] * N + columns[None, :]
        mask = (row[:, None] < rows) & (columns[None, :] < N)
        gradient = load_float(grad_out, offsets, mask)
        values = load_float(x, offsets, mask)
        row_mean = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.where(mask, (values - row_mean) * row_rstd, 0.0)
        dweight += gradient * normed
        dbias += gradient
        scaled = gradient * scale
        projection = tl.sum(scaled * normed, 1)[:, None] * inverse_n
        average = tl.sum(scaled, 1)[:, None] * inverse_n
        result = row_rstd * (scaled - average - normed * projection)
        if grad_sum is not None:
            result += load_float(grad_sum, offsets, mask)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    first = tl.program_id(0).to(tl.int64) * N
    tl.store(partial_dweight + first + columns, tl.sum(dweight, 0), mask=columns < N)
    tl.store(partial_dbias + first + columns, tl.sum(dbias, 0), mask=columns < N)


# ------------------------------------------------------------------------------------------------------------ launching


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    N = x.shape[-1]
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, total, mean.zero_(), rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
    rows = mean.numel()
    if N > LARGEST_BLOCK:
        with on_device(x):
            forward_wide(x, residual, weight, bias, out, total, mean, rstd, eps)
        return out, total, mean, rstd

    def launch(tile: RowsTile) -> None:
        with on_device(x):
            _forward_kernel[(ceil_div(rows, tile.rows),)](
                x, residual, weight, bias, out, total, mean, rstd, rows, 1.0 / N, eps,
                N=N, ROWS=tile.rows, BLOCK=block_of(N), **scheduled(tile),
            )  # fmt: skip

    launch(choose("layer_norm_forward", RowsTile, x, FORWARD_CANDIDATES, launch, **rows_key(N)))
    return out, total, mean, rstd


def _backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_out, x, weight = grad_out.contiguous(), x.contiguous(), weight.contiguous()
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    N = x.shape[-1]
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    rows = mean.numel()
    if N > LARGEST_BLOCK:
        with on_device(x):
            backward_wide(grad_out, grad_sum, x, weight, mean, rstd, dx)
            reduce_parts(*wide_columns(grad_out, x, mean, rstd), dweight, dbias)
        return dx, dweight, dbias

    def launch(tile: PersistentRowsTile) -> None:
        parts = min(ceil_div(rows, tile.rows), tile.programs * multiprocessors(x))
        partial = partial_sums(x, parts), partial_sums(x, parts)  # each of them aligned
        with on_device(x):
            _backward_kernel[(parts,)](
                grad_out, grad_sum, x, weight, mean, rstd, dx, *partial, rows, 1.0 / N,
                N=N, ROWS=tile.rows, BLOCK=block_of(N), **scheduled(tile),
            )  # fmt: skip
            reduce_parts(*partial, dweight, dbias)

    launch(choose("layer_norm_backward", PersistentRowsTile, x, BACKWARD_CANDIDATES, launch, **rows_key(N)))
    return dx, dweight, dbias


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (..., N) -> out (..., N), mean (...), rstd (...)."""
    out, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return out, mean, rstd


def layer_norm_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias."""
    return _backward(grad_out, None, x, weight, mean, rstd)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, x + residual, mean, rstd."""
    out, total, mean, rstd = _forward(x, residual, weight, bias, eps)
    assert total is not None
    return out, total, mean, rstd


def add_layer_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dsum (the gradient of x and of residual alike, grad_sum added in), dweight, dbias."""
    return _backward(grad_out, grad_sum, sum, weight, mean, rstd)


def describe(x: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `layer_norm` and `add_layer_norm` take for this tensor."""
    if x.shape[-1] > LARGEST_BLOCK:
        return "layer_norm_wide, in pieces"
    return describe_tile("layer_norm_forward", RowsTile, x, **rows_key(x.shape[-1]))
