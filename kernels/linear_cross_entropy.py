"""The language model's head and its loss in one: mean cross-entropy of softmax(h W^T), without the (rows, V) logits.

    z = h W^T        lse = log sum exp(z)        loss = mean over the targets that count of (lse - z_target)
    dz = (exp(z - lse) - onehot(target)) * dloss / count        dh = dz W        dW = dz^T h

Forward: a program computes tiles of z for some rows and folds them into a running maximum, a running sum of
exponentials and the target's own logit (online softmax, arXiv:1805.02867; for this loss: Wijmans et al., Cut Your
Losses, arXiv:2411.09009). The vocabulary is shared between a few programs, and a second kernel merges their parts.

Backward: z is recomputed for SCRATCH_BYTES of rows at a time, turned into dz, and multiplied both ways; dW gathers in
float32. The factor dloss / count is applied to the products, not to dz, which float16 could not hold. A target equal
to ignore_index gives no loss and no gradient. Any other target outside 0 .. V-1 makes the loss and the gradients nan:
targets are compared, never used as addresses, and a GPU can't raise an error without being waited for.
"""

import torch
import triton
import triton.language as tl

from .launch import ceil_div, multiprocessors, on_device, scheduled
from .matmul import (
    CANDIDATES,
    ROWS_TOGETHER,
    MatrixTile,
    aligned_rows,
    grouped_tile,
    multiply,
    multiply_matrices,
    precision,
)
from .tuning import choose
from .tuning import describe as describe_tile

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# The logits' gradients that backward holds at once: as many times SCRATCH_ROWS as fit.
SCRATCH_BYTES = 64 * 2**20
SCRATCH_ROWS = 128
# Forward shares the vocabulary between at most so many programs.
LARGEST_SPLIT = 32
MERGE_ROWS = 64
MEAN_BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "vocabulary", "inner", "tiles_a_part"])
def _statistics_kernel(
    hidden, weight, targets, part_max, part_sum, part_target, rows, vocabulary, inner, tiles_a_part, hidden_stride,
    weight_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For some rows and one part of the vocabulary: the maximum logit, the sum of exponentials below it, and the
    target's logit or 0.
    """
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_target = tl.zeros([ROWS], tl.float32)
    first_tile = tl.program_id(1) * tiles_a_part
    last_tile = tl.minimum(first_tile + tiles_a_part, tl.cdiv(vocabulary, COLUMNS))
    for tile in range(first_tile, last_tile):
        first_column = tile * COLUMNS
        logits = multiply(
            hidden, weight, first_row, first_column, rows, vocabulary, 0, inner, hidden_stride, weight_stride, False,
            True, ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        column = first_column + tl.arange(0, COLUMNS)
        row_target += tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), 1)
        logits = tl.where(column[None, :] < vocabulary, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        row_sum = row_sum * tl.exp2((row_max - new_max) * _LOG2_E)
        row_sum += tl.sum(tl.exp2((logits - new_max[:, None]) * _LOG2_E), 1)
        row_max = new_max
    offsets = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(part_max + offsets, row_max, mask=row < rows)
    tl.store(part_sum + offsets, row_sum, mask=row < rows)
    tl.store(part_target + offsets, row_target, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "vocabulary", "parts", "ignore_index"])
def _merge_kernel(
    part_max, part_sum, part_target, targets, lse, losses, rows, vocabulary, parts, ignore_index, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """lse and loss of some rows, from the parts of the vocabulary."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    offsets = part[None, :].to(tl.int64) * rows + row[:, None]
    mask = (part[None, :] < parts) & (row[:, None] < rows)
    maxima = tl.load(part_max + offsets, mask=mask, other=float("-inf"))
    sums = tl.load(part_sum + offsets, mask=mask, other=0.0)
    target_logit = tl.sum(tl.load(part_target + offsets, mask=mask, other=0.0), 1)
    largest = tl.max(maxima, 1)
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(sums * tl.exp2((maxima - pivot[:, None]) * _LOG2_E), 1)
    log_sum = pivot + tl.log2(total) * _LN_2
    target = tl.load(targets + row, mask=row < rows, other=0)
    loss = tl.where((target >= 0) & (target < vocabulary), log_sum - target_logit, float("nan"))
    tl.store(lse + row, log_sum, mask=row < rows)
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, loss), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _mean_kernel(losses, targets, loss, rows, ignore_index, BLOCK: tl.constexpr):
    """One program: the mean over the rows that count; nan when none does."""
    sums = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        sums += tl.load(losses + row, mask=row < rows, other=0.0)
        target = tl.load(targets + row, mask=row < rows, other=0)
        counts += ((target != ignore_index) & (row < rows)).to(tl.int32)
    tl.store(loss, tl.sum(sums, 0) / tl.sum(counts, 0).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _multiplier_kernel(grad_loss, targets, multiplier, rows, ignore_index, BLOCK: tl.constexpr):
    """One program: dloss / count, or 0 when no row counts."""
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        target = tl.load(targets + row, mask=row < rows, other=0)
        counts += ((target != ignore_index) & (row < rows)).to(tl.int32)
    count = tl.sum(counts, 0)
    gradient = tl.load(grad_loss).to(tl.float32) / tl.maximum(count, 1).to(tl.float32)
    tl.store(multiplier, tl.where(count == 0, 0.0, gradient))


@triton.jit(do_not_specialize=["rows", "vocabulary", "inner", "ignore_index"])
def _logit_gradient_kernel(
    hidden, weight, targets, lse, grad_logits, rows, vocabulary, inner, ignore_index, hidden_stride, weight_stride,
    grad_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, ROWS_TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of exp(z - lse) - onehot(target), 0 in ignored rows. The padding after the vocabulary is written too,
    and never read.
    """
    row_tile, column_tile = grouped_tile(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, COLUMNS), ROWS_TOGETHER
    )
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    logits = multiply(
        hidden, weight, first_row, first_column, rows, vocabulary, 0, inner, hidden_stride, weight_stride, False, True,
        ROWS, COLUMNS, INNER, PRECISION,
    )  # fmt: skip
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    target = tl.load(targets + row, mask=row < rows, other=0)
    log_sum = tl.load(lse + row, mask=row < rows, other=0.0)
    gradient = tl.exp2((logits - log_sum[:, None]) * _LOG2_E) - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    gradient = tl.where(((target >= 0) & (target < vocabulary))[:, None], gradient, float("nan"))
    gradient = tl.where((target == ignore_index)[:, None], 0.0, gradient)
    mask = (row[:, None] < rows) & (column[None, :] < grad_stride)
    pointers = (
        grad_logits + first_row.to(tl.int64) * grad_stride + tl.arange(0, ROWS)[:, None] * grad_stride + column[None, :]
    )
    tl.store(pointers, gradient.to(grad_logits.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launching


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (..., K), weight (V, K), targets (...) -> the mean loss (0-dim, float32) and lse (...), float32."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    rows, (vocabulary, inner) = targets.numel(), weight.shape
    lse = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return loss.fill_(float("nan")), lse
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    hidden, weight = aligned_rows(hidden.view(rows, inner)), aligned_rows(weight)

    def launch(tile: MatrixTile) -> None:
        row_tiles, column_tiles = ceil_div(rows, tile.rows), ceil_div(vocabulary, tile.columns)
        wanted = max(1, min(ceil_div(4 * multiprocessors(hidden), row_tiles), column_tiles, LARGEST_SPLIT))
        tiles_a_part = max(1, ceil_div(column_tiles, wanted))
        parts = max(1, ceil_div(column_tiles, tiles_a_part))
        # Three buffers, each aligned whatever the number of rows.
        partial = [hidden.new_empty((parts, rows), dtype=torch.float32) for _ in range(3)]
        with on_device(hidden):
            _statistics_kernel[(row_tiles, parts)](
                hidden, weight, targets, *partial, rows, vocabulary, inner, tiles_a_part, hidden.stride(0),
                weight.stride(0), ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, PRECISION=precision(hidden),
                **scheduled(tile),
            )  # fmt: skip
            _merge_kernel[(ceil_div(rows, MERGE_ROWS),)](
                *partial, targets, lse, losses, rows, vocabulary, parts, ignore_index, ROWS=MERGE_ROWS,
                PARTS=LARGEST_SPLIT, num_warps=4,
            )  # fmt: skip
            _mean_kernel[(1,)](losses, targets, loss, rows, ignore_index, BLOCK=MEAN_BLOCK, num_warps=4)

    launch(choose("cross_entropy_forward", MatrixTile, hidden, CANDIDATES, launch, **_key(hidden)))
    return loss, lse


def linear_cross_entropy_backward(
    grad_loss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    need_dweight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dhidden, and dweight, of shape (0,) where it is not needed."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    targets, lse = targets.contiguous().view(-1), lse.contiguous().view(-1)
    rows, (vocabulary, inner) = targets.numel(), weight.shape
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight) if need_dweight else weight.new_empty(0)
    if rows == 0 or weight.numel() == 0:
        return dhidden.zero_(), dweight.zero_()
    stride = ceil_div(vocabulary, 64) * 64  # rows of the scratch are aligned, whatever the vocabulary
    rows_together = max(1, SCRATCH_BYTES // (stride * hidden.element_size() * SCRATCH_ROWS)) * SCRATCH_ROWS
    scratch = torch.empty((min(rows_together, rows), stride), dtype=hidden.dtype, device=hidden.device)
    gathered = dweight if dweight.dtype == torch.float32 else torch.empty_like(dweight, dtype=torch.float32)
    multiplier = torch.empty((), dtype=torch.float32, device=hidden.device)
    hidden_rows, dhidden_rows = aligned_rows(hidden.view(rows, inner)), dhidden.view(rows, inner)
    weight = aligned_rows(weight)
    with on_device(hidden):
        _multiplier_kernel[(1,)](grad_loss, targets, multiplier, rows, ignore_index, BLOCK=MEAN_BLOCK, num_warps=4)
        for first in range(0, rows, rows_together):
            here = slice(first, min(first + rows_together, rows))
            count = here.stop - first
            _logit_gradients(hidden_rows[here], weight, targets[here], lse[here], scratch, inner, ignore_index)
            multiply_matrices(
                scratch, weight, dhidden_rows[here], count, inner, vocabulary, multiplier=multiplier, split=True
            )
            if need_dweight:
                multiply_matrices(
                    scratch, hidden_rows[here], gathered, vocabulary, inner, count, a_transposed=True,
                    multiplier=multiplier, accumulate=first > 0,
                )  # fmt: skip
    return dhidden, gathered.to(dweight.dtype)


def _logit_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    scratch: torch.Tensor,
    inner: int,
    ignore_index: int,
) -> None:
    """Fills the first rows of scratch with exp(z - lse) - onehot(target)."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]

    def launch(tile: MatrixTile) -> None:
        _logit_gradient_kernel[(ceil_div(rows, tile.rows) * ceil_div(vocabulary, tile.columns),)](
            hidden, weight, targets, lse, scratch, rows, vocabulary, inner, ignore_index, hidden.stride(0),
            weight.stride(0), scratch.stride(0), ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner,
            ROWS_TOGETHER=ROWS_TOGETHER, PRECISION=precision(hidden), **scheduled(tile),
        )  # fmt: skip

    launch(choose("cross_entropy_backward", MatrixTile, hidden, CANDIDATES, launch, **_key(hidden)))


def _key(hidden: torch.Tensor) -> dict[str, int]:
    return {"element_bytes": hidden.element_size()}


def describe(hidden: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `linear_cross_entropy` takes for these tensors."""
    return describe_tile("cross_entropy_forward", MatrixTile, hidden, **_key(hidden))
