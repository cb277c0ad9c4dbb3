"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467) over the last dimension, alone or fused with the residual addition
before it.

    rstd = 1 / sqrt(sum(x^2) / N + eps)
    normed = x * rstd
    out = normed * weight

Statistics are float32. Backward, with g = grad_out * weight:

    dx = rstd * (g - normed * mean_N(g * normed))
    dweight = sum over rows of grad_out * normed

What it shares with LayerNorm is in norm_rows.py; rows too wide for a program's registers are rms_norm_wide.py's.
"""

import torch
import triton
import triton.language as tl

from .launch import ceil_div, multiprocessors, on_device, scheduled
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
from .rms_norm_wide import backward_wide, forward_wide
from .tuning import choose
from .tuning import describe as describe_tile


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, residual, weight, out, total, rstd_out, rows, inverse_n, eps, N: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    offsets = row[:, None] * N + columns[None, :]
    mask = (row[:, None] < rows) & (columns[None, :] < N)
    values = load_sum(x, residual, total, offsets, mask)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) * inverse_n + eps)
    result = values * rstd[:, None] * load_float(weight, columns, columns < N)[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
    tl.store(rstd_out + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_out, grad_sum, x, weight, rstd, dx, partial_dweight, rows, inverse_n, N: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of every P-th tile of ROWS rows, where P is the number of programs, and this program's column sums."""
    columns = tl.arange(0, BLOCK)
    scale = load_float(weight, columns, columns < N)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = row[:, None] * N + columns[None, :]
        mask = (row[:, None] < rows) & (columns[None, :] < N)
        gradient = load_float(grad_out, offsets, mask)
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = load_float(x, offsets, mask) * row_rstd
        dweight += gradient * normed
        scaled = gradient * scale
        projection = tl.sum(scaled * normed, 1)[:, None] * inverse_n
        result = row_rstd * (scaled - normed * projection)
        if grad_sum is not None:
            result += load_float(grad_sum, offsets, mask)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    first = tl.program_id(0).to(tl.int64) * N
    tl.store(partial_dweight + first + columns, tl.sum(dweight, 0), mask=columns < N)


# ------------------------------------------------------------------------------------------------------------ launching


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    N = x.shape[-1]
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = rstd.numel()
    if x.numel() == 0:
        return out, total, rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
    if N > LARGEST_BLOCK:
        with on_device(x):
            forward_wide(x, residual, weight, out, total, rstd, eps)
        return out, total, rstd

    def launch(tile: RowsTile) -> None:
        with on_device(x):
            _forward_kernel[(ceil_div(rows, tile.rows),)](
                x, residual, weight, out, total, rstd, rows, 1.0 / N, eps,
                N=N, ROWS=tile.rows, BLOCK=block_of(N), **scheduled(tile),
            )  # fmt: skip

    launch(choose("rms_norm_forward", RowsTile, x, FORWARD_CANDIDATES, launch, **rows_key(N)))
    return out, total, rstd


def _backward(
    grad_out: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_out, x, weight, rstd = grad_out.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    N, rows = x.shape[-1], rstd.numel()
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    if x.numel() == 0:
        return dx, dweight.zero_()
    if N > LARGEST_BLOCK:
        with on_device(x):
            backward_wide(grad_out, grad_sum, x, weight, rstd, dx)
            partial, _ = wide_columns(grad_out, x, None, rstd)
            reduce_parts(partial, None, dweight, None)
        return dx, dweight

    def launch(tile: PersistentRowsTile) -> None:
        parts = min(ceil_div(rows, tile.rows), tile.programs * multiprocessors(x))
        partial = partial_sums(x, parts)
        with on_device(x):
            _backward_kernel[(parts,)](
                grad_out, grad_sum, x, weight, rstd, dx, partial, rows, 1.0 / N,
                N=N, ROWS=tile.rows, BLOCK=block_of(N), **scheduled(tile),
            )  # fmt: skip
            reduce_parts(partial, None, dweight, None)

    launch(choose("rms_norm_backward", PersistentRowsTile, x, BACKWARD_CANDIDATES, launch, **rows_key(N)))
    return dx, dweight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., N) -> out (..., N), rstd (...)."""
    out, _, rstd = _forward(x, None, weight, eps)
    return out, rstd


def rms_norm_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, dweight."""
    return _backward(grad_out, None, x, weight, rstd)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, x + residual, rstd."""
    out, total, rstd = _forward(x, residual, weight, eps)
    assert total is not None
    return out, total, rstd


def add_rms_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dsum (the gradient of x and of residual alike, grad_sum added in), dweight."""
    return _backward(grad_out, grad_sum, sum, weight, rstd)


def describe(x: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `rms_norm` and `add_rms_norm` take for this tensor."""
    if x.shape[-1] > LARGEST_BLOCK:
        return "rms_norm_wide, in pieces"
    return describe_tile("rms_norm_forward", RowsTile, x, **rows_key(x.shape[-1]))
