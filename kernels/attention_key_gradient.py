"""The gradients of keys and values in attention, one program a tile of keys of one key/value head.

    P = 2^(s - lse)        dP = dropout'(dO V^T)        dS = P * (dP - delta)
    dK = scale * dS^T Q        dV = dropout(P)^T dO

The program loops over the query heads that share its keys, so that grouped heads need no sum outside, and over the
queries that see any of its keys. Everything is recomputed from the log-sum-exp as in attention_query_gradient.py (Dao,
FlashAttention-2, arXiv:2307.08691, algorithm 2). A second kernel costs two more dots a tile than one that adds dQ
atomically, and gives the same bits in every run.
"""

import torch
import triton
import triton.language as tl

from .attention_mask import loop_over, query_runs, sees, sees_several, tile_of, visible_length
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
def _key_gradients(
    key_gradient, value_gradient, key, value, keys, dims, q, grad_out, lse, delta, correction, q_stride, grad_stride,
    runs, query_count, length, offset, window, scale, seed, head, keep_scale, drop_below, HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries contribute to the gradients of a tile of keys and values.

    Everything is transposed, (keys, queries), so that P^T and dS^T come out of the first dots as the operands of the
    second ones.
    """
    first, last = loop_over(runs, MASKED)
    for count in range(first, last, QUERY_BLOCK):
        first_query = tile_of(count, runs, MASKED)
        queries = first_query + tl.arange(0, QUERY_BLOCK)
        query = load_rows(q, first_query, q_stride, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
        log_sum = load_log_sum(lse + queries, queries < query_count)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        probabilities = tl.exp2(scores * scale - log_sum[None, :])
        if correction is not None:
            probabilities *= tl.load(correction + queries, mask=queries < query_count, other=0.0)[None, :]
        if MASKED:
            visible = sees(queries[None, :] + offset, keys[:, None], length=length, window=window, CAUSAL=CAUSAL)
            probabilities = tl.where(visible, probabilities, 0.0)
        gradient = load_rows(grad_out, first_query, grad_stride, query_count, dims, HEAD_DIM, QUERY_BLOCK, True)
        probability_gradient = tl.dot(value, tl.trans(gradient), input_precision=PRECISION)
        delta_row = tl.load(delta + queries, mask=queries < query_count, other=0.0)
        if seed is not None:
            kept = survives(seed, queries[None, :], keys[:, None], head, drop_below)
            dropped = tl.where(kept, probabilities * keep_scale, 0.0)
            probability_gradient = tl.where(kept, probability_gradient * keep_scale, 0.0)
            value_gradient = tl.dot(dropped.to(gradient.dtype), gradient, value_gradient, input_precision=PRECISION)
        else:
            value_gradient = tl.dot(
                probabilities.to(gradient.dtype), gradient, value_gradient, input_precision=PRECISION
            )
        score_gradient = probabilities * (probability_gradient - delta_row[None, :])
        if MASKED:
            several = sees_several(queries[None, :] + offset, length, window, CAUSAL)
            score_gradient = tl.where(several, score_gradient, 0.0)
        key_gradient = tl.dot(score_gradient.to(query.dtype), query, key_gradient, input_precision=PRECISION)
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=[
    "window", "query_count", "key_count", "kv_heads", "kv_head_count", "heads_together", "drop_below", "q_batch",
    "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "grad_batch", "grad_head",
    "grad_row", "dk_batch", "dk_head", "dk_row",
])  # fmt: skip
def _key_gradient_kernel(
    q, k, v, grad_out, lse, delta, correction, dk, dv, dropout_seed, lengths, window, scale, plain_scale, keep_scale,
    drop_below, query_count, key_count, kv_heads, kv_head_count, heads_together, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row, dk_batch, dk_head, dk_row,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key/value head: dK and dV (which share their strides), summed over the query heads of
    its group.
    """
    tiles = tl.cdiv(key_count, KEY_BLOCK)
    head_index, tile = head_and_tile(tl.program_id(0), tiles, kv_heads, heads_together)
    first_key = tile * KEY_BLOCK  # the first keys are seen by the most queries: longest first
    batch = (head_index // kv_head_count).to(tl.int64)
    head = (head_index % kv_head_count).to(tl.int64)
    length = visible_length(lengths, batch, key_count)
    offset = length - query_count

    dims = tl.arange(0, DIM_BLOCK)
    keys = first_key + tl.arange(0, KEY_BLOCK)
    k += (batch * k_batch + head * k_head) * UNIT
    v += (batch * v_batch + head * v_head) * UNIT
    key = load_rows(k, first_key, k_row * UNIT, length, dims, HEAD_DIM, KEY_BLOCK, True)
    value = load_rows(v, first_key, v_row * UNIT, length, dims, HEAD_DIM, KEY_BLOCK, True)
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)

    runs = query_runs(first_key, length, offset, query_count, window, QUERY_BLOCK, KEY_BLOCK, CAUSAL)
    key_gradient = tl.zeros([KEY_BLOCK, DIM_BLOCK], tl.float32)
    value_gradient = tl.zeros([KEY_BLOCK, DIM_BLOCK], tl.float32)
    for member in range(0, GROUP):
        query_head = head * GROUP + member
        flat_head = batch * kv_head_count * GROUP + query_head
        q_base = q + (batch * q_batch + query_head * q_head) * UNIT
        grad_base = grad_out + (batch * grad_batch + query_head * grad_head) * UNIT
        lse_base = lse + flat_head * query_count
        delta_base = delta + flat_head * query_count
        correction_base = None
        if correction is not None:
            correction_base = correction + flat_head * query_count
        for unmasked in tl.static_range(2):
            key_gradient, value_gradient = _key_gradients(
                key_gradient, value_gradient, key=key, value=value, keys=keys, dims=dims, q=q_base, grad_out=grad_base,
                lse=lse_base, delta=delta_base, correction=correction_base, q_stride=q_row * UNIT,
                grad_stride=grad_row * UNIT, runs=runs, query_count=query_count, length=length, offset=offset,
                window=window, scale=scale, seed=seed, head=flat_head, keep_scale=keep_scale, drop_below=drop_below,
                HEAD_DIM=HEAD_DIM, QUERY_BLOCK=QUERY_BLOCK, MASKED=unmasked == 0, CAUSAL=CAUSAL, PRECISION=PRECISION,
            )  # fmt: skip

    dk += (batch * dk_batch + head * dk_head) * UNIT
    dv += (batch * dk_batch + head * dk_head) * UNIT
    store_rows(dk, key_gradient * plain_scale, first_key, dk_row * UNIT, key_count, dims, HEAD_DIM, KEY_BLOCK)
    store_rows(dv, value_gradient, first_key, dk_row * UNIT, key_count, dims, HEAD_DIM, KEY_BLOCK)


# ------------------------------------------------------------------------------------------------------------ launching


def key_gradient(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    correction: torch.Tensor | None,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> None:
    """Fills dk and dv (B, Hkv, S, D), which share their strides."""
    batch, heads, query_count, head_dim = q.shape
    kv_heads, key_count = k.shape[1], k.shape[2]
    group = heads // kv_heads
    seed, keep_scale, drop_below = dropout_arguments(dropout_p, dropout_seed)
    together = heads_in_cache(batch * kv_heads, query_count * group, q)

    def launch(tile: AttentionTile) -> None:
        with on_device(q):
            _key_gradient_kernel[(ceil_div(key_count, tile.key_block) * batch * kv_heads,)](
                q, k, v, grad_out, lse, delta, correction, dk, dv, seed, kv_lengths, window,
                scale * LOG2_E.value, scale, keep_scale, drop_below, query_count, key_count, batch * kv_heads, kv_heads,
                together, *in_units(q, k, v, grad_out, dk), HEAD_DIM=head_dim, DIM_BLOCK=head_dim_block(q),
                QUERY_BLOCK=tile.query_block, KEY_BLOCK=tile.key_block, GROUP=group, CAUSAL=causal,
                PRECISION=precision(q), **scheduled(tile),
            )  # fmt: skip

    tried = candidates((16, 32, 64, 128), (32, 64, 128))
    heavy = seed is not None or group > 1  # both hold more in registers
    launch(choose("attention_key_gradient", AttentionTile, q, tried, launch, **tile_key(q), heavy=heavy))
