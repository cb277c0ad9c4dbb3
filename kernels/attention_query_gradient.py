"""The gradient of the queries in attention, one program a tile of queries of one head.

    P = 2^(s - lse)        dP = dropout'(dO V^T)        dS = P * (dP - delta)        dQ = scale * dS K

P is recomputed from the scores s and the log-sum-exp that the forward pass left; delta and, in float32, the correction
of P come from attention_delta.py (Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2). Only this program writes its
rows of dQ, so nothing is added atomically and the bits are the same in every run.
"""

import torch
import triton
import triton.language as tl

from .attention_mask import key_runs, loop_over, sees, sees_several, tile_of, visible_length
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
    store_rows,
    survives,
    tile_key,
)
from .launch import ceil_div, on_device, scheduled
from .tuning import choose


@triton.jit
def _query_gradients(
    query_gradient, delta_row, correction_row, query, gradient, queries, dims, log_sum, k, v, k_stride, v_stride,
    runs, length, offset, window, scale, seed, head, keep_scale, drop_below, HEAD_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys contribute to the gradient of a tile of queries."""
    first, last = loop_over(runs, MASKED)
    end = runs[3]
    for count in range(first, last, KEY_BLOCK):
        first_key = tl.multiple_of(tile_of(count, runs, MASKED), KEY_BLOCK)
        keys = first_key + tl.arange(0, KEY_BLOCK)
        key = load_rows(k, first_key, k_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        value = load_rows(v, first_key, v_stride, end, dims, HEAD_DIM, KEY_BLOCK, MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        probabilities = tl.exp2(scores * scale - log_sum[:, None])
        if correction_row is not None:
            probabilities *= correction_row[:, None]
        if MASKED:
            visible = sees(queries[:, None] + offset, keys[None, :], length=end, window=window, CAUSAL=CAUSAL)
            probabilities = tl.where(visible, probabilities, 0.0)
        probability_gradient = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        if seed is not None:
            kept = survives(seed, queries[:, None], keys[None, :], head, drop_below)
            probability_gradient = tl.where(kept, probability_gradient * keep_scale, 0.0)
        score_gradient = probabilities * (probability_gradient - delta_row[:, None])
        if MASKED:
            several = sees_several(queries[:, None] + offset, length, window, CAUSAL)
            score_gradient = tl.where(several, score_gradient, 0.0)
        query_gradient = tl.dot(score_gradient.to(key.dtype), key, query_gradient, input_precision=PRECISION)
    return query_gradient


@triton.jit(do_not_specialize=[
    "window", "query_count", "key_count", "heads", "head_count", "group", "heads_together", "drop_below", "q_batch",
    "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "grad_batch", "grad_head",
    "grad_row", "dq_batch", "dq_head", "dq_row",
])  # fmt: skip
def _query_gradient_kernel(
    q, k, v, grad_out, lse, delta, correction, dq, dropout_seed, lengths, window, scale, plain_scale, keep_scale,
    drop_below, query_count, key_count, heads, head_count, group, heads_together, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row, dq_batch, dq_head, dq_row,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dQ."""
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
    dq += (batch * dq_batch + head * dq_head) * UNIT

    dims = tl.arange(0, DIM_BLOCK)
    queries = first_query + tl.arange(0, QUERY_BLOCK)
    query = load_rows(q, first_query, q_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    gradient = load_rows(grad_out, first_query, grad_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
    flat_rows = head_index.to(tl.int64) * query_count + queries
    log_sum = load_log_sum(lse + flat_rows, queries < query_count)
    delta_row = tl.load(delta + flat_rows, mask=queries < query_count, other=0.0)
    correction_row = None
    if correction is not None:
        correction_row = tl.load(correction + flat_rows, mask=queries < query_count, other=0.0)
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)

    query_gradient = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
    first_position = first_query + offset
    runs = key_runs(first_position, first_position + QUERY_BLOCK - 1, length, window, KEY_BLOCK, CAUSAL)
    for masked in tl.static_range(2):
        query_gradient = _query_gradients(
            query_gradient, delta_row=delta_row, correction_row=correction_row, query=query, gradient=gradient,
            queries=queries, dims=dims, log_sum=log_sum, k=k, v=v, k_stride=k_row * UNIT, v_stride=v_row * UNIT,
            runs=runs, length=length, offset=offset, window=window, scale=scale, seed=seed, head=head_index,
            keep_scale=keep_scale, drop_below=drop_below, HEAD_DIM=HEAD_DIM, KEY_BLOCK=KEY_BLOCK, MASKED=masked == 1,
            CAUSAL=CAUSAL, PRECISION=PRECISION,
        )  # fmt: skip
    store_rows(dq, query_gradient * plain_scale, first_query, dq_row * UNIT, query_count, dims, HEAD_DIM, QUERY_BLOCK)


# ------------------------------------------------------------------------------------------------------------ launching


def query_gradient(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    correction: torch.Tensor | None,
    dq: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> None:
    """Fills dq (B, H, T, D)."""
    batch, heads, query_count, head_dim = q.shape
    key_count = k.shape[2]
    group = heads // k.shape[1]
    seed, keep_scale, drop_below = dropout_arguments(dropout_p, dropout_seed)
    together = heads_in_cache(batch * heads, ceil_div(key_count, group), q)

    def launch(tile: AttentionTile) -> None:
        with on_device(q):
            _query_gradient_kernel[(ceil_div(query_count, tile.query_block) * batch * heads,)](
                q, k, v, grad_out, lse, delta, correction, dq, seed, kv_lengths, window, scale * LOG2_E.value,
                scale, keep_scale, drop_below, query_count, key_count, batch * heads, heads, group, together,
                *in_units(q, k, v, grad_out, dq), HEAD_DIM=head_dim, DIM_BLOCK=head_dim_block(q),
                QUERY_BLOCK=tile.query_block, KEY_BLOCK=tile.key_block, CAUSAL=causal, PRECISION=precision(q),
                **scheduled(tile),
            )  # fmt: skip

    tried = candidates((32, 64, 128), (16, 32, 64, 128))
    launch(choose("attention_query_gradient", AttentionTile, q, tried, launch, **tile_key(q), heavy=seed is not None))
