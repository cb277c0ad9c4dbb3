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
    window: int | None = None,
) -> Tensor:
    visible = visible_keys(q.shape[2], k.shape[2], kv_lengths, q.device, window)
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
    lengths = torch.full((B,), S, device=q.device) if kv_lengths is None else kv_lengths
    visible = (torch.arange(S, device=q.device) < lengths.view(B, 1, 1, 1)).expand(B, 1, T, S)
    return _attention(q, k, v, visible, scale, dropout_p, dropout_seed)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:
    """Over the keys that `visible` (B or 1, 1, T, S) says; 0 for a query that sees none."""
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, _), S = q.shape, k.shape[2]
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    scores = (scale * q @ k.transpose(-2, -1)).masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1, keepdim=True)  # rows that see no key: their softmax would be 0/0
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(~visible, 0.0)
    if dropout_p > 0:
        assert dropout_seed is not None
        weights = weights * dropout_keep(dropout_seed, dropout_p, B, H, T, S) / (1 - dropout_p)
    return weights @ v


def visible_keys(T: int, S: int, kv_lengths: Tensor | None, device: torch.device, window: int | None = None) -> Tensor:
    """(1 or B, 1, T, S) bool: query t, at position p = length - T + t, sees keys p - window + 1 … p."""
    key = torch.arange(S, device=device)
    query = torch.arange(T, device=device).view(T, 1)
    length = torch.tensor([S], device=device) if kv_lengths is None else kv_lengths.clamp(0, S)
    position = length.view(-1, 1, 1, 1) - T + query
    return (key <= position) if window is None else (key <= position) & (key > position - window)


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
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    return linear(x, dequantize(values, scale, x.shape[-1]), bias, activation)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    log_probabilities = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    counted = targets != ignore_index
    picked = log_probabilities.gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counted).sum() / counted.sum()
