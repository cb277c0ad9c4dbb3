"""Attention, forward and backward, without ever storing the (T, S) matrix of probabilities.

    S = scale * Q K^T,  masked to the keys each query may see
    P = softmax(S),     out = dropout(P) V,     lse = log sum exp(S)

    attention_forward.py         many queries: one program a tile of queries
    attention_decoding.py        few queries: the keys split between programs, then merged
    attention_delta.py           backward: delta = rowsum(dO * out), one number a query
    attention_query_gradient.py  backward: dQ, one program a tile of queries
    attention_key_gradient.py    backward: dK and dV, one program a tile of keys
    attention_mask.py            which keys a query sees, and which tiles are visited
    attention_tiles.py           what else they share

Which keys a query sees: with T queries against the first `length` of S keys, query t stands at position p = length - T
+ t and sees keys 0 .. p, so that the last query sees all; with a window W (0 is none) only those after p - W; and
without `causal` all `length`, whatever its position. A query may see no key (length < T): its output is 0, its lse is
-inf, its gradients are 0.

Head dims that are no multiple of 16 are padded with zeros, which change no product: rows that start anywhere would have
to be read an element at a time.
"""

import torch
from torch.nn.functional import pad

from .attention_decoding import DecodingTile, decode, is_few
from .attention_delta import delta_from_keys, delta_of_rows
from .attention_forward import ForwardTile, forward
from .attention_forward import key as forward_key
from .attention_key_gradient import key_gradient
from .attention_mask import window_argument
from .attention_query_gradient import query_gradient
from .attention_tiles import UNIT, empty_heads_last, tile_key, walkable
from .tuning import describe as describe_tile


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    window: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> out (B, H, T, D), lse (B, H, T) in float32."""
    out = empty_heads_last(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    if padding := -q.shape[3] % UNIT.value:
        q, k, v = (pad(tensor, (0, padding)) for tensor in (q, k, v))
        wide, lse = causal_attention(q, k, v, scale, dropout_p, dropout_seed, kv_lengths, window, causal)
        return out.copy_(wide[..., :-padding]), lse
    q, k, v, within = walkable(q), walkable(k), walkable(v), window_argument(window, k.shape[2])
    if dropout_p <= 0.0 and is_few(q, k):
        decode(q, k, v, out, lse, scale, kv_lengths, within, causal)
    else:
        forward(q, k, v, out, lse, scale, dropout_p, dropout_seed, kv_lengths, within, causal)
    return out, lse


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
    window: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, from what the forward pass got and gave."""
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    if lse.numel() == 0 or q.shape[3] == 0:
        return dq, dk.zero_(), dv.zero_()
    if padding := -q.shape[3] % UNIT.value:
        grad_out, q, k, v, out = (pad(tensor, (0, padding)) for tensor in (grad_out, q, k, v, out))
        wide = causal_attention_backward(
            grad_out, q, k, v, out, lse, scale, dropout_p, dropout_seed, kv_lengths, window, causal
        )
        for gradient, padded in zip((dq, dk, dv), wide, strict=True):
            gradient.copy_(padded[..., :-padding])
        return dq, dk, dv
    grad_out, out, lse = walkable(grad_out), walkable(out), lse.contiguous()
    q, k, v = walkable(q), walkable(k), walkable(v)
    inputs = (scale, dropout_p, dropout_seed, kv_lengths, window_argument(window, k.shape[2]), causal)
    if q.dtype == torch.float32:
        delta, correction = delta_from_keys(grad_out, q, k, v, lse, *inputs)
    else:
        delta, correction = delta_of_rows(grad_out, out), None
    query_gradient(grad_out, q, k, v, lse, delta, correction, dq, *inputs)
    key_gradient(grad_out, q, k, v, lse, delta, correction, dk, dv, *inputs)
    return dq, dk, dv


def describe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, **_: object) -> str:
    """Which kernel and configuration `causal_attention` takes for these tensors."""
    if dropout_p <= 0.0 and is_few(q, k):
        return describe_tile("attention_decoding", DecodingTile, q, **tile_key(q))
    return describe_tile("attention_forward", ForwardTile, q, **forward_key(q, dropout_p > 0.0))
