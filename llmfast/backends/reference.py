"""What every backend is held to: the contract in float64, written as its formulas. For tests, not for speed.

It shares no code with what it judges: its mask, its random numbers and its reading of quantised weights are its own.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on this device and dtype: it always can."""
    return None


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    visible = torch.zeros(B, 1, T, S, dtype=torch.bool, device=q.device)
    for sequence, length in enumerate([S] * B if kv_lengths is None else kv_lengths.tolist()):
        for t in range(T):
            position = min(max(0, length), S) - T + t
            first = 0 if window is None else max(0, position - window + 1)
            visible[sequence, :, t, first : max(0, position + 1)] = True
    return _attention(q, k, v, visible, scale, dropout_p, dropout_seed)


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    visible = torch.ones(B, 1, T, S, dtype=torch.bool, device=q.device)
    for sequence, length in enumerate([] if kv_lengths is None else kv_lengths.tolist()):
        visible[sequence, ..., max(0, length) :] = False
    return _attention(q, k, v, visible, scale, dropout_p, dropout_seed)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:
    """Over the keys that `visible` (B, 1, T, S) says; 0 for a query that sees none."""
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, _), S = q.shape, k.shape[2]
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    scores = (scale * q @ k.transpose(-2, -1)).masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1, keepdim=True)  # rows that see no key: their softmax would be 0/0
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(~visible, 0.0)
    if dropout_p > 0:
        assert dropout_seed is not None
        weights = weights * _kept(int(dropout_seed), dropout_p, B, H, T, S).to(weights.device) / (1 - dropout_p)
    return weights @ v


def _kept(seed: int, p: float, B: int, H: int, T: int, S: int) -> Tensor:
    """(B, H, T, S) bool: the weights that dropout keeps, those whose word of Philox4x32-10 begins with 31 bits of at
    least p · 2³¹ (Salmon et al., 2011)."""
    low = np.uint64(0xFFFFFFFF)
    head, query, key = (index.astype(np.uint64) for index in np.indices((B * H, T, S)))
    x0, x1, x2, x3 = key, query, head, np.zeros_like(key)
    keys = [seed % 2**32, seed // 2**32 % 2**32]
    for _ in range(10):
        first, third = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0 = third >> np.uint64(32) ^ x1 ^ np.uint64(keys[0])
        x2 = first >> np.uint64(32) ^ x3 ^ np.uint64(keys[1])
        x1, x3 = third & low, first & low
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return torch.from_numpy(x0 // np.uint64(2) >= np.uint64(int(p * 2**31))).view(B, H, T, S)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.double()
    return normed if bias is None else normed + bias.double()


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x.double() + residual.double()
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x.double() + residual.double()
    return rms_norm(total, weight, eps), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    half = cos.shape[-1]
    pair = torch.arange(half, device=x.device)
    first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    turned = x.clone()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    x = x.double()
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    return x if activation is None else gelu(x, "tanh" if activation == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = x.double() @ weight.double().T
    return _activate(y if bias is None else y + bias.double(), activation)


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    return linear(x, gate_weight, gate_bias, activation) * linear(x, up_weight, up_bias)


def quantized_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    minimum: Tensor | None = None,
    scale_code: Tensor | None = None,
    minimum_code: Tensor | None = None,
) -> Tensor:
    k = torch.arange(x.shape[-1], device=x.device)
    if values.dtype == torch.int8:
        integers = values.double()
    else:  # element 2j in the low half of byte j, 2j + 1 in the high one
        integers = ((values[:, k // 2] >> (4 * (k % 2))) % 16).double() - (8 if minimum is None else 0)

    def of_elements(numbers: Tensor, codes: Tensor | None) -> Tensor:
        if numbers.ndim == 1:  # one for the row
            return numbers.double()[:, None]
        if codes is None:  # one for 32
            return numbers.double()[:, k // 32]
        return numbers.double()[:, k // 256] * codes.double()[:, k // 32]

    weight = integers * of_elements(scale, scale_code)
    if minimum is not None:
        weight = weight + of_elements(minimum, minimum_code)
    return linear(x, weight, bias, activation)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    log_probabilities = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    counted = targets != ignore_index
    picked = log_probabilities.gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counted).sum() / counted.sum()
