"""What every backend is held to: the contract in float64, written as its formulas. For tests, not for speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmfast.backends.philox import dropout_keep
from llmfast.quantization.formats import dequantize


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
    visible = visible_keys(T, S, kv_lengths, q.device)
    scores = (scale * q @ k.transpose(-2, -1)).masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1, keepdim=True)  # rows that see no key: their softmax would be 0/0
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(~visible, 0.0)
    if dropout_p > 0:
        assert dropout_seed is not None
        weights = weights * dropout_keep(dropout_seed, dropout_p, B, H, T, S) / (1 - dropout_p)
    return weights @ v


def visible_keys(T: int, S: int, kv_lengths: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B, 1, T, S) bool: query t sees keys 0 … length - T + t."""
    key = torch.arange(S, device=device)
    query = torch.arange(T, device=device).view(T, 1)
    length = torch.tensor([S], device=device) if kv_lengths is None else kv_lengths.clamp(0, S)
    return key <= length.view(-1, 1, 1, 1) - T + query


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
    return linear(x, dequantize(values, scale, x.shape[-1]), bias, activation)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    log_probabilities = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    counted = targets != ignore_index
    picked = log_probabilities.gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counted).sum() / counted.sum()
