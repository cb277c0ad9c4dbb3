"""Causal attention, forward and backward, without ever storing the (T, S) matrix of probabilities.

    S = scale * Q K^T,  masked to the keys each query may see
    P = softmax(S),     out = dropout(P) V,     lse = log sum exp(S)

The forward pass visits the keys tile by tile and keeps, for every query, the running maximum m and the running sum l
of the exponentials; when the maximum grows, what was accumulated so far is rescaled (online softmax: Milakov and
Gimelshein, arXiv:1805.02867; as attention: Dao et al., FlashAttention, arXiv:2205.14135, and Dao, FlashAttention-2,
arXiv:2307.08691). Exponentials are powers of two, with log2(e) folded into the scale, which is applied after the dot
product.

The backward pass recomputes P from lse. With dO the gradient of out (FlashAttention-2, algorithm 2):

    delta = rowsum(dO * out) = rowsum(P * dP)
    dV = dropout(P)^T dO
    dS = P * (dropout'(dO V^T) - delta)
    dQ = scale * dS K                   one program a tile of queries
    dK = scale * dS^T Q                 one program a tile of keys; it also loops over the query heads that share the
    keys

In half precision delta is the first form, one cheap pass before the others. In float32 it is the second, one more
loop over the keys: where one key has nearly all the weight, dP - delta cancels, and only the same rounding on both
sides leaves float32's accuracy.

Two kernels instead of one with atomic additions: the gradients are the same bits in every run.

Which keys a query sees: with T queries against the first `length` of S keys, query t sees keys 0 .. length - T + t
(the last query sees all). So whole tiles need no mask, and only those on the diagonal go through the masked loop. A
query may see no key at all (length < T): its output is 0, its lse is -inf, its gradients are 0.

Dropout is regenerated, never stored: element (query t, key s) of head bh is kept when the first word of Philox4x32-10
(Salmon et al., SC 2011) at counter (s, t, bh, 0) under the seed is large enough.

With few queries (decoding) there are not enough tiles to fill a GPU, so the keys are split between programs, each of
which handles all query heads of one key/value head, and a second kernel merges the parts by their log-sum-exp
(Flash-Decoding).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import ceil_div, is_hopper, last_dim_contiguous, multiprocessors, next_power_of_2, on_device, stride_unit

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Tile:
    """The tile sizes of one kernel, and how Triton schedules it."""

    query_block: int
    key_block: int
    warps: int
    stages: int


# Keyed by (bytes an element, head dim rounded up to a power of two). "hopper" entries are preferred on sm_90; "heavy"
# ones are for what holds more in registers: dropout, and in the key gradients query heads that share keys. Sequence
# lengths never choose a tile, except that few queries take the decoding kernel. Each entry is the largest tried that
# compiles without spilling registers.
FORWARD_TILES = {
    (2, 16): Tile(128, 64, 4, 3),
    (2, 32): Tile(128, 64, 8, 3),
    (2, 64): Tile(128, 64, 8, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 8, 2),
    ("hopper", 2, 64): Tile(128, 128, 8, 3),
    ("hopper", 2, 256): Tile(128, 32, 8, 2),
    (4, 16): Tile(64, 64, 8, 2),
    (4, 32): Tile(64, 64, 8, 2),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(16, 16, 8, 1),
    (4, 256): Tile(16, 16, 8, 1),
}
KEY_GRADIENT_TILES = {
    (2, 16): Tile(32, 128, 8, 3),
    (2, 32): Tile(32, 128, 8, 2),
    (2, 64): Tile(32, 128, 8, 2),
    ("heavy", 2, 64): Tile(32, 128, 8, 1),
    (2, 128): Tile(32, 64, 8, 2),
    (2, 256): Tile(16, 32, 8, 1),
    ("hopper", 2, 64): Tile(64, 128, 8, 2),
    ("hopper", "heavy", 2, 64): Tile(32, 128, 8, 2),
    ("hopper", 2, 128): Tile(32, 128, 8, 1),
    ("hopper", "heavy", 2, 128): Tile(16, 128, 8, 1),
    ("hopper", 2, 256): Tile(32, 32, 8, 1),
    ("hopper", "heavy", 2, 256): Tile(16, 32, 8, 1),
    (4, 16): Tile(32, 64, 4, 2),
    (4, 32): Tile(32, 32, 8, 2),
    (4, 64): Tile(32, 32, 8, 1),
    (4, 128): Tile(16, 16, 8, 1),
    (4, 256): Tile(16, 16, 8, 1),
}
QUERY_GRADIENT_TILES = {
    (2, 16): Tile(128, 64, 8, 3),
    (2, 32): Tile(128, 64, 8, 3),
    (2, 64): Tile(128, 32, 8, 3),
    (2, 128): Tile(64, 64, 8, 2),
    (2, 256): Tile(32, 32, 8, 1),
    ("hopper", 2, 64): Tile(128, 64, 8, 3),
    ("hopper", 2, 128): Tile(128, 64, 8, 2),
    (4, 16): Tile(32, 32, 4, 2),
    (4, 32): Tile(32, 32, 4, 1),
    (4, 64): Tile(32, 32, 8, 2),
    (4, 128): Tile(16, 16, 8, 1),
    (4, 256): Tile(16, 16, 8, 1),
}
# query_block is the rows of the packed dot: all queries of all the heads that share one key/value head.
DECODING_ROWS = 16
DECODING_TILES = {
    (2, 16): Tile(DECODING_ROWS, 128, 4, 3),
    (2, 32): Tile(DECODING_ROWS, 128, 4, 3),
    (2, 64): Tile(DECODING_ROWS, 64, 4, 3),
    (2, 128): Tile(DECODING_ROWS, 64, 4, 3),
    (2, 256): Tile(DECODING_ROWS, 32, 4, 2),
    (4, 16): Tile(DECODING_ROWS, 32, 4, 2),
    (4, 32): Tile(DECODING_ROWS, 64, 4, 2),
    (4, 64): Tile(DECODING_ROWS, 32, 4, 2),
    (4, 128): Tile(DECODING_ROWS, 16, 4, 1),
    (4, 256): Tile(DECODING_ROWS, 16, 8, 1),
}
# A part of the keys smaller than this is not worth a program of its own.
SMALLEST_DECODING_PART = 128
LARGEST_DECODING_SPLIT = 64
# Heads whose keys and values fit in this part of the L2 cache run side by side.
CACHE_BYTES = 16 * 2**20


# -------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _head_and_tile(program, tiles, heads, heads_together):
    """Which (batch, head) and which tile a program works on.

    Heads go in groups that fit the cache together; within a group all first tiles come before all second ones, so
    that when tile 0 is the longest, long work starts first and the short tiles fill the gaps at the end.
    """
    group = program // (heads_together * tiles)
    first_head = group * heads_together
    heads_here = tl.minimum(heads - first_head, heads_together)
    within = program - group * heads_together * tiles
    return first_head + within % heads_here, within // heads_here


@triton.jit
def _visible_length(lengths, batch, key_count):
    """How many keys of this batch element are there."""
    length = key_count
    if lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths + batch), key_count), 0).to(tl.int32)
    return length


@triton.jit
def _load_rows(
    base, first_row, row_stride, rows_end, dims, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Rows first_row .. first_row + ROWS - 1 of a (rows, HEAD_DIM) matrix; rows at or past rows_end, and the padding,
    read as 0.
    """
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + rows[:, None] * row_stride + dims[None, :]
    if MASK_ROWS and dims.shape[0] != HEAD_DIM:
        return tl.load(pointers, mask=(rows[:, None] < rows_end - first_row) & (dims[None, :] < HEAD_DIM), other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < rows_end - first_row, other=0.0)
    elif dims.shape[0] != HEAD_DIM:
        return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_rows(base, values, first_row, row_stride, rows_end, dims, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + rows[:, None] * row_stride + dims[None, :]
    mask = (rows[:, None] < rows_end - first_row) & (dims[None, :] < HEAD_DIM)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _kept(seed, queries, keys, head, drop_below):
    """Which probabilities dropout keeps; queries and keys broadcast against each other."""
    word, _, _, _ = tl.philox(seed, keys.to(tl.uint32), queries.to(tl.uint32), head.to(tl.uint32), 0)
    return (word >> 1) >= drop_below.to(tl.uint32)


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _attend(
    accumulator, row_sum, row_max, query, queries, dims, k, v, k_stride, v_stride, start, end, offset, scale, seed,
    head, drop_below, HEAD_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lets a tile of queries see keys start .. end - 1: the online softmax."""
    for first_key in range(start, end, KEY_BLOCK):
        first_key = tl.multiple_of(first_key, KEY_BLOCK)
        keys = first_key + tl.arange(0, KEY_BLOCK)
        key = _load_rows(k, first_key, k_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if NEGATIVE:
            scores = -scores
        if MASKED:
            visible = (keys[None, :] <= queries[:, None] + offset) & (keys[None, :] < end)
            scores = tl.where(visible, scores, float("-inf"))
            tile_max = tl.max(scores, 1)
            new_max = tl.maximum(row_max, tl.where(tile_max == float("-inf"), tile_max, tile_max * scale))
            # A row that has seen nothing yet has no maximum: any finite pivot avoids inf - inf.
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            probabilities = tl.where(visible, tl.exp2(scores * scale - pivot[:, None]), 0.0)
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            pivot = new_max
            probabilities = tl.exp2(scores * scale - pivot[:, None])
        correction = tl.exp2(row_max - pivot)
        row_sum = row_sum * correction + tl.sum(probabilities, 1)
        accumulator = accumulator * correction[:, None]
        row_max = new_max
        if DROPOUT:
            probabilities = tl.where(_kept(seed, queries[:, None], keys[None, :], head, drop_below), probabilities, 0.0)
        value = _load_rows(v, first_key, v_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator, row_sum, row_max


@triton.jit(do_not_specialize=[
    "query_count", "key_count", "heads", "head_count", "group", "heads_together", "drop_below", "q_batch", "q_head",
    "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "out_batch", "out_head", "out_row",
])  # fmt: skip
def _forward_kernel(
    q, k, v, out, lse, dropout_seed, lengths, scale, keep_scale, drop_below, query_count, key_count, heads,
    head_count, group, heads_together, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Strides come in units of UNIT elements."""
    tiles = tl.cdiv(query_count, QUERY_BLOCK)
    head_index, tile = _head_and_tile(tl.program_id(0), tiles, heads, heads_together)
    first_query = (tiles - 1 - tile) * QUERY_BLOCK  # the last queries see the most keys: longest first
    batch = (head_index // head_count).to(tl.int64)
    head = (head_index % head_count).to(tl.int64)
    length = _visible_length(lengths, batch, key_count)
    offset = length - query_count

    q += (batch * q_batch + head * q_head) * UNIT
    k += (batch * k_batch + (head // group) * k_head) * UNIT
    v += (batch * v_batch + (head // group) * v_head) * UNIT
    out += (batch * out_batch + head * out_head) * UNIT

    dims = tl.arange(0, DIM_BLOCK)
    queries = first_query + tl.arange(0, QUERY_BLOCK)
    query = _load_rows(q, first_query, q_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    seed = 0
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)

    accumulator = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
    row_sum = tl.zeros([QUERY_BLOCK], tl.float32)
    row_max = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    # Every query of the tile sees the keys before `unmasked`; no query sees a key at or past `end`.
    end = tl.maximum(tl.minimum(offset + first_query + QUERY_BLOCK, length), 0)
    unmasked = tl.minimum(tl.maximum(offset + first_query + 1, 0), end) // KEY_BLOCK * KEY_BLOCK
    accumulator, row_sum, row_max = _attend(
        accumulator, row_sum, row_max, query, queries, dims, k, v, k_row * UNIT, v_row * UNIT, 0, unmasked, offset,
        scale, seed, head_index, drop_below, HEAD_DIM, KEY_BLOCK, False, dropout_seed is not None, NEGATIVE,
        PRECISION,
    )  # fmt: skip
    accumulator, row_sum, row_max = _attend(
        accumulator, row_sum, row_max, query, queries, dims, k, v, k_row * UNIT, v_row * UNIT, unmasked, end, offset,
        scale, seed, head_index, drop_below, HEAD_DIM, KEY_BLOCK, True, dropout_seed is not None, NEGATIVE, PRECISION,
    )  # fmt: skip

    nothing_seen = row_sum == 0.0
    accumulator = accumulator * (keep_scale / tl.where(nothing_seen, 1.0, row_sum))[:, None]
    _store_rows(out, accumulator, first_query, out_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK)
    log_sum = tl.where(nothing_seen, float("-inf"), (row_max + tl.log2(tl.where(nothing_seen, 1.0, row_sum))) * _LN_2)
    tl.store(lse + head_index.to(tl.int64) * query_count + queries, log_sum, mask=queries < query_count)


# ------------------------------------------------------------------------------------------------- forward, few queries


@triton.jit(do_not_specialize=[
    "query_count", "key_count", "kv_head_count", "group", "split", "rows", "q_batch", "q_head", "q_row", "k_batch",
    "k_head", "k_row", "v_batch", "v_head", "v_row",
])  # fmt: skip
def _decoding_kernel(
    q, k, v, part_out, part_lse, lengths, scale, query_count, key_count, kv_head_count, group, split, rows, q_batch,
    q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys for all queries of all heads of one key/value head; row r is query r % T of head r // T of
    the group.

    part_out (B, Hkv, split, rows, D) is normalised within its part, part_lse (B, Hkv, split, rows) is in powers of two.
    """
    part = tl.program_id(0) % split
    head_index = tl.program_id(0) // split
    batch = (head_index // kv_head_count).to(tl.int64)
    head = (head_index % kv_head_count).to(tl.int64)
    length = _visible_length(lengths, batch, key_count)
    offset = length - query_count
    tiles_a_part = tl.cdiv(tl.cdiv(length, KEY_BLOCK), split)
    start = part * tiles_a_part * KEY_BLOCK
    end = tl.minimum(start + tiles_a_part * KEY_BLOCK, length)

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
    # Query 0 sees the fewest keys; before its last one no mask is needed.
    unmasked = tl.maximum(tl.minimum((offset + 1) // KEY_BLOCK * KEY_BLOCK, end), start) // KEY_BLOCK * KEY_BLOCK
    accumulator, row_sum, row_max = _attend(
        accumulator, row_sum, row_max, query, queries, dims, k, v, k_row * UNIT, v_row * UNIT, start, unmasked,
        offset, scale, 0, 0, 0, HEAD_DIM, KEY_BLOCK, False, False, NEGATIVE, PRECISION,
    )  # fmt: skip
    accumulator, row_sum, row_max = _attend(
        accumulator, row_sum, row_max, query, queries, dims, k, v, k_row * UNIT, v_row * UNIT, unmasked, end, offset,
        scale, 0, 0, 0, HEAD_DIM, KEY_BLOCK, True, False, NEGATIVE, PRECISION,
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
    log_sum = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(safe_total)) * _LN_2)
    tl.store(lse + (batch * kv_head_count * group + head) * query_count + query, log_sum)


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit(
    do_not_specialize=[
        "query_count",
        "heads",
        "head_count",
        "grad_batch",
        "grad_head",
        "grad_row",
        "out_batch",
        "out_head",
        "out_row",
    ]
)
def _delta_kernel(
    grad_out, out, delta, query_count, heads, head_count, grad_batch, grad_head, grad_row, out_batch, out_head, out_row,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * out), which equals rowsum(P * dP), also under dropout."""
    head_index = tl.program_id(0) % heads
    first_query = tl.program_id(0) // heads * QUERY_BLOCK
    batch = (head_index // head_count).to(tl.int64)
    head = (head_index % head_count).to(tl.int64)
    dims = tl.arange(0, DIM_BLOCK)
    grad_out += (batch * grad_batch + head * grad_head) * UNIT
    out += (batch * out_batch + head * out_head) * UNIT
    gradient = _load_rows(grad_out, first_query, grad_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True).to(
        tl.float32
    )
    output = _load_rows(out, first_query, out_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True).to(tl.float32)
    queries = first_query + tl.arange(0, QUERY_BLOCK)
    tl.store(
        delta + head_index.to(tl.int64) * query_count + queries,
        tl.sum(gradient * output, 1),
        mask=queries < query_count,
    )


@triton.jit
def _key_gradients(
    key_gradient, value_gradient, key, value, keys, dims, q, grad_out, lse, delta, q_stride, grad_stride, start, end,
    offset, scale, seed, head, keep_scale, drop_below, query_count, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries start .. end - 1 contribute to the gradients of a tile of keys and values.

    Everything is transposed, (keys, queries), so that P^T and dS^T come out of the first dots as the operands of the
    second ones.
    """
    for first_query in range(start, end, QUERY_BLOCK):
        queries = first_query + tl.arange(0, QUERY_BLOCK)
        query = _load_rows(q, first_query, q_stride, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
        log_sum = tl.load(lse + queries, mask=queries < query_count, other=float("-inf"))
        # Queries that saw no key, or are not there, get probability exp2(-inf) = 0.
        log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * _LOG2_E)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        probabilities = tl.exp2(scores * scale - log_sum[None, :])
        if MASKED:
            probabilities = tl.where(keys[:, None] <= queries[None, :] + offset, probabilities, 0.0)
        gradient = _load_rows(grad_out, first_query, grad_stride, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
        probability_gradient = tl.dot(value, tl.trans(gradient), input_precision=PRECISION)
        delta_row = tl.load(delta + queries, mask=queries < query_count, other=0.0)
        if DROPOUT:
            kept = _kept(seed, queries[None, :], keys[:, None], head, drop_below)
            dropped = tl.where(kept, probabilities * keep_scale, 0.0)
            probability_gradient = tl.where(kept, probability_gradient * keep_scale, 0.0)
            value_gradient = tl.dot(dropped.to(gradient.dtype), gradient, value_gradient, input_precision=PRECISION)
        else:
            value_gradient = tl.dot(
                probabilities.to(gradient.dtype), gradient, value_gradient, input_precision=PRECISION
            )
        score_gradient = probabilities * (probability_gradient - delta_row[None, :])
        if MASKED:  # a softmax over one key is constant: exactly 0 instead of the rounding of dP - delta
            score_gradient = tl.where(queries[None, :] + offset > 0, score_gradient, 0.0)
        key_gradient = tl.dot(score_gradient.to(query.dtype), query, key_gradient, input_precision=PRECISION)
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=[
    "query_count", "key_count", "kv_heads", "kv_head_count", "heads_together", "drop_below", "q_batch", "q_head",
    "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "grad_batch", "grad_head", "grad_row",
    "dk_batch", "dk_head", "dk_row",
])  # fmt: skip
def _key_gradient_kernel(
    q, k, v, grad_out, lse, delta, dk, dv, dropout_seed, lengths, scale, plain_scale, keep_scale, drop_below,
    query_count, key_count, kv_heads, kv_head_count, heads_together, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, grad_batch, grad_head, grad_row, dk_batch, dk_head, dk_row, UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key/value head: dK and dV (which share their strides), summed over the query heads of
    its group.
    """
    tiles = tl.cdiv(key_count, KEY_BLOCK)
    head_index, tile = _head_and_tile(tl.program_id(0), tiles, kv_heads, heads_together)
    first_key = tile * KEY_BLOCK  # the first keys are seen by the most queries: longest first
    batch = (head_index // kv_head_count).to(tl.int64)
    head = (head_index % kv_head_count).to(tl.int64)
    length = _visible_length(lengths, batch, key_count)
    offset = length - query_count

    dims = tl.arange(0, DIM_BLOCK)
    keys = first_key + tl.arange(0, KEY_BLOCK)
    k += (batch * k_batch + head * k_head) * UNIT
    v += (batch * v_batch + head * v_head) * UNIT
    key = _load_rows(k, first_key, k_row * UNIT, length, dims, HEAD_DIM, KEY_BLOCK, True)
    value = _load_rows(v, first_key, v_row * UNIT, length, dims, HEAD_DIM, KEY_BLOCK, True)
    seed = 0
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)

    # Query `start` is the first to see any key of the tile; queries from `unmasked` on see all of them. No query sees
    # a tile past the length.
    start = tl.maximum(first_key - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
    unmasked = tl.cdiv(tl.maximum(first_key + KEY_BLOCK - 1 - offset, 0), QUERY_BLOCK) * QUERY_BLOCK
    end = tl.where(first_key < length, query_count, 0)
    unmasked = tl.minimum(unmasked, tl.cdiv(end, QUERY_BLOCK) * QUERY_BLOCK)

    key_gradient = tl.zeros([KEY_BLOCK, DIM_BLOCK], tl.float32)
    value_gradient = tl.zeros([KEY_BLOCK, DIM_BLOCK], tl.float32)
    for member in range(0, GROUP):
        query_head = head * GROUP + member
        flat_head = batch * kv_head_count * GROUP + query_head
        q_base = q + (batch * q_batch + query_head * q_head) * UNIT
        grad_base = grad_out + (batch * grad_batch + query_head * grad_head) * UNIT
        lse_base = lse + flat_head * query_count
        delta_base = delta + flat_head * query_count
        key_gradient, value_gradient = _key_gradients(
            key_gradient, value_gradient, key, value, keys, dims, q_base, grad_base, lse_base, delta_base, q_row *
            UNIT, grad_row * UNIT, start, unmasked, offset, scale, seed, flat_head, keep_scale, drop_below,
            query_count, HEAD_DIM, QUERY_BLOCK, True, dropout_seed is not None, PRECISION,
        )  # fmt: skip
        key_gradient, value_gradient = _key_gradients(
            key_gradient, value_gradient, key, value, keys, dims, q_base, grad_base, lse_base, delta_base, q_row *
            UNIT, grad_row * UNIT, unmasked, end, offset, scale, seed, flat_head, keep_scale, drop_below, query_count,
            HEAD_DIM, QUERY_BLOCK, False, dropout_seed is not None, PRECISION,
        )  # fmt: skip

    dk += (batch * dk_batch + head * dk_head) * UNIT
    dv += (batch * dk_batch + head * dk_head) * UNIT
    _store_rows(dk, key_gradient * plain_scale, first_key, dk_row * UNIT, key_count, dims, HEAD_DIM, KEY_BLOCK)
    _store_rows(dv, value_gradient, first_key, dk_row * UNIT, key_count, dims, HEAD_DIM, KEY_BLOCK)


@triton.jit
def _query_gradients(
    query_gradient, delta_row, query, gradient, queries, dims, log_sum, k, v, k_stride, v_stride, start, end, offset,
    scale, seed, head, keep_scale, drop_below, HEAD_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, ONLY_DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys start .. end - 1 contribute to the gradient of a tile of queries, or to delta = rowsum(P * dP)."""
    for first_key in range(start, end, KEY_BLOCK):
        first_key = tl.multiple_of(first_key, KEY_BLOCK)
        keys = first_key + tl.arange(0, KEY_BLOCK)
        key = _load_rows(k, first_key, k_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        value = _load_rows(v, first_key, v_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        probabilities = tl.exp2(scores * scale - log_sum[:, None])
        if MASKED:
            visible = (keys[None, :] <= queries[:, None] + offset) & (keys[None, :] < end)
            probabilities = tl.where(visible, probabilities, 0.0)
        probability_gradient = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(seed, queries[:, None], keys[None, :], head, drop_below)
            probability_gradient = tl.where(kept, probability_gradient * keep_scale, 0.0)
        if ONLY_DELTA:
            delta_row += tl.sum(probabilities * probability_gradient, 1)
        else:
            score_gradient = probabilities * (probability_gradient - delta_row[:, None])
            if MASKED:  # a softmax over one key is constant: exactly 0 instead of the rounding of dP - delta
                score_gradient = tl.where(queries[:, None] + offset > 0, score_gradient, 0.0)
            query_gradient = tl.dot(score_gradient.to(key.dtype), key, query_gradient, input_precision=PRECISION)
    return query_gradient, delta_row


@triton.jit(do_not_specialize=[
    "query_count", "key_count", "heads", "head_count", "group", "heads_together", "drop_below", "q_batch", "q_head",
    "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "grad_batch", "grad_head", "grad_row",
    "dq_batch", "dq_head", "dq_row",
])  # fmt: skip
def _query_gradient_kernel(
    q, k, v, grad_out, lse, delta, dq, dropout_seed, lengths, scale, plain_scale, keep_scale, drop_below, query_count,
    key_count, heads, head_count, group, heads_together, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
    v_head, v_row, grad_batch, grad_head, grad_row, dq_batch, dq_head, dq_row, UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    DELTA_FROM_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dQ, and delta where it comes from the keys."""
    tiles = tl.cdiv(query_count, QUERY_BLOCK)
    head_index, tile = _head_and_tile(tl.program_id(0), tiles, heads, heads_together)
    first_query = (tiles - 1 - tile) * QUERY_BLOCK
    batch = (head_index // head_count).to(tl.int64)
    head = (head_index % head_count).to(tl.int64)
    length = _visible_length(lengths, batch, key_count)
    offset = length - query_count

    q += (batch * q_batch + head * q_head) * UNIT
    k += (batch * k_batch + (head // group) * k_head) * UNIT
    v += (batch * v_batch + (head // group) * v_head) * UNIT
    grad_out += (batch * grad_batch + head * grad_head) * UNIT
    dq += (batch * dq_batch + head * dq_head) * UNIT

    dims = tl.arange(0, DIM_BLOCK)
    queries = first_query + tl.arange(0, QUERY_BLOCK)
    query = _load_rows(q, first_query, q_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    gradient = _load_rows(grad_out, first_query, grad_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    flat_rows = head_index.to(tl.int64) * query_count + queries
    log_sum = tl.load(lse + flat_rows, mask=queries < query_count, other=float("-inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * _LOG2_E)
    seed = 0
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)

    query_gradient = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
    end = tl.maximum(tl.minimum(offset + first_query + QUERY_BLOCK, length), 0)
    unmasked = tl.minimum(tl.maximum(offset + first_query + 1, 0), end) // KEY_BLOCK * KEY_BLOCK
    if DELTA_FROM_KEYS:
        delta_row = tl.zeros([QUERY_BLOCK], tl.float32)
        query_gradient, delta_row = _query_gradients(
            query_gradient, delta_row, query, gradient, queries, dims, log_sum, k, v, k_row * UNIT, v_row * UNIT, 0,
            unmasked, offset, scale, seed, head_index, keep_scale, drop_below, HEAD_DIM, KEY_BLOCK, False,
            dropout_seed is not None, True, PRECISION,
        )  # fmt: skip
        query_gradient, delta_row = _query_gradients(
            query_gradient, delta_row, query, gradient, queries, dims, log_sum, k, v, k_row * UNIT, v_row * UNIT,
            unmasked, end, offset, scale, seed, head_index, keep_scale, drop_below, HEAD_DIM, KEY_BLOCK, True,
            dropout_seed is not None, True, PRECISION,
        )  # fmt: skip
        tl.store(delta + flat_rows, delta_row, mask=queries < query_count)
    else:
        delta_row = tl.load(delta + flat_rows, mask=queries < query_count, other=0.0)
    query_gradient, delta_row = _query_gradients(
        query_gradient, delta_row, query, gradient, queries, dims, log_sum, k, v, k_row * UNIT, v_row * UNIT, 0,
        unmasked, offset, scale, seed, head_index, keep_scale, drop_below, HEAD_DIM, KEY_BLOCK, False, dropout_seed is
        not None, False, PRECISION,
    )  # fmt: skip
    query_gradient, delta_row = _query_gradients(
        query_gradient, delta_row, query, gradient, queries, dims, log_sum, k, v, k_row * UNIT, v_row * UNIT,
        unmasked, end, offset, scale, seed, head_index, keep_scale, drop_below, HEAD_DIM, KEY_BLOCK, True,
        dropout_seed is not None, False, PRECISION,
    )  # fmt: skip
    _store_rows(dq, query_gradient * plain_scale, first_query, dq_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK)


# ------------------------------------------------------------------------------------------------------------ launching


def _empty_heads_last(like: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) laid out as (B, T, H, D), so that merging the heads again is a view."""
    batch, heads, rows, dim = like.shape
    return like.new_empty((batch, rows, heads, dim)).transpose(1, 2)


def _in_units(unit: int, *tensors: torch.Tensor) -> list[int]:
    """The batch, head and row strides of each tensor, in the unit."""
    return [stride // unit for tensor in tensors for stride in tensor.stride()[:3]]


def _common_unit(*tensors: torch.Tensor) -> int:
    return stride_unit(*(stride for tensor in tensors for stride in tensor.stride()[:3]))


def _dropout(dropout_p: float, dropout_seed: torch.Tensor | None) -> tuple[torch.Tensor | None, float, int]:
    """(seed or None, what kept probabilities are multiplied with, below which Philox word (of 31 bits) one is
    dropped)
    """
    if dropout_p <= 0.0:
        return None, 1.0, 0
    if dropout_seed is None:
        raise ValueError(f"causal_attention: dropout_p is {dropout_p} but dropout_seed is None")
    if dropout_p >= 1.0:
        return dropout_seed, 0.0, 2**31 - 1
    return dropout_seed, 1.0 / (1.0 - dropout_p), int(dropout_p * 2**31)


def _heads_together(heads: int, rows: int, tensor: torch.Tensor) -> int:
    """How many heads, of two (rows, D) matrices each, share the cache."""
    return max(1, min(heads, CACHE_BYTES // max(2 * rows * tensor.shape[3] * tensor.element_size(), 1)))


def _precision(tensor: torch.Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # says nothing for half precision


def _tile_key(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.element_size(), max(16, next_power_of_2(tensor.shape[3]))


def _tile(table: dict[tuple, Tile], tensor: torch.Tensor, heavy: bool) -> Tile:
    """The most special entry there is for the tensor's dtype, head dim and GPU."""
    key = _tile_key(tensor)
    family = ("hopper",) if is_hopper(tensor) else ()
    choices = [(*family, "heavy", *key), (*family, *key)] if heavy else [(*family, *key)]
    if family:
        choices += [("heavy", *key), key] if heavy else [key]
    return next(table[choice] for choice in choices if choice in table)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> out (B, H, T, D), lse (B, H, T) in float32."""
    batch, heads, query_count, head_dim = q.shape
    kv_heads, key_count = k.shape[1], k.shape[2]
    out = _empty_heads_last(q)
    lse = torch.empty((batch, heads, query_count), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    seed, keep_scale, drop_below = _dropout(dropout_p, dropout_seed)
    group = heads // kv_heads
    if seed is None and query_count * group <= DECODING_ROWS:
        _decode(q, k, v, out, lse, scale, kv_lengths)
        return out, lse
    unit = _common_unit(q, k, v, out)
    tile = _tile(FORWARD_TILES, q, seed is not None)
    with on_device(q):
        _forward_kernel[(ceil_div(query_count, tile.query_block) * batch * heads,)](
            q, k, v, out, lse, seed, kv_lengths, abs(scale) * LOG2_E, keep_scale, drop_below, query_count, key_count,
            batch * heads, heads, group, _heads_together(batch * heads, ceil_div(key_count, group), q),
            *_in_units(unit, q, k, v, out), UNIT=unit, HEAD_DIM=head_dim, DIM_BLOCK=_tile_key(q)[1],
            QUERY_BLOCK=tile.query_block, KEY_BLOCK=tile.key_block, NEGATIVE=scale < 0, PRECISION=_precision(q),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    kv_lengths: torch.Tensor | None,
) -> None:
    """Few queries: the keys split between programs, then merged. The split depends on sizes alone, never on
    kv_lengths' values.
    """
    batch, heads, query_count, head_dim = q.shape
    kv_heads, key_count = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows = query_count * group
    wanted = ceil_div(2 * multiprocessors(q), batch * kv_heads)
    split = max(1, min(wanted, key_count // SMALLEST_DECODING_PART, LARGEST_DECODING_SPLIT))
    part_out = torch.empty((batch, kv_heads, split, rows, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((batch, kv_heads, split, rows), dtype=torch.float32, device=q.device)
    unit = _common_unit(q, k, v)
    tile = _tile(DECODING_TILES, q, False)
    dim_block = _tile_key(q)[1]
    with on_device(q):
        _decoding_kernel[(batch * kv_heads * split,)](
            q, k, v, part_out, part_lse, kv_lengths, abs(scale) * LOG2_E, query_count, key_count, kv_heads, group,
            split, rows, *_in_units(unit, q, k, v), UNIT=unit, HEAD_DIM=head_dim, DIM_BLOCK=dim_block,
            ROW_BLOCK=tile.query_block, KEY_BLOCK=tile.key_block, NEGATIVE=scale < 0, PRECISION=_precision(q),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _merge_kernel[(batch * kv_heads * rows,)](
            part_out, part_lse, out, lse, query_count, kv_heads, group, split, rows, *out.stride()[:3],
            HEAD_DIM=head_dim, DIM_BLOCK=dim_block, SPLIT_BLOCK=LARGEST_DECODING_SPLIT, num_warps=4,
        )  # fmt: skip


def causal_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, from what the forward pass got and gave."""
    batch, heads, query_count, head_dim = q.shape
    kv_heads, key_count = k.shape[1], k.shape[2]
    dq, dk, dv = _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v)
    if lse.numel() == 0 or head_dim == 0:
        return dq, dk.zero_(), dv.zero_()
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    grad_out, out, lse = last_dim_contiguous(grad_out), last_dim_contiguous(out), lse.contiguous()
    seed, keep_scale, drop_below = _dropout(dropout_p, dropout_seed)
    group = heads // kv_heads
    delta = torch.empty_like(lse)
    unit = _common_unit(q, k, v, grad_out, out, dq, dk)
    dim_block = _tile_key(q)[1]
    delta_block = max(16, 8192 // dim_block)
    together = _heads_together(batch * heads, ceil_div(key_count, group), q)
    kv_together = _heads_together(batch * kv_heads, query_count * group, q)
    delta_from_keys = q.dtype == torch.float32
    constants = {"UNIT": unit, "HEAD_DIM": head_dim, "DIM_BLOCK": dim_block}
    with on_device(q):
        if not delta_from_keys:
            _delta_kernel[(ceil_div(query_count, delta_block) * batch * heads,)](
                grad_out, out, delta, query_count, batch * heads, heads, *_in_units(unit, grad_out, out),
                **constants, QUERY_BLOCK=delta_block, num_warps=4,
            )  # fmt: skip
        tile = _tile(QUERY_GRADIENT_TILES, q, seed is not None)
        _query_gradient_kernel[(ceil_div(query_count, tile.query_block) * batch * heads,)](
            q, k, v, grad_out, lse, delta, dq, seed, kv_lengths, scale * LOG2_E, scale, keep_scale, drop_below,
            query_count, key_count, batch * heads, heads, group, together, *_in_units(unit, q, k, v, grad_out, dq),
            **constants, QUERY_BLOCK=tile.query_block, KEY_BLOCK=tile.key_block,
            DELTA_FROM_KEYS=delta_from_keys, PRECISION=_precision(q), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = _tile(KEY_GRADIENT_TILES, q, seed is not None or group > 1)
        _key_gradient_kernel[(ceil_div(key_count, tile.key_block) * batch * kv_heads,)](
            q, k, v, grad_out, lse, delta, dk, dv, seed, kv_lengths, scale * LOG2_E, scale, keep_scale, drop_below,
            query_count, key_count, batch * kv_heads, kv_heads, kv_together, *_in_units(unit, q, k, v, grad_out, dk),
            **constants, QUERY_BLOCK=tile.query_block, KEY_BLOCK=tile.key_block, GROUP=group, PRECISION=_precision(q),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dq, dk, dv
