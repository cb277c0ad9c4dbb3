"""The operations a language model is made of: one documented function each.

These functions are the contract between models and kernels. Each checks its arguments, picks a backend
(`llmfast.use_backend`, or the best that the device has) and calls the function of the same name there. It never
computes anything itself. Shapes are written (B, T, C): batch, tokens, channels; H heads of D channels.

Common to all: float32, bfloat16 and, on a GPU, float16; results in the dtype of the inputs, computed in float32.
Inputs may be strided or empty and are never changed. The same inputs give the same bits at the same thread count.
The compiled kernels go backward once. For `torch.func` and forward mode "auto" takes PyTorch's operators; second
derivatives need `use_backend("pytorch")`, and attention's `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` besides.
What a backend can't differentiate is an error.
Wrong arguments raise `ValueError` naming the argument, its shape and what was expected. Under `torch.autocast` the
matrix products (attention, linear, cross-entropy) run in the autocast dtype, the others in the widest dtype given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmfast.backends import select
from llmfast.quantization.encodings import encoding_of
from llmfast.quantization.formats import FORMATS

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v, the attention of Vaswani et al. (2017) with a causal mask.

    q is (B, H, T, D); k and v are (B, Hkv, S, D) with S ≥ T and Hkv dividing H (grouped heads: query head h reads
    key head h // (H / Hkv)). The result is (B, H, T, D).

    Queries are the last T positions: query t is at position p = S-T+t and sees keys 0 … p. With `kv_lengths` (B,)
    integers, sequence b has only its first `kv_lengths[b]` keys (clamped to 0 … S), and p = kv_lengths[b]-T+t; a query
    that sees none gives 0. With a `window` W ≥ 1 it sees the last W of these keys only, p-W+1 … p (Beltagy et al.,
    2020). Keys beyond a length must be finite but are otherwise ignored.

    `scale` defaults to D^-0.5. `dropout_p` drops attention weights by a Philox4x32-10 stream keyed by `dropout_seed`
    (an int64 tensor of one element, drawn from torch's generator when None), at counter (key, query, b·H + h, 0).
    """
    if q.ndim == k.ndim == 4 and k.shape[2] < q.shape[2]:
        raise ValueError(f"k must hold at least as many tokens as q, got {_shapes(q=q, k=k)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query sees its own key), got {window}")
    q, k, v, settings = _attention(q, k, v, scale, dropout_p, dropout_seed, kv_lengths)
    if window is not None:  # a backend without windows serves every call that has none
        settings["window"] = window
    return select("causal_attention", q, head_dim=q.shape[3])(q, k, v, **settings)


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v: every query sees every key, as in an encoder, or across two sequences.

    All is as in `causal_attention`, but for the mask: q is (B, H, T, D), k and v are (B, Hkv, S, D) with any T and S.
    With `kv_lengths` (B,) integers, which a padded batch has, each query of sequence b sees keys 0 …
    kv_lengths[b]-1; where there are none it gives 0.
    """
    q, k, v, settings = _attention(q, k, v, scale, dropout_p, dropout_seed, kv_lengths)
    return select("bidirectional_attention", q, head_dim=q.shape[3])(q, k, v, **settings)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    kv_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The checked tensors and settings of a call, as backends get them."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v must be (batch, heads, tokens, head_dim), got {_shapes(q=q, k=k, v=v)}")
    B, H, _, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k and v must be (B, Hkv, S, D) with q's B and D, got {_shapes(q=q, k=k, v=v)}")
    if k.shape[1] != H and (k.shape[1] == 0 or H % k.shape[1]):
        raise ValueError(f"the heads of k must divide the heads of q, got {_shapes(q=q, k=k)}")
    if kv_lengths is not None and (kv_lengths.shape != (B,) or kv_lengths.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"kv_lengths must be {B} int64 or int32, one a sequence, got {_shapes(kv_lengths=kv_lengths)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = torch.randint(2**62, (1,), device=q.device)
    if dropout_seed is not None and (dropout_seed.numel() != 1 or dropout_seed.dtype != torch.int64):
        raise ValueError(f"dropout_seed must be one int64, got {_shapes(dropout_seed=dropout_seed)}")
    for name, t in (("kv_lengths", kv_lengths), ("dropout_seed", dropout_seed)):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, but is on {t.device}")
    q, k, v = _autocast(q, k, v)
    _same_kind(q=q, k=k, v=v)
    settings = {
        "scale": 1 / math.sqrt(max(1, D)) if scale is None else scale,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "kv_lengths": kv_lengths,
    }
    return q, k, v, settings


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension (Ba et al., 2016).

    x is (..., N), weight and bias are (N,), bias may be None; statistics are in float32. The result has x's shape.
    """
    _check_norm(x, weight, bias)
    x, weight, bias = _promote(x, weight, bias)
    _same_kind(x=x, weight=weight, bias=bias)
    return select("layer_norm", x)(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The residual step of a transformer: `sum = x + residual`, and `layer_norm(sum)`, in one pass.

    x and residual are (..., N), weight and bias (N,). Returns (normed, sum), both of x's shape.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have one shape, got {_shapes(x=x, residual=residual)}")
    _check_norm(x, weight, bias)
    x, residual, weight, bias = _promote(x, residual, weight, bias)
    _same_kind(x=x, residual=residual, weight=weight, bias=bias)
    return select("add_layer_norm", x)(x, residual, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich, 2019).

    x is (..., N), weight (N,); the mean and the product with weight are in float32. The result has x's shape.
    """
    _check_norm(x, weight)
    x, weight = _promote(x, weight)
    _same_kind(x=x, weight=weight)
    return select("rms_norm", x)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The residual step of a Llama: `sum = x + residual`, and `rms_norm(sum)`, in one pass.

    x and residual are (..., N), weight (N,). Returns (normed, sum), both of x's shape.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have one shape, got {_shapes(x=x, residual=residual)}")
    _check_norm(x, weight)
    x, residual, weight = _promote(x, residual, weight)
    _same_kind(x=x, residual=residual, weight=weight)
    return select("add_rms_norm", x)(x, residual, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns pairs of channels by an angle that grows with the position (RoPE: Su et al., 2021).

    x is (B, H, T, D), queries or keys; cos and sin are (B or 1, T, R/2) float32, of each token's angles, R ≤ D. The
    first R channels turn, in the pairs (i, i + R/2) for i < R/2, or (2i, 2i + 1) if `interleaved`; the rest passes:

        a' = a cos - b sin,    b' = b cos + a sin

    The result has x's shape and dtype. cos and sin take no gradients.
    """
    if x.ndim != 4 or cos.ndim != 3 or cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[2]:
        raise ValueError(f"x must be (B, H, T, D), cos (B or 1, T, R/2), got {_shapes(x=x, cos=cos)}")
    if sin.shape != cos.shape or 2 * cos.shape[2] > x.shape[3]:
        raise ValueError(
            f"cos and sin must be of one shape (B or 1, T, R/2), R ≤ D, got {_shapes(x=x, cos=cos, sin=sin)}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must be float32, got {cos.dtype} and {sin.dtype}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rotary has no gradients for cos and sin: give them detached")
    _same_device(x=x, cos=cos, sin=sin)
    return select("rotary", x)(x, cos, sin, interleaved=interleaved)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """The Gaussian error linear unit x · Φ(x) (Hendrycks & Gimpel, 2016), of any shape.

    "none" is 0.5 x (1 + erf(x / √2)); "tanh", GPT-2's, is 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate must be "tanh" or "none", got {approximate!r}')
    return select("gelu", x)(x, approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x weightᵀ + bias): x (..., K), weight (N, K), bias (N,) -> (..., N).

    `activation` is None, "silu" (x · sigmoid(x)), "gelu" or "gelu_tanh"; it is applied before the result is rounded to
    x's dtype.
    """
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., K) and weight (N, K), got {_shapes(x=x, weight=weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (N,) for a weight (N, K), got {_shapes(bias=bias, weight=weight)}")
    _check_activation(activation, None, *ACTIVATIONS)
    x, weight, bias = _autocast(x, weight, bias)
    _same_kind(x=x, weight=weight, bias=bias)
    return select("linear", x)(x, weight, bias, activation)


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """activation(x gate_weightᵀ + gate_bias) · (x up_weightᵀ + up_bias), a gated linear unit (Shazeer, 2020).

    x is (..., K), the weights (N, K), the biases (N,) -> (..., N). `activation` is "silu" (the SwiGLU of Llama), "gelu"
    or "gelu_tanh" (GEGLU). The product of the two is rounded once, to x's dtype.
    """
    if x.ndim < 1 or gate_weight.ndim != 2 or x.shape[-1] != gate_weight.shape[1]:
        raise ValueError(f"x must be (..., K) and gate_weight (N, K), got {_shapes(x=x, gate_weight=gate_weight)}")
    if up_weight.shape != gate_weight.shape:
        raise ValueError(
            f"up_weight must have gate_weight's shape, got {_shapes(gate_weight=gate_weight, up_weight=up_weight)}"
        )
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None and bias.shape != gate_weight.shape[:1]:
            raise ValueError(
                f"{name} must be (N,) for weights (N, K), got {_shapes(bias=bias, gate_weight=gate_weight)}"
            )
    _check_activation(activation, *ACTIVATIONS)
    x, gate_weight, up_weight, gate_bias, up_bias = _autocast(x, gate_weight, up_weight, gate_bias, up_bias)
    _same_kind(x=x, gate_weight=gate_weight, up_weight=up_weight, gate_bias=gate_bias, up_bias=up_bias)
    return select("gated_linear", x)(x, gate_weight, up_weight, gate_bias, up_bias, activation)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The mean of -log softmax(hidden weightᵀ)[target]: a language model's head and its loss, in chunks of rows.

    hidden is (..., K), weight (V, K), targets (...) int64 in [0, V) or `ignore_index`. Returns the mean over the
    targets that are not ignored, in nats, as a float32 scalar (nan when all are ignored). The (rows, V) logits are
    never in memory as a whole, forward or backward. Any other target is a `RuntimeError` on a CPU, undefined on a GPU.
    """
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be (..., K) and weight (V, K), got {_shapes(hidden=hidden, weight=weight)}")
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64 or targets.device != hidden.device:
        raise ValueError(
            f"targets must be int64 on hidden's device, with its shape before K, got {targets.dtype} on "
            f"{targets.device}, {_shapes(targets=targets, hidden=hidden)}"
        )
    hidden, weight = _autocast(hidden, weight)
    _same_kind(hidden=hidden, weight=weight)
    return select("linear_cross_entropy", hidden)(hidden, weight, targets, ignore_index=ignore_index)


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
    """`linear` on a weight (N, K) in a format of `llmfast.quantization`: x (..., K) -> (..., N).

    The weight's parts, with G = ⌈K/32⌉ and S = ⌈K/256⌉; `llmfast.quantization.encodings` says what they mean:

        int8   values int8 (N, K), scale float32 (N,)
        int4   values uint8 (N, 16 G), scale bfloat16 (N, G)
        q8_0   values int8 (N, K), scale float16 (N, G)
        q4_1   values uint8 (N, 16 G), scale and minimum float16 (N, G)
        q4_k   values uint8 (N, 16 G), scale and minimum float16 (N, S), scale_code and minimum_code uint8 (N, G)

    The result is that of the weights which they stand for, and so are the gradients of x and bias; the parts take none
    (what is trained of a quantised model stands beside them). A backend is called with
    the parts that a format has beyond values and scale as keywords.
    """
    optional = {"minimum": minimum, "scale_code": scale_code, "minimum_code": minimum_code}
    beyond = {name: part for name, part in optional.items() if part is not None}
    parts = {"values": values, "scale": scale, **beyond}
    N, K = values.shape[0] if values.ndim else 0, x.shape[-1] if x.ndim else 0
    encoding = encoding_of(parts)
    if encoding is None:
        kinds = ", ".join(f"{name} {part.dtype}" for name, part in parts.items())
        raise ValueError(f"values and scale must be those of a weight in {', '.join(FORMATS)}, got {kinds}")
    expected = {name: shape for name, (shape, _) in encoding.layout(N, K).items()}
    if x.ndim < 1 or {name: tuple(part.shape) for name, part in parts.items()} != expected:
        shapes = ", ".join(f"{name} {shape}" for name, shape in expected.items())
        raise ValueError(
            f"for x (..., K) a weight (N, K) in {encoding.name} must have {shapes}, got {_shapes(x=x, **parts)}"
        )
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be (N,) for values (N, …), got {_shapes(bias=bias, values=values)}")
    _check_activation(activation, None, *ACTIVATIONS)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts.values()):
        raise ValueError("quantized_linear has no gradients for the parts of a weight: give them detached")
    x, bias = _autocast(x, bias)
    _same_kind(x=x, bias=bias)
    _same_device(x=x, **parts)
    return select("quantized_linear", x)(x, values, scale, bias, activation, **beyond)


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be (N,) for x (..., N), got {_shapes(weight=weight, x=x)}")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"bias must have weight's shape, got {_shapes(bias=bias, weight=weight)}")


def _check_activation(activation: str | None, *known: str | None) -> None:
    if activation not in known:
        raise ValueError(f"activation must be one of {', '.join(map(repr, known))}, got {activation!r}")


def _same_kind(**tensors: Tensor | None) -> None:
    """All of one dtype and on one device, as every kernel expects."""
    given = [t for t in tensors.values() if t is not None]
    if any(t.dtype != given[0].dtype or t.device != given[0].device for t in given):
        kinds = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"the tensors must share one dtype and one device, got {kinds}")


def _same_device(**tensors: Tensor) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"the tensors must be on one device, got {places}")


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor | None) -> tuple:
    """The tensors in autocast's dtype, where autocast is on for their device."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def _promote(*tensors: Tensor | None) -> tuple:
    """The tensors in the widest dtype among them, where autocast is on for their device."""
    first: Tensor = tensors[0]  # type: ignore[assignment]
    if not _autocasts(first.device.type):
        return tensors
    dtype = first.dtype
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
