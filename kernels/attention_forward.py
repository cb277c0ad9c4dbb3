"""The forward pass of attention, one program a tile of queries of one head.

    out = softmax(scale * Q K^T + mask) V,    lse = log sum exp(scale * Q K^T + mask)

The keys are visited tile by tile. For every query the running maximum m and the running sum l of the exponentials are
kept; when the maximum grows, what was accumulated so far is rescaled (online softmax: Milakov and Gimelshein,
arXiv:1805.02867; as attention: Dao, FlashAttention-2, arXiv:2307.08691):

    m' = max(m, max_j s_j)
    l' = l 2^(m - m') + sum_j 2^(s_j - m')
    acc' = acc 2^(m - m') + sum_j 2^(s_j - m') v_j

with s = log2(e) * scale * Q K^T, where the scale is applied after the dot product. At the end out = acc / l and
lse = (m + log2 l) / log2(e).

Whole tiles need no mask; only those on the diagonal, where a window begins and at a length do. Tiles of late queries,
which see the most keys, start first.

With `descriptors` in its configuration the kernel reads keys and values through tensor descriptors, which Hopper and
newer turn into bulk copies by the tensor memory accelerator; otherwise through pointers.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from .attention_mask import key_runs, loop_over, sees, tile_of, visible_length
from .attention_tiles import (
    LN_2,
    LOG2_E,
    UNIT,
    candidates,
    dropout_arguments,
    head_and_tile,
    head_dim_block,
    heads_in_cache,
    in_units,
    load_rows,
    precision,
    store_rows,
    survives,
    tile_key,
)
from .launch import Schedule, ceil_div, gpu_family, on_device, scheduled
from .tuning import choose


@dataclass(frozen=True)
class ForwardTile(Schedule):
    """The tile sizes, how Triton schedules the kernel, and whether it reads keys and values by tensor descriptors."""

    query_block: int
    key_block: int
    warps: int
    stages: int
    descriptors: bool = False


@triton.jit
def attend(
    accumulator, row_sum, row_max, query, queries, dims, k, v, k_stride, v_stride, runs, offset, window, scale, seed,
    head, drop_below, HEAD_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Lets a tile of queries see those keys of `runs` that need no mask, or those that do: the online softmax. k and v
    are pointers or descriptors; without a seed nothing is dropped.
    """
    first, last = loop_over(runs, MASKED)
    end = runs[3]
    for count in range(first, last, KEY_BLOCK):
        first_key = tl.multiple_of(tile_of(count, runs, MASKED), KEY_BLOCK)
        keys = first_key + tl.arange(0, KEY_BLOCK)
        if DESCRIPTORS:
            key = k.load([first_key, 0])
        else:
            key = load_rows(k, first_key, k_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if NEGATIVE:
            scores = -scores
        if MASKED:
            visible = sees(queries[:, None] + offset, keys[None, :], length=end, window=window, CAUSAL=CAUSAL)
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
        if seed is not None:
            kept = survives(seed, queries[:, None], keys[None, :], head, drop_below)
            probabilities = tl.where(kept, probabilities, 0.0)
        if DESCRIPTORS:
            value = v.load([first_key, 0])
        else:
            value = load_rows(v, first_key, v_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator, row_sum, row_max


@triton.jit(do_not_specialize=[
    "window", "query_count", "key_count", "heads", "head_count", "group", "heads_together", "drop_below", "q_batch",
    "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "out_batch", "out_head", "out_row",
])  # fmt: skip
def _forward_kernel(
    q, k, v, out, lse, dropout_seed, lengths, window, scale, keep_scale, drop_below, query_count, key_count, heads,
    head_count, group, heads_together, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Strides come in units of UNIT elements."""
    tiles = tl.cdiv(query_count, QUERY_BLOCK)
    head_index, tile = head_and_tile(tl.program_id(0), tiles, heads, heads_together)
    first_query = (tiles - 1 - tile) * QUERY_BLOCK  # the last queries see the most keys: longest first
    batch = (head_index // head_count).to(tl.int64)
    head = (head_index % head_count).to(tl.int64)
    length = visible_length(lengths, batch, key_count)
    offset = length - query_count

    q += (batch * q_batch + head * q_head) * UNIT
    k += (batch * k_batch + (head // group) * k_head) * UNIT
    v += (batch * v_batch + (head // group) * v_head) * UNIT
    out += (batch * out_batch + head * out_head) * UNIT

    dims = tl.arange(0, DIM_BLOCK)
    queries = first_query + tl.arange(0, QUERY_BLOCK)
    query = load_rows(q, first_query, q_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    if DESCRIPTORS:  # they end at the length, past which they read 0
        rows = tl.maximum(length, 1)
        k = tl.make_tensor_descriptor(k, [rows, HEAD_DIM], [k_row * UNIT, 1], [KEY_BLOCK, DIM_BLOCK])
        v = tl.make_tensor_descriptor(v, [rows, HEAD_DIM], [v_row * UNIT, 1], [KEY_BLOCK, DIM_BLOCK])

    accumulator = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
    row_sum = tl.zeros([QUERY_BLOCK], tl.float32)
    row_max = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    first_position = first_query + offset
    runs = key_runs(first_position, first_position + QUERY_BLOCK - 1, length, window, KEY_BLOCK, CAUSAL)
    for masked in tl.static_range(2):
        accumulator, row_sum, row_max = attend(
            accumulator, row_sum, row_max, query=query, queries=queries, dims=dims, k=k, v=v, k_stride=k_row * UNIT,
            v_stride=v_row * UNIT, runs=runs, offset=offset, window=window, scale=scale, seed=seed, head=head_index,
            drop_below=drop_below, HEAD_DIM=HEAD_DIM, KEY_BLOCK=KEY_BLOCK, MASKED=masked == 1, CAUSAL=CAUSAL,
            NEGATIVE=NEGATIVE, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS,
        )  # fmt: skip

    nothing_seen = row_sum == 0.0
    accumulator = accumulator * (keep_scale / tl.where(nothing_seen, 1.0, row_sum))[:, None]
    store_rows(out, accumulator, first_query, out_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK)
    log_sum = tl.where(nothing_seen, float("-inf"), (row_max + tl.log2(tl.where(nothing_seen, 1.0, row_sum))) * LN_2)
    tl.store(lse + head_index.to(tl.int64) * query_count + queries, log_sum, mask=queries < query_count)


# ------------------------------------------------------------------------------------------------------------ launching


def key(q: torch.Tensor, dropout: bool) -> dict[str, int]:
    """What the configuration is found under; dropout holds more in registers."""
    return {**tile_key(q), "heavy": dropout}


@cache
def forward_candidates(family: str) -> tuple[ForwardTile, ...]:
    """What a search tries."""
    tiles = tuple(ForwardTile(**vars(tile)) for tile in candidates((64, 128), (32, 64, 128)))
    if family in ("hopper", "blackwell"):
        tiles += tuple(replace(tile, descriptors=True) for tile in tiles)
    return tiles


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> None:
    """Fills out (B, H, T, D) and lse (B, H, T)."""
    batch, heads, query_count, head_dim = q.shape
    key_count = k.shape[2]
    group = heads // k.shape[1]
    seed, keep_scale, drop_below = dropout_arguments(dropout_p, dropout_seed)
    together = heads_in_cache(batch * heads, ceil_div(key_count, group), q)

    def launch(tile: ForwardTile) -> None:
        descriptors = tile.descriptors and _descriptors_can_read(k, v)
        if descriptors:
            triton.set_allocator(_scratch)
        with on_device(q):
            _forward_kernel[(ceil_div(query_count, tile.query_block) * batch * heads,)](
                q, k, v, out, lse, seed, kv_lengths, window, abs(scale) * LOG2_E.value, keep_scale, drop_below,
                query_count, key_count, batch * heads, heads, group, together, *in_units(q, k, v, out),
                HEAD_DIM=head_dim, DIM_BLOCK=head_dim_block(q), QUERY_BLOCK=tile.query_block,
                KEY_BLOCK=tile.key_block, CAUSAL=causal, NEGATIVE=scale < 0, PRECISION=precision(q),
                DESCRIPTORS=descriptors, **scheduled(tile),
            )  # fmt: skip

    tried = forward_candidates(gpu_family(q))
    launch(choose("attention_forward", ForwardTile, q, tried, launch, **key(q, seed is not None)))


def _descriptors_can_read(*tensors: torch.Tensor) -> bool:
    """Bulk copies need every row to start at a multiple of 16 bytes, and to be at least as long."""
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.shape[3] * tensor.element_size() >= 16
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where a kernel keeps the descriptors that it makes; torch aligns to more than they need."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
