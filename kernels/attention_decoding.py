"""Attention for few queries, as in decoding: the keys are split between programs, then merged.

A tile of queries a program would leave a GPU empty. Here a program takes one part p of the keys, for all query heads of
one key/value head at once, so that grouped heads read their keys once, as rows of one dot. Its result is normalised
within the part, and a second kernel weights the parts by their shares of the softmax denominator (Flash-Decoding):

    out_p = softmax(S_p) V_p                    lse_p = log sum exp(S_p)
    out = sum_p exp(lse_p - lse) out_p          lse = log sum_p exp(lse_p)

The split depends on the sizes of the tensors alone: how many keys there are (`kv_lengths`) is read on the device, so
that nothing waits for the GPU and a step can be captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .attention_forward import attend
from .attention_mask import key_runs, visible_length
from .attention_tiles import (
    LN_2,
    LOG2_E,
    UNIT,
    head_dim_block,
    in_units,
    precision,
    tile_key,
)
from .launch import Schedule, ceil_div, multiprocessors, on_device, scheduled
from .tuning import choose

# The rows of the packed dot: all queries of all the heads that share one key/value head.
DECODING_ROWS = 16
# A part of the keys smaller than this is not worth a program of its own.
SMALLEST_PART = 128
LARGEST_SPLIT = 64


@dataclass(frozen=True)
class DecodingTile(Schedule):
    """Keys a step, and how Triton schedules the kernel."""

    key_block: int
    warps: int
    stages: int


CANDIDATES = [
    DecodingTile(key_block, warps, stages)
    for key_block in (16, 32, 64, 128)
    for warps in (1, 2, 4, 8)
    for stages in (1, 2, 3, 4)
]


@triton.jit(do_not_specialize=[
    "window", "query_count", "key_count", "kv_head_count", "group", "split", "rows", "q_batch", "q_head", "q_row",
    "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
])  # fmt: skip
def _decoding_kernel(
    q, k, v, part_out, part_lse, lengths, window, scale, query_count, key_count, kv_head_count, group, split, rows,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys for all queries of all heads of one key/value head; row r is query r % T of head r // T of
    the group.

    part_out (B, Hkv, split, rows, D) is normalised within its part, part_lse (B, Hkv, split, rows) is in powers of two.
    """
    part = tl.program_id(0) % split
    head_index = tl.program_id(0) // split
    batch = (head_index // kv_head_count).to(tl.int64)
    head = (head_index % kv_head_count).to(tl.int64)
    length = visible_length(lengths, batch, key_count)
    offset = length - query_count
    start, whole, edge, end = key_runs(offset, length - 1, length, window, KEY_BLOCK, CAUSAL)
    part_keys = tl.cdiv(tl.cdiv(end - start, KEY_BLOCK), split) * KEY_BLOCK
    start += part * part_keys
    end = tl.minimum(start + part_keys, end)
    whole = tl.maximum(tl.minimum(whole, end), start)
    edge = tl.maximum(tl.minimum(edge, end), whole)
    runs = (start, whole, edge, end)

    k += (batch * k_batch + head * k_head) * UNIT
    v += (batch * v_batch + head * v_head) * UNIT
    dims = tl.arange(0, DIM_BLOCK)
    row = tl.arange(0, ROW_BLOCK)
    queries = row % query_count
    query_heads = head * group + row // query_count
    row_offsets = (batch * q_batch + query_heads * q_head + queries.to(tl.int64) * q_row) * UNIT
    row_mask = (row[:, None] < rows) & (dims[None, :] < HEAD_DIM)
    query = tl.load(q + row_offsets[:, None] + dims[None, :], mask=row_mask, other=0.0)

    accumulator = tl.zeros([ROW_BLOCK, DIM_BLOCK], tl.float32)
    row_sum = tl.zeros([ROW_BLOCK], tl.float32)
    row_max = tl.full([ROW_BLOCK], float("-inf"), tl.float32)
    for masked in tl.static_range(2):
        accumulator, row_sum, row_max = attend(
            accumulator, row_sum, row_max, query=query, queries=queries, dims=dims, k=k, v=v, k_stride=k_row * UNIT,
            v_stride=v_row * UNIT, runs=runs, offset=offset, window=window, scale=scale, seed=None, head=0,
            drop_below=0, HEAD_DIM=HEAD_DIM, KEY_BLOCK=KEY_BLOCK, MASKED=masked == 1, CAUSAL=CAUSAL,
            NEGATIVE=NEGATIVE, PRECISION=PRECISION, DESCRIPTORS=False,
        )  # fmt: skip

    nothing_seen = row_sum == 0.0
    safe_sum = tl.where(nothing_seen, 1.0, row_sum)
    log_sum = tl.where(nothing_seen, float("-inf"), row_max + tl.log2(safe_sum))
    first_row = tl.program_id(0).to(tl.int64) * rows
    tl.store(part_lse + first_row + row, log_sum, mask=row < rows)
    part_pointers = part_out + first_row * HEAD_DIM + row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(part_pointers, accumulator / safe_sum[:, None], mask=row_mask)


@triton.jit(
    do_not_specialize=["query_count", "kv_head_count", "group", "split", "rows", "out_batch", "out_head", "out_row"]
)
def _merge_kernel(
    part_out, part_lse, out, lse, query_count, kv_head_count, group, split, rows, out_batch, out_head, out_row,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """One query of one head: the parts weighted by their share of the softmax denominator."""
    row = tl.program_id(0) % rows
    head_index = tl.program_id(0) // rows
    batch = (head_index // kv_head_count).to(tl.int64)
    head = (head_index % kv_head_count) * group + row // query_count
    query = row % query_count
    parts = tl.arange(0, SPLIT_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    part_rows = (head_index.to(tl.int64) * split + parts) * rows + row
    logs = tl.load(part_lse + part_rows, mask=parts < split, other=float("-inf"))
    largest = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    safe_total = tl.where(total == 0.0, 1.0, total)
    mask = (parts[:, None] < split) & (dims[None, :] < HEAD_DIM)
    values = tl.load(part_out + part_rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    # A part that saw nothing holds 0 with weight 0.
    merged = tl.sum(values * weights[:, None], 0) / safe_total
    pointers = out + batch * out_batch + head.to(tl.int64) * out_head + query.to(tl.int64) * out_row + dims
    tl.store(pointers, merged.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    log_sum = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(safe_total)) * LN_2)
    tl.store(lse + (batch * kv_head_count * group + head) * query_count + query, log_sum)


# ------------------------------------------------------------------------------------------------------------ launching


def is_few(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether all queries that share keys fit in one dot."""
    return q.shape[2] * (q.shape[1] // k.shape[1]) <= DECODING_ROWS


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    kv_lengths: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> None:
    """Fills out (B, H, T, D) and lse (B, H, T)."""
    batch, heads, query_count, head_dim = q.shape
    kv_heads, key_count = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows = query_count * group
    wanted = ceil_div(2 * multiprocessors(q), batch * kv_heads)
    seen = min(key_count, window + query_count - 1) if window else key_count
    split = max(1, min(wanted, seen // SMALLEST_PART, LARGEST_SPLIT))
    part_out = torch.empty((batch, kv_heads, split, rows, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((batch, kv_heads, split, rows), dtype=torch.float32, device=q.device)
    dim_block = head_dim_block(q)

    def launch(tile: DecodingTile) -> None:
        with on_device(q):
            _decoding_kernel[(batch * kv_heads * split,)](
                q, k, v, part_out, part_lse, kv_lengths, window, abs(scale) * LOG2_E.value, query_count,
                key_count, kv_heads, group, split, rows, *in_units(q, k, v), HEAD_DIM=head_dim, DIM_BLOCK=dim_block,
                ROW_BLOCK=DECODING_ROWS, KEY_BLOCK=tile.key_block, CAUSAL=causal, NEGATIVE=scale < 0,
                PRECISION=precision(q), **scheduled(tile),
            )  # fmt: skip

    launch(choose("attention_decoding", DecodingTile, q, CANDIDATES, launch, **tile_key(q)))
    with on_device(q):
        _merge_kernel[(batch * kv_heads * rows,)](
            part_out, part_lse, out, lse, query_count, kv_heads, group, split, rows, *out.stride()[:3],
            HEAD_DIM=head_dim, DIM_BLOCK=dim_block, SPLIT_BLOCK=LARGEST_SPLIT,
            num_warps=8 if dim_block >= 128 else 4,
        )  # fmt: skip
