"""The contract in PyTorch's own operators: runs everywhere, and is the peer that our kernels have to beat."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmfast.backends.derivatives import transformed
from llmfast.backends.philox import dropout_keep
from llmfast.quantization.formats import dequantize

# The most memory that one chunk of logits takes in linear_cross_entropy: on a CPU, what stays in its cache (fresh
# pages for large temporaries cost more than the arithmetic on them); on a GPU, enough rows for an efficient product.
LOGITS_BYTES = {"cpu": 8 << 20}
LOGITS_BYTES_ELSEWHERE = 128 << 20
CAPTURABLE = True  # in a CUDA graph, forward


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on this device and dtype: it always can."""
    return None


def describe(op: str, *args: Any, **kwargs: Any) -> str:
    """What is worth saying of a call, for `llmfast.explain`."""
    return "the weights are made floats in every call" if op == "quantized_linear" else ""


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
    T, S = q.shape[2], k.shape[2]
    if dropout_p == 0 and kv_lengths is None and window is None and T == S > 0 and q.numel() > 0:
        # SDPA's own causal mask is aligned top-left, the contract's bottom-right.
        return _sdpa(q, k, v, is_causal=True, scale=scale)
    if T == 1 and kv_lengths is None and window is None:
        visible = None
    else:
        visible = visible_keys(T, S, kv_lengths, q.device, window)
    # Without lengths every query sees at least its own key.
    return _attention(q, k, v, visible, scale, dropout_p, dropout_seed, seeing_all=kv_lengths is None)


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
    visible = None
    if kv_lengths is not None:
        visible = torch.arange(k.shape[2], device=q.device) < kv_lengths.view(-1, 1, 1, 1)
    return _attention(q, k, v, visible, scale, dropout_p, dropout_seed, seeing_all=kv_lengths is None)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    seeing_all: bool,
) -> Tensor:
    """Over the keys that `visible` (B or 1, 1, T or 1, S) says, or all; `seeing_all`: no query sees none."""
    (B, H, T, _), S = q.shape, k.shape[2]
    if q.numel() == 0 or S == 0:
        return q * 0.0 + (k.sum() + v.sum()) * 0.0  # nothing to compute, but k and v have gradients (of zeros) too
    seeing = None
    if visible is not None and not seeing_all:
        seeing = visible.any(-1, keepdim=True)
        # A row that sees nothing looks at key 0, so that its softmax is finite, and is zeroed afterwards.
        visible = visible | (~seeing & (torch.arange(S, device=q.device) == 0))
    if dropout_p == 0:
        out = _sdpa(q, k, v, attn_mask=visible, scale=scale)
    else:
        assert dropout_seed is not None
        if k.shape[1] != H:
            k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
        scores = scale * (q @ k.transpose(-2, -1)).float()
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        weights = torch.softmax(scores, dim=-1) * dropout_keep(dropout_seed, dropout_p, B, H, T, S) / (1 - dropout_p)
        out = weights.to(v.dtype) @ v
    return out if seeing is None else torch.where(seeing, out, torch.zeros((), dtype=out.dtype, device=out.device))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    # SDPA's fused kernels have backward only; what it does without them, MATH, has every derivative.
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1], **settings)


def visible_keys(T: int, S: int, kv_lengths: Tensor | None, device: torch.device, window: int | None = None) -> Tensor:
    """(1 or B, 1, T, S) bool: query t, at position p = length - T + t, sees keys p - window + 1 … p."""
    key = torch.arange(S, device=device)
    query = torch.arange(T, device=device).view(T, 1)
    length = torch.tensor([S], device=device) if kv_lengths is None else kv_lengths.clamp(0, S)
    position = length.view(-1, 1, 1, 1) - T + query
    return (key <= position) if window is None else (key <= position) & (key > position - window)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    if not transformed():
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    # PyTorch's forward derivative of layer_norm's gradient is wrong (pytorch/pytorch#196700); the formula's is not.
    centred = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = centred - centred.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for all heads
    turning, passing = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    pairs = turning.float() if x.dtype in (torch.bfloat16, torch.float16) else turning
    a, b = pairs.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else pairs.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    together = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((together.to(x.dtype), passing), dim=-1)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return x if activation is None else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    return _activate(F.linear(x, weight, bias), activation)


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    return _activate(F.linear(x, gate_weight, gate_bias), activation) * F.linear(x, up_weight, up_bias)


def quantized_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **parts: Tensor,
) -> Tensor:
    weight = dequantize({"values": values, "scale": scale} | parts, x.shape[-1])
    return linear(x, weight.to(x.dtype), bias, activation)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if transformed():
        return _loss(hidden, weight, targets, ignore_index)
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """All rows at once: PyTorch knows every derivative of this, and all logits are in memory."""
    counted = targets != ignore_index
    losses, _ = _row_losses(hidden, weight, torch.where(counted, targets, 0))
    return torch.where(counted, losses, 0.0).sum() / counted.sum()


def _row_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden weightᵀ)[target], and the log-sum-exp that is part of it, of each row in float32."""
    logits = F.linear(hidden, weight).float()
    lse = torch.logsumexp(logits, dim=-1)
    return lse - logits.gather(1, targets[:, None]).squeeze(1), lse


class _LinearCrossEntropy(torch.autograd.Function):
    """The head and the loss, a chunk of rows at a time; backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        limit = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES_ELSEWHERE)
        rows = max(1, limit // (4 * max(1, weight.shape[0])))
        counted = targets != ignore_index
        safe_targets = torch.where(counted, targets, 0)
        starts = range(0, hidden.shape[0], rows)
        chunks = [_row_losses(hidden[at : at + rows], weight, safe_targets[at : at + rows]) for at in starts]
        empty = hidden.new_zeros(0, dtype=torch.float32)
        loss, lse = (torch.cat(parts) for parts in zip(*chunks or [(empty, empty)], strict=True))
        count = counted.sum()
        ctx.rows, ctx.ignore_index = rows, ignore_index
        ctx.save_for_backward(hidden, weight, targets, safe_targets, counted, count, lse)
        return torch.where(counted, loss, 0.0).sum() / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        hidden, weight, all_targets, targets, counted, count, lse = ctx.saved_tensors
        (grad_loss,) = grad_outputs
        if torch.is_grad_enabled():  # the gradients are to be differentiated again
            needed = ctx.needs_input_grad[:2]
            # Views, so that a weight that hidden was computed from gets no gradient by way of hidden.
            views = hidden.view_as(hidden), weight.view_as(weight)
            inputs = [view for view, need in zip(views, needed, strict=True) if need]
            loss = _loss(*views, all_targets, ctx.ignore_index)
            grads = iter(torch.autograd.grad(loss, inputs, grad_loss, create_graph=True))
            return (*(next(grads) if need else None for need in needed), None, None)
        row_scale = torch.where(counted, grad_loss / count, 0.0)
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        dhidden = []
        for start in range(0, hidden.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = F.linear(hidden[chunk], weight).float()
            # d loss / d logits = softmax(logits) - onehot(target)
            dlogits = logits.sub_(lse[chunk, None]).exp_()
            dlogits.scatter_add_(1, targets[chunk, None], -torch.ones_like(lse[chunk, None]))
            dlogits = dlogits.mul_(row_scale[chunk, None]).to(weight.dtype)
            dhidden.append(dlogits @ weight)
            if dweight is not None:
                dweight += (dlogits.T @ hidden[chunk]).float()
        gathered = torch.cat(dhidden) if dhidden else torch.zeros_like(hidden)
        return gathered, None if dweight is None else dweight.to(weight.dtype), None, None
