"""LayerNorm (Ba, Kiros and Hinton, arXiv:1607.06450) over the last dimension, alone or fused with the residual
addition before it.

    mean = sum(x) / N        variance = sum((x - mean)^2) / N        rstd = 1 / sqrt(variance + eps)
    normed = (x - mean) * rstd
    out = normed * weight + bias

Statistics are float32, and the mean is subtracted before squaring: sum(x^2) / N - mean^2 cancels where the mean is
large. Backward, with g = grad_out * weight:

    dx = rstd * (g - mean_N(g) - normed * mean_N(g * normed))
    dweight = sum over rows of grad_out * normed        dbias = sum over rows of grad_out

A row fits a program's registers up to LARGEST_BLOCK; a narrow row leaves room for several. The column sums take two
stages: a fixed number of programs, each walking every P-th tile of rows with its own float32 partial sums, then one
small reduction over the programs; no atomics, so the same bits every time. Wider rows are walked in pieces.
"""

import torch
import triton
import triton.language as tl

from .launch import ceil_div, multiprocessors, next_power_of_2, on_device

# The widest row (rounded up to a power of two) that a program holds at once; wider ones are read in pieces of this
# size.
LARGEST_BLOCK = 8192
# (padded width up to, rows a program, warps) for the forward pass and for the backward pass, which holds more per
# element.
FORWARD_TABLE = ((64, 32, 4), (256, 8, 4), (512, 4, 4), (1024, 4, 4), (2048, 2, 8), (4096, 1, 8), (8192, 1, 8))
BACKWARD_TABLE = ((64, 32, 4), (256, 8, 4), (512, 4, 4), (1024, 4, 8), (2048, 2, 8), (4096, 1, 8), (8192, 1, 16))
# Persistent programs of the backward pass, for each multiprocessor.
PROGRAMS_A_MULTIPROCESSOR = 2
# Rows and columns of a tile of the column reductions.
REDUCTION_ROWS, REDUCTION_COLUMNS = 32, 64


@triton.jit
def _normalise(x, columns, N, inverse_n, eps):
    """(x - mean, mean, rstd) of a (rows, columns) tile that is 0 at columns past N."""
    mean = tl.sum(x, 1) * inverse_n
    centred = tl.where(columns[None, :] < N, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * inverse_n
    return centred, mean, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    mean_out,
    rstd_out,
    rows,
    inverse_n,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS whole rows. With a residual, the sum is rounded to its own dtype first, and that is what is normalised and
    stored in total.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    offsets = row[:, None] * N + columns[None, :]
    mask = (row[:, None] < rows) & (columns[None, :] < N)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + offsets, rounded, mask=mask)
        values = rounded.to(tl.float32)
    centred, mean, rstd = _normalise(values, columns, N, inverse_n, eps)
    result = centred * rstd[:, None] * tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
    tl.store(mean_out + row, mean, mask=row < rows)
    tl.store(rstd_out + row, rstd, mask=row < rows)


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


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_out, grad_sum, x, weight, mean, rstd, dx, partial_dweight, partial_dbias, rows, inverse_n, N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of every P-th tile of ROWS rows, where P is the number of programs, and this program's column sums."""
    columns = tl.arange(0, BLOCK)
    scale = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        offsets = row[:, None] * N + columns[None, :]
        mask = (row[:, None] < rows) & (columns[None, :] < N)
        gradient = tl.load(grad_out + offsets, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
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
            result += tl.load(grad_sum + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    first = tl.program_id(0).to(tl.int64) * N
    tl.store(partial_dweight + first + columns, tl.sum(dweight, 0), mask=columns < N)
    tl.store(partial_dbias + first + columns, tl.sum(dbias, 0), mask=columns < N)


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
    grad_out,
    x,
    mean,
    rstd,
    partial_dweight,
    partial_dbias,
    rows,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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
        bias_sum += tl.load(partial_dbias + offsets, mask=mask, other=0.0)
    tl.store(dweight + columns, tl.sum(weight_sum, 0).to(dweight.dtype.element_ty), mask=columns < N)
    tl.store(dbias + columns, tl.sum(bias_sum, 0).to(dbias.dtype.element_ty), mask=columns < N)


# ------------------------------------------------------------------------------------------------------------ launching


def _configuration(table: tuple[tuple[int, int, int], ...], N: int) -> tuple[int, int, int]:
    """(padded width, rows a program, warps)"""
    block = max(next_power_of_2(N), 16)
    return next((block, rows, warps) for width, rows, warps in table if block <= width)


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
    with on_device(x):
        if N <= LARGEST_BLOCK:
            block, rows_a_program, warps = _configuration(FORWARD_TABLE, N)
            _forward_kernel[(ceil_div(rows, rows_a_program),)](
                x, residual, weight, bias, out, total, mean, rstd, rows, 1.0 / N, eps,
                N=N, ROWS=rows_a_program, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        else:
            _forward_wide_kernel[(rows,)](
                x,
                residual,
                weight,
                bias,
                out,
                total,
                mean,
                rstd,
                1.0 / N,
                eps,
                N=N,
                BLOCK=LARGEST_BLOCK // 2,
                num_warps=8,
            )
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
    persistent = PROGRAMS_A_MULTIPROCESSOR * multiprocessors(x)
    with on_device(x):
        if N <= LARGEST_BLOCK:
            block, rows_a_program, warps = _configuration(BACKWARD_TABLE, N)
            parts = min(ceil_div(rows, rows_a_program), persistent)
            partial = [x.new_empty((parts, N), dtype=torch.float32) for _ in range(2)]  # each of them aligned
            _backward_kernel[(parts,)](
                grad_out, grad_sum, x, weight, mean, rstd, dx, partial[0], partial[1], rows, 1.0 / N,
                N=N, ROWS=rows_a_program, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        else:
            column_tiles = ceil_div(N, REDUCTION_COLUMNS)
            parts = min(ceil_div(rows, REDUCTION_ROWS), ceil_div(2 * persistent, column_tiles))
            partial = [x.new_empty((parts, N), dtype=torch.float32) for _ in range(2)]  # each of them aligned
            _backward_wide_kernel[(rows,)](
                grad_out, grad_sum, x, weight, mean, rstd, dx, 1.0 / N, N=N, BLOCK=LARGEST_BLOCK // 2, num_warps=8
            )
            _wide_column_kernel[(column_tiles, parts)](
                grad_out,
                x,
                mean,
                rstd,
                partial[0],
                partial[1],
                rows,
                N=N,
                ROWS=REDUCTION_ROWS,
                COLUMNS=REDUCTION_COLUMNS,
                num_warps=4,
            )
        _reduce_kernel[(ceil_div(N, REDUCTION_COLUMNS),)](
            partial[0],
            partial[1],
            dweight,
            dbias,
            parts,
            N=N,
            ROWS=REDUCTION_ROWS,
            COLUMNS=REDUCTION_COLUMNS,
            num_warps=4,
        )
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
