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
) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, _), S = q.shape, k.shape[2]
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    visible = _visible(B, T, S, kv_lengths, q.device)
    scores = (scale * q @ k.transpose(-2, -1)).masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1, keepdim=True)  # rows that see no key: their softmax would be 0/0
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(~visible, 0.0)
    if dropout_p > 0:
        assert dropout_seed is not None
        weights = weights * _kept(int(dropout_seed), dropout_p, B, H, T, S).to(weights.device) / (1 - dropout_p)
    return weights @ v


def _visible(B: int, T: int, S: int, kv_lengths: Tensor | None, device: torch.device) -> Tensor:
    """(B, 1, T, S) bool: a sequence's queries are its last T positions, and each sees the keys up to its own."""
    lengths = [S] * B if kv_lengths is None else [min(max(0, length), S) for length in kv_lengths.tolist()]
    masks = [torch.ones(T, S, dtype=torch.bool, device=device).tril(length - T) for length in lengths]
    return torch.stack(masks).unsqueeze(1) if masks else torch.ones(0, 1, T, S, dtype=torch.bool, device=device)


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


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    x = x.double()
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = x.double() @ weight.double().T
    y = y if bias is None else y + bias.double()
    return y if activation is None else gelu(y, "tanh" if activation == "gelu_tanh" else "none")


def quantized_linear(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    if values.dtype == torch.int8:
        weight = values.double() * scale.double()[:, None]
    else:  # element 2j in the low half of byte j, 2j + 1 in the high one; groups of 32 share a scale
        integers = torch.stack([values % 16, values // 16], dim=-1).flatten(1).double() - 8
        weight = (integers * scale.double().repeat_interleave(32, dim=1))[:, : x.shape[-1]]
    return linear(x, weight, bias, activation)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    log_probabilities = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    counted = targets != ignore_index
    picked = log_probabilities.gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counted).sum() / counted.sum()
