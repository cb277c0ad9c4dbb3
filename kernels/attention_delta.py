"""What both gradient kernels of attention subtract: delta, one number a query.

    delta = rowsum(dO * out) = rowsum(P * dP)

In half precision it is the first form, one cheap pass over dO and out. In float32 it is the second, one more loop over
the keys: where one key has nearly all the weight, dP - delta cancels, and only the same rounding on both sides leaves
float32's accuracy. That loop also sums P as the gradient kernels will recompute it. The sum is not quite 1, because a
large lse has been rounded; they multiply with its inverse, the correction.
"""

import torch
import triton
import triton.language as tl

from .attention_mask import key_runs, loop_over, sees, tile_of, visible_length
from .attention_tiles import (
    LOG2_E,
    UNIT,
    AttentionTile,
    candidates,
    dropout_arguments,
    head_and_tile,
    head_dim_block,
    heads_in_cache,
    in_units,
    load_log_sum,
    load_rows,
    precision,
    survives,
    tile_key,
)
from .launch import ceil_div, on_device, scheduled
from .tuning import choose

# Elements of dO and of out that a program of the cheap pass reads.
BLOCK = 4096


@triton.jit(do_not_specialize=[
    "query_count", "heads", "head_count", "grad_batch", "grad_head", "grad_row", "out_batch", "out_head", "out_row",
])  # fmt: skip
def _delta_kernel(
    grad_out, out, delta, query_count, heads, head_count, grad_batch, grad_head, grad_row, out_batch, out_head, out_row,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * out), which equals rowsum(P * dP), also under dropout."""
    head_index = tl.program_id(0) % heads
    first_query = tl.program_id(0) // heads * QUERY_BLOCK
    batch = (head_index // head_count).to(tl.int64)
    head = (head_index % head_count).to(tl.int64)
    dims = tl.arange(0, DIM_BLOCK)
    grad_out += (batch * grad_batch + head * grad_head) * UNIT
    out += (batch * out_batch + head * out_head) * UNIT
    gradient = load_rows(grad_out, first_query, grad_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True).to(
        tl.float32
    )
    output = load_rows(out, first_query, out_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True).to(tl.float32)
    queries = first_query + tl.arange(0, QUERY_BLOCK)
    tl.store(
        delta + head_index.to(tl.int64) * query_count + queries,
        tl.sum(gradient * output, 1),
        mask=queries < query_count,
    )


@triton.jit
def _sums_over_keys(
    total, delta_row, query, gradient, queries, dims, log_sum, k, v, k_stride, v_stride, runs, offset, window, scale,
    seed, head, keep_scale, drop_below, HEAD_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys contribute to rowsum(P) and rowsum(P * dP)."""
    first, last = loop_over(runs, MASKED)
    end = runs[3]
    for count in range(first, last, KEY_BLOCK):
        first_key = tl.multiple_of(tile_of(count, runs, MASKED), KEY_BLOCK)
        keys = first_key + tl.arange(0, KEY_BLOCK)
        key = load_rows(k, first_key, k_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        value = load_rows(v, first_key, v_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        probabilities = tl.exp2(scores * scale - log_sum[:, None])
        if MASKED:
            visible = sees(queries[:, None] + offset, keys[None, :], length=end, window=window, CAUSAL=CAUSAL)
            probabilities = tl.where(visible, probabilities, 0.0)
        probability_gradient = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        if seed is not None:
            kept = survives(seed, queries[:, None], keys[None, :], head, drop_below)
            probability_gradient = tl.where(kept, probability_gradient * keep_scale, 0.0)
        total += tl.sum(probabilities, 1)
        delta_row += tl.sum(probabilities * probability_gradient, 1)
    return total, delta_row


@triton.jit(do_not_specialize=[
    "window", "query_count", "key_count", "heads", "head_count", "group", "heads_together", "drop_below", "q_batch",
    "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "grad_batch", "grad_head",
    "grad_row",
])  # fmt: skip
def _delta_from_keys_kernel(
    q, k, v, grad_out, lse, delta, correction, dropout_seed, lengths, window, scale, keep_scale, drop_below,
    query_count, key_count, heads, head_count, group, heads_together, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, grad_batch, grad_head, grad_row, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta and correction of one tile of queries of one head."""
    tiles = tl.cdiv(query_count, QUERY_BLOCK)
    head_index, tile = head_and_tile(tl.program_id(0), tiles, heads, heads_together)
    first_query = (tiles - 1 - tile) * QUERY_BLOCK
    batch = (head_index // head_count).to(tl.int64)
    head = (head_index % head_count).to(tl.int64)
    length = visible_length(lengths, batch, key_count)
    offset = length - query_count

    q += (batch * q_batch + head * q_head) * UNIT
    k += (batch * k_batch + (head // group) * k_head) * UNIT
    v += (batch * v_batch + (head // group) * v_head) * UNIT
    grad_out += (batch * grad_batch + head * grad_head) * UNIT

    dims = tl.arange(0, DIM_BLOCK)
    queries = first_query + tl.arange(0, QUERY_BLOCK)
    query = load_rows(q, first_query, q_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    gradient = load_rows(grad_out, first_query, grad_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    flat_rows = head_index.to(tl.int64) * query_count + queries
    log_sum = load_log_sum(lse + flat_rows, queries < query_count)
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)

    total = tl.zeros([QUERY_BLOCK], tl.float32)
    delta_row = tl.zeros([QUERY_BLOCK], tl.float32)
    first_position = first_query + offset
    runs = key_runs(first_position, first_position + QUERY_BLOCK - 1, length, window, KEY_BLOCK, CAUSAL)
    for masked in tl.static_range(2):
        total, delta_row = _sums_over_keys(
            total, delta_row, query=query, gradient=gradient, queries=queries, dims=dims, log_sum=log_sum, k=k, v=v,
            k_stride=k_row * UNIT, v_stride=v_row * UNIT, runs=runs, offset=offset, window=window, scale=scale,
            seed=seed, head=head_index, keep_scale=keep_scale, drop_below=drop_below, HEAD_DIM=HEAD_DIM,
            KEY_BLOCK=KEY_BLOCK, MASKED=masked == 1, CAUSAL=CAUSAL, PRECISION=PRECISION,
        )  # fmt: skip
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(delta + flat_rows, delta_row * inverse, mask=queries < query_count)
    tl.store(correction + flat_rows, inverse, mask=queries < query_count)


# ------------------------------------------------------------------------------------------------------------ launching


def delta_of_rows(grad_out: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """rowsum(dO * out): (B, H, T, D) twice -> (B, H, T), float32."""
    batch, heads, query_count, head_dim = out.shape
    delta = torch.empty((batch, heads, query_count), dtype=torch.float32, device=out.device)
    block = max(16, BLOCK // head_dim_block(out))
    with on_device(out):
        _delta_kernel[(ceil_div(query_count, block) * batch * heads,)](
            grad_out, out, delta, query_count, batch * heads, heads, *in_units(grad_out, out),
            HEAD_DIM=head_dim, DIM_BLOCK=head_dim_block(out), QUERY_BLOCK=block, num_warps=4,
        )  # fmt: skip
    return delta


def delta_from_keys(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rowsum(P * dP) and the correction of P, (B, H, T) in float32 each."""
    batch, heads, query_count, head_dim = q.shape
    key_count = k.shape[2]
    group = heads // k.shape[1]
    delta, correction = torch.empty_like(lse), torch.empty_like(lse)
    seed, keep_scale, drop_below = dropout_arguments(dropout_p, dropout_seed)
    together = heads_in_cache(batch * heads, ceil_div(key_count, group), q)

    def launch(tile: AttentionTile) -> None:
        with on_device(q):
            _delta_from_keys_kernel[(ceil_div(query_count, tile.query_block) * batch * heads,)](
                q, k, v, grad_out, lse, delta, correction, seed, kv_lengths, window, scale * LOG2_E.value,
                keep_scale, drop_below, query_count, key_count, batch * heads, heads, group, together,
                *in_units(q, k, v, grad_out), HEAD_DIM=head_dim, DIM_BLOCK=head_dim_block(q),
                QUERY_BLOCK=tile.query_block, KEY_BLOCK=tile.key_block, CAUSAL=causal, PRECISION=precision(q),
                **scheduled(tile),
            )  # fmt: skip

    tried = candidates((16, 32, 64), (16, 32, 64))
    launch(choose("attention_delta", AttentionTile, q, tried, launch, **tile_key(q)))
    return delta, correction
