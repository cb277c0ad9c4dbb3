"""The table of cases: for each op, the calls that a backend has to get right.

One small struct (`Case`) serves every purpose: its inputs in any dtype on any device, how it is called, and so its
result, its gradients, its float64 reference and its time. The shapes are those that break kernels: odd, empty, of one
element, strided, ragged, longer than a tile. (The idea is ggml's test-backend-ops, where one struct an op gives
correctness, gradients and speed.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmfast import ops
from llmfast.quantization.formats import FORMATS, quantize

Tensors = dict[str, "Tensor | None"]
PARTS = ("values", "scale", "minimum", "scale_code", "minimum_code")  # of a quantised weight


class Random:
    """Makes the tensors of a case: the same for the same seed, whatever the device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=self.generator) * scale
        return values.to(self.dtype).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    `build` gives its tensors by argument name, `settings` its other arguments. `elements` is about how many elements
    it computes with, so that slow places can take the small cases only. Its `constants` take no gradients; without
    `differentiable` it is for inference, and nothing does.
    """

    op: str
    name: str
    build: Callable[[Random], Tensors]
    settings: dict[str, Any] = field(default_factory=dict)
    elements: int = 0
    differentiable: bool = True
    constants: tuple[str, ...] = ()

    def make(self, dtype: torch.dtype, device: str, seed: int = 0) -> Tensors:
        return self.build(Random(dtype, device, seed))

    def leaves(self, tensors: Tensors) -> Tensors:
        """The tensors that take gradients as leaves of a graph, which keep their strides and share their memory."""
        return {
            name: t.detach().requires_grad_(self.differentiable and name not in self.constants)
            if t is not None and t.is_floating_point()
            else t
            for name, t in tensors.items()
        }

    def call(self, functions: Any, tensors: Tensors) -> tuple[Tensor, ...]:
        """The results, by `functions`: `llmfast.ops`, or a backend's module."""
        settings = dict(self.settings)
        if self.op.endswith("_attention") and functions is not ops:  # backends are always given a scale
            q = tensors["q"]
            assert q is not None
            settings.setdefault("scale", q.shape[-1] ** -0.5)
        result = getattr(functions, self.op)(**tensors, **settings)
        return result if isinstance(result, tuple) else (result,)


def causal_attention(
    name: str, B: int, H: int, Hkv: int, T: int, S: int, D: int, lengths: list[int] | None = None,
    fused: bool = False, seed: int = 1234567890123456789, op: str = "causal_attention", **settings: Any,
) -> Case:  # fmt: skip
    """q (B, H, T, D), k and v (B, Hkv, S, D); `fused` makes them strided views of one projection, as the model does.

    `seed` is dropout's. `lengths` are of dtype int64, and int32 where there is an odd number of them.
    """

    def build(random: Random) -> Tensors:
        if fused:
            q, k, v = random.normal(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = random.normal(B, H, T, D), random.normal(B, Hkv, S, D), random.normal(B, Hkv, S, D)
        tensors: Tensors = {"q": q, "k": k, "v": v}
        if lengths is not None:
            kind = torch.int32 if B % 2 else torch.int64
            tensors["kv_lengths"] = torch.tensor(lengths, dtype=kind, device=random.device)
        if settings.get("dropout_p"):
            tensors["dropout_seed"] = torch.tensor([seed], device=random.device)
        return tensors

    return Case(op, name, build, settings, B * H * T * S * D)


def bidirectional_attention(
    name: str, B: int, H: int, Hkv: int, T: int, S: int, D: int, lengths: list[int] | None = None, **more: Any
) -> Case:
    """The same with any T and S; `more` is as in `causal_attention`."""
    return causal_attention(name, B, H, Hkv, T, S, D, lengths, op="bidirectional_attention", **more)


def layer_norm(
    name: str, shape: tuple[int, ...], bias: bool = True, transposed: bool = False, eps: float = 1e-5,
    small: bool = False, op: str = "layer_norm",
) -> Case:  # fmt: skip
    """x (..., N), of mean 1 and deviation 2; `small` makes both a thousand times smaller, so that `eps` outweighs the
    variance; `transposed` swaps the strides of x's first two dimensions."""

    def build(random: Random) -> Tensors:
        N = shape[-1]
        x = random.normal(*shape, scale=2) + 1
        if small:
            x = x * 1e-3
        if transposed:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        tensors: Tensors = {"x": x}
        if op == "add_layer_norm":
            tensors["residual"] = random.normal(*shape, scale=3e-3 if small else 3)
        tensors["weight"] = random.normal(N)
        tensors["bias"] = random.normal(N) if bias else None
        return tensors

    return Case(op, name, build, {"eps": eps}, torch.Size(shape).numel())


def add_layer_norm(name: str, shape: tuple[int, ...], **more: Any) -> Case:
    """x and residual (..., N); `more` is as in `layer_norm`."""
    return layer_norm(name, shape, op="add_layer_norm", **more)


def rms_norm(
    name: str, shape: tuple[int, ...], transposed: bool = False, eps: float = 1e-6, small: bool = False,
    op: str = "rms_norm",
) -> Case:  # fmt: skip
    """x (..., N), of mean 1 and deviation 2; `small` makes it a thousand times smaller, so that `eps` matters;
    `transposed` swaps the strides of x's first two dimensions."""

    def build(random: Random) -> Tensors:
        x = (random.normal(*shape, scale=2) + 1) * (1e-3 if small else 1)
        if transposed:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        tensors: Tensors = {"x": x}
        if op == "add_rms_norm":
            tensors["residual"] = random.normal(*shape, scale=3e-3 if small else 3)
        return tensors | {"weight": random.normal(shape[-1])}

    return Case(op, name, build, {"eps": eps}, torch.Size(shape).numel())


def add_rms_norm(name: str, shape: tuple[int, ...], **more: Any) -> Case:
    """x and residual (..., N); `more` is as in `rms_norm`."""
    return rms_norm(name, shape, op="add_rms_norm", **more)


def rotary(
    name: str, B: int, H: int, T: int, D: int, turning: int, tables: int = 1, fused: bool = False, **settings: Any
) -> Case:
    """x (B, H, T, D) of which `turning` channels turn, cos and sin for 1 or B sequences; `fused` makes x a strided view
    of a projection (B, T, 2 H D), as the model does."""

    def build(random: Random) -> Tensors:
        x = random.normal(B, T, 2, H, D)[:, :, 1].transpose(1, 2) if fused else random.normal(B, H, T, D)
        angles = 10 * torch.randn(tables, T, turning // 2, dtype=torch.float64, generator=random.generator)
        cos, sin = (values.float().to(random.device) for values in (angles.cos(), angles.sin()))
        return {"x": x, "cos": cos, "sin": sin}

    return Case("rotary", name, build, settings, B * H * T * D, constants=("cos", "sin"))


def gelu(name: str, shape: tuple[int, ...], approximate: str, scale: float = 3.0, strided: bool = False) -> Case:
    """x of `shape`, of deviation `scale`; `strided` takes every second element of the last dimension."""

    def build(random: Random) -> Tensors:
        x = random.normal(*shape, scale=scale)
        return {"x": x[..., ::2] if strided else x}

    return Case("gelu", name, build, {"approximate": approximate}, torch.Size(shape).numel())


def linear(
    name: str, shape: tuple[int, ...], N: int, bias: bool = True, activation: str | None = None, strided: bool = False
) -> Case:
    """x (..., K) of `shape`, weight (N, K); `strided` stores both in another order."""

    def build(random: Random) -> Tensors:
        K = shape[-1]
        x = random.normal(*shape)
        weight = random.normal(N, K, scale=max(1, K) ** -0.5)
        if strided:
            x = x.transpose(0, -2).contiguous().transpose(0, -2)
            weight = weight.t().contiguous().t()
        return {"x": x, "weight": weight, "bias": random.normal(N) if bias else None}

    return Case("linear", name, build, {"activation": activation}, torch.Size(shape).numel() * N)


def gated_linear(
    name: str, shape: tuple[int, ...], N: int, gate_bias: bool = False, up_bias: bool = False, activation: str = "silu",
    strided: bool = False,
) -> Case:  # fmt: skip
    """x (..., K) of `shape`, both weights (N, K); `strided` stores x and up_weight in another order."""

    def build(random: Random) -> Tensors:
        K = shape[-1]
        x = random.normal(*shape)
        gate_weight, up_weight = (random.normal(N, K, scale=max(1, K) ** -0.5) for _ in range(2))
        if strided:
            x = x.transpose(0, -2).contiguous().transpose(0, -2)
            up_weight = up_weight.t().contiguous().t()
        return {
            "x": x,
            "gate_weight": gate_weight,
            "up_weight": up_weight,
            "gate_bias": random.normal(N) if gate_bias else None,
            "up_bias": random.normal(N) if up_bias else None,
        }

    return Case("gated_linear", name, build, {"activation": activation}, 2 * torch.Size(shape).numel() * N)


def linear_cross_entropy(
    name: str, shape: tuple[int, ...], K: int, V: int, ignored: bool = False, ignore_index: int = -100
) -> Case:
    """hidden (*shape, K), weight (V, K), targets of `shape`; `ignored` leaves about a third of them out."""

    def build(random: Random) -> Tensors:
        targets = torch.randint(V, shape, generator=random.generator)
        if ignored:
            targets[torch.rand(shape, generator=random.generator) < 0.3] = ignore_index
            targets.view(-1)[0] = 0 if ignore_index else V - 1  # at least one counts
        return {
            "hidden": random.normal(*shape, K),
            "weight": random.normal(V, K, scale=2 * K**-0.5),
            "targets": targets.to(random.device),
        }

    settings = {"ignore_index": ignore_index}
    return Case("linear_cross_entropy", name, build, settings, torch.Size(shape).numel() * K * V)


def quantized_linear(
    name: str, shape: tuple[int, ...], N: int, precision: str, bias: bool = True, activation: str | None = None
) -> Case:
    """x (..., K) of `shape`, a weight (N, K) in the format `precision`."""

    def build(random: Random) -> Tensors:
        K = shape[-1]
        weight = torch.randn(N, K, generator=random.generator) * K**-0.5
        stored = quantize(weight, precision)
        return {
            "x": random.normal(*shape),
            **{name: part.to(random.device) for name, part in stored.parts.items()},
            "bias": random.normal(N) if bias else None,
        }

    settings = {"activation": activation}
    return Case("quantized_linear", name, build, settings, torch.Size(shape).numel() * N, constants=PARTS)


CASES = [
    causal_attention("square", 2, 3, 3, 32, 32, 16),
    causal_attention("odd-lengths", 1, 2, 2, 37, 37, 24),
    causal_attention("longer-than-a-tile", 1, 2, 2, 197, 197, 64),
    causal_attention("long", 1, 1, 1, 700, 700, 32),
    causal_attention("qkv-views", 2, 3, 3, 65, 65, 32, fused=True),
    causal_attention("qkv-views-gpt2", 1, 12, 12, 130, 130, 64, fused=True),
    causal_attention("one-token", 1, 1, 1, 1, 1, 16),
    causal_attention("decode", 2, 4, 4, 1, 333, 64),
    causal_attention("decode-long-one-head", 1, 1, 1, 1, 2049, 64),
    causal_attention("more-keys", 1, 2, 2, 17, 60, 32),
    causal_attention("grouped", 2, 6, 2, 33, 33, 32),
    causal_attention("grouped-decode", 2, 8, 2, 1, 75, 64),
    causal_attention("one-kv-head", 1, 4, 1, 20, 41, 16),
    causal_attention("head-dim-1", 1, 2, 2, 9, 9, 1),
    causal_attention("head-dim-17", 1, 2, 2, 21, 21, 17),
    causal_attention("head-dim-80", 1, 2, 2, 40, 40, 80),
    causal_attention("head-dim-128", 1, 2, 2, 70, 70, 128),
    causal_attention("head-dim-256", 1, 1, 1, 33, 33, 256),
    causal_attention("ragged", 3, 2, 2, 12, 12, 16, lengths=[12, 5, 1]),
    causal_attention("ragged-blind-rows", 2, 2, 2, 6, 10, 16, lengths=[0, 10]),
    causal_attention("ragged-decode", 4, 4, 2, 1, 40, 32, lengths=[40, 1, 17, 0]),
    causal_attention("lengths-out-of-range", 3, 2, 2, 12, 27, 32, lengths=[-2, 99, 20]),
    causal_attention("scaled", 1, 2, 2, 19, 19, 16, scale=0.7),
    causal_attention("sharp", 1, 2, 2, 40, 40, 16, scale=2.0),
    causal_attention("dropout", 2, 2, 2, 35, 35, 16, dropout_p=0.25),
    causal_attention("dropout-small-seed", 1, 2, 2, 18, 20, 16, dropout_p=0.25, seed=3),
    causal_attention("dropout-ragged-grouped", 2, 4, 2, 9, 14, 16, lengths=[14, 6], dropout_p=0.5),
    causal_attention("empty-batch", 0, 2, 2, 8, 8, 16),
    causal_attention("empty-tokens", 1, 2, 2, 0, 8, 16),
    causal_attention("window", 2, 2, 2, 40, 40, 16, window=9),
    causal_attention("window-of-one", 1, 2, 2, 21, 30, 16, window=1),
    causal_attention("window-longer-than-a-tile", 1, 2, 1, 333, 333, 64, window=150),
    causal_attention("window-in-a-long-text", 1, 1, 1, 500, 700, 32, window=33),
    causal_attention("window-beyond-all-keys", 1, 2, 2, 19, 40, 16, window=1000),
    causal_attention("window-decode", 2, 4, 2, 1, 700, 64, window=300),
    causal_attention("window-few-queries", 1, 2, 2, 3, 300, 32, window=20),
    causal_attention("window-ragged", 3, 2, 2, 12, 27, 16, lengths=[27, 5, 14], window=6),
    causal_attention("window-dropout", 1, 2, 2, 35, 50, 16, window=20, dropout_p=0.25),
    bidirectional_attention("square", 2, 3, 3, 32, 32, 16),
    bidirectional_attention("longer-than-a-tile", 1, 2, 2, 197, 197, 64),
    bidirectional_attention("more-queries", 1, 2, 2, 60, 17, 32),
    bidirectional_attention("more-keys", 1, 2, 2, 17, 160, 32),
    bidirectional_attention("qkv-views", 2, 3, 3, 65, 65, 32, fused=True),
    bidirectional_attention("one-query", 2, 4, 4, 1, 333, 64),
    bidirectional_attention("few-queries", 1, 2, 2, 3, 40, 64),
    bidirectional_attention("one-key", 1, 2, 2, 9, 1, 16),
    bidirectional_attention("grouped", 2, 6, 2, 33, 20, 32),
    bidirectional_attention("head-dim-17", 1, 2, 2, 21, 33, 17),
    bidirectional_attention("padded-batch", 3, 2, 2, 20, 20, 32, lengths=[20, 11, 1]),
    bidirectional_attention("padded-long", 2, 1, 1, 130, 300, 32, lengths=[37, 300]),
    bidirectional_attention("lengths-out-of-range", 3, 2, 2, 12, 7, 32, lengths=[-2, 99, 5]),
    bidirectional_attention("nothing-to-see", 2, 2, 2, 3, 8, 16, lengths=[0, 8]),
    bidirectional_attention("scaled", 1, 2, 2, 19, 23, 16, scale=0.5),
    bidirectional_attention("dropout", 2, 2, 2, 35, 24, 16, dropout_p=0.25),
    bidirectional_attention("dropout-small-seed", 1, 2, 2, 18, 20, 16, dropout_p=0.25, seed=3),
    bidirectional_attention("dropout-padded-grouped", 2, 4, 2, 20, 34, 16, lengths=[34, 6], dropout_p=0.5),
    bidirectional_attention("empty-batch", 0, 2, 2, 8, 9, 16),
    bidirectional_attention("no-queries", 1, 2, 2, 0, 8, 16),
    bidirectional_attention("no-keys", 1, 2, 2, 8, 0, 16),
    *(layer_norm(f"width-{N}", (5, N), eps=0.1) for N in (1, 2)),  # at 1e-5 their gradients are all rounding
    *(layer_norm(f"width-{N}", (5, N)) for N in (3, 31, 64, 257, 768, 1600, 4097)),
    layer_norm("large-eps", (7, 40), eps=0.5),
    layer_norm("small-inputs", (7, 40), small=True),
    layer_norm("small-inputs-and-eps", (7, 40), small=True, eps=1e-6),
    layer_norm("three-dims", (2, 7, 48)),
    layer_norm("many-rows", (333, 40)),
    layer_norm("one-row", (96,)),
    layer_norm("no-bias", (4, 33), bias=False),
    layer_norm("transposed", (6, 5, 32), transposed=True),
    layer_norm("empty", (0, 16)),
    add_layer_norm("add-width-1", (5, 1), eps=0.1),
    *(add_layer_norm(f"add-width-{N}", (5, N)) for N in (33, 768, 4097)),
    add_layer_norm("add-large-eps", (7, 40), eps=0.5),
    add_layer_norm("add-small-inputs", (7, 40), small=True),
    add_layer_norm("add-small-inputs-and-eps", (7, 40), small=True, eps=1e-6),
    add_layer_norm("add-three-dims", (3, 11, 64)),
    add_layer_norm("add-no-bias", (4, 50), bias=False),
    add_layer_norm("add-transposed", (4, 9, 24), transposed=True),
    add_layer_norm("add-empty", (0, 16)),
    rms_norm("width-1", (5, 1), eps=0.1),  # at 1e-6 its gradient is all rounding
    *(rms_norm(f"width-{N}", (5, N)) for N in (2, 3, 31, 64, 257, 768, 1600, 4097)),
    rms_norm("large-eps", (7, 40), eps=0.5),
    rms_norm("small-inputs", (7, 40), small=True),
    rms_norm("small-inputs-and-eps", (7, 40), small=True, eps=1e-8),
    rms_norm("heads", (2, 7, 9, 64)),
    rms_norm("many-rows", (333, 40)),
    rms_norm("one-row", (96,)),
    rms_norm("transposed", (6, 5, 32), transposed=True),
    rms_norm("empty", (0, 16)),
    add_rms_norm("add-width-1", (5, 1), eps=0.1),
    *(add_rms_norm(f"add-width-{N}", (5, N)) for N in (33, 576, 4097)),
    add_rms_norm("add-large-eps", (7, 40), eps=0.5),
    add_rms_norm("add-small-inputs", (7, 40), small=True),
    add_rms_norm("add-small-inputs-and-eps", (7, 40), small=True, eps=1e-8),
    add_rms_norm("add-three-dims", (3, 11, 64)),
    add_rms_norm("add-transposed", (4, 9, 24), transposed=True),
    add_rms_norm("add-empty", (0, 16)),
    *(
        case
        for kind, interleaved in (("halves", False), ("pairs", True))
        for case in (
            rotary(f"{kind}-head-dim-64", 2, 3, 9, 64, 64, interleaved=interleaved),
            rotary(f"{kind}-head-dim-80", 1, 4, 7, 80, 80, interleaved=interleaved),
            rotary(f"{kind}-head-dim-128", 1, 2, 33, 128, 128, interleaved=interleaved),
            rotary(f"{kind}-head-dim-6", 2, 2, 5, 6, 6, interleaved=interleaved),
            rotary(f"{kind}-one-token", 1, 1, 1, 2, 2, interleaved=interleaved),
            rotary(f"{kind}-many-tokens", 1, 3, 333, 16, 16, interleaved=interleaved),
            rotary(f"{kind}-partial", 2, 2, 11, 40, 18, interleaved=interleaved),
            rotary(f"{kind}-partial-quarter", 1, 2, 11, 96, 24, interleaved=interleaved),
            rotary(f"{kind}-own-positions", 3, 2, 7, 32, 32, tables=3, interleaved=interleaved),
            rotary(f"{kind}-fused-view", 2, 3, 9, 64, 64, tables=2, fused=True, interleaved=interleaved),
            rotary(f"{kind}-nothing-turns", 1, 2, 3, 8, 0, interleaved=interleaved),
            rotary(f"{kind}-empty", 2, 3, 0, 16, 16, interleaved=interleaved),
        )
    ),
    *(gelu(f"{kind}-{size}", (size,), kind) for kind in ("tanh", "none") for size in (1, 7, 64, 1031)),
    *(gelu(f"{kind}-large-inputs", (257,), kind, scale=30) for kind in ("tanh", "none")),
    *(gelu(f"{kind}-small-inputs", (257,), kind, scale=1e-3) for kind in ("tanh", "none")),
    *(gelu(f"{kind}-strided", (3, 5, 26), kind, strided=True) for kind in ("tanh", "none")),
    *(gelu(f"{kind}-empty", (0, 5), kind) for kind in ("tanh", "none")),
    linear("square", (32, 32), 32),
    linear("odd", (3, 13, 37), 41),
    linear("one-element", (1, 1), 1),
    linear("one-row", (1, 129), 257),
    linear("one-vector", (65,), 33),
    linear("few-rows", (5, 96), 67),
    linear("wide", (9, 70), 515),
    linear("deep", (7, 3073), 19),
    linear("tall", (300, 48), 50),
    linear("no-bias", (4, 20), 30, bias=False),
    linear("strided", (6, 10, 24), 18, strided=True),
    linear("gelu-tanh", (3, 11, 40), 50, activation="gelu_tanh"),
    linear("gelu-erf", (17, 40), 50, activation="gelu"),
    linear("gelu-no-bias-one-row", (1, 64), 96, bias=False, activation="gelu_tanh"),
    linear("silu", (3, 11, 40), 50, activation="silu"),
    linear("empty-rows", (0, 8), 5),
    linear("no-inner", (3, 0), 4),
    gated_linear("square", (32, 32), 32),
    gated_linear("odd", (3, 13, 37), 41),
    gated_linear("one-element", (1, 1), 1),
    gated_linear("one-row", (1, 129), 257),
    gated_linear("one-vector", (131,), 33),
    gated_linear("few-rows", (5, 96), 67, gate_bias=True, up_bias=True),
    gated_linear("wide", (9, 70), 515),
    gated_linear("deep", (11, 3073), 19),
    gated_linear("tall", (300, 48), 50),
    gated_linear("biases", (20, 30), 70, gate_bias=True, up_bias=True),
    gated_linear("gate-bias", (4, 20), 30, gate_bias=True),
    gated_linear("up-bias", (17, 20), 30, up_bias=True),
    gated_linear("strided", (6, 10, 24), 18, strided=True),
    gated_linear("gelu-tanh", (3, 11, 40), 21, activation="gelu_tanh"),
    gated_linear("gelu-erf", (17, 40), 30, up_bias=True, activation="gelu"),
    gated_linear("empty-rows", (0, 8), 5),
    gated_linear("no-inner", (3, 0), 4, gate_bias=True, up_bias=True),
    linear_cross_entropy("small", (11,), 16, 50),
    linear_cross_entropy("two-dims", (3, 9), 24, 131),
    linear_cross_entropy("one-row-one-class", (1,), 4, 1),
    linear_cross_entropy("some-ignored", (40,), 17, 77, ignored=True),
    linear_cross_entropy("ignored-by-another-number", (40,), 17, 77, ignored=True, ignore_index=-1),
    linear_cross_entropy("ignored-class", (5, 8), 17, 7, ignored=True, ignore_index=3),
    linear_cross_entropy("ignored-first-class", (33,), 16, 5, ignore_index=0),
    linear_cross_entropy("many-classes", (37,), 32, 5003),
    linear_cross_entropy("many-rows", (1030,), 8, 300),
    *(quantized_linear(f"{form}-one-element", (1, 1), 1, form) for form in FORMATS),
    *(quantized_linear(f"{form}-one-row", (1, 129), 257, form) for form in FORMATS),
    *(quantized_linear(f"{form}-one-vector", (64,), 33, form, bias=False) for form in FORMATS),
    *(quantized_linear(f"{form}-odd", (3, 13, 37), 41, form) for form in FORMATS),
    *(quantized_linear(f"{form}-deep", (2, 1100), 40, form) for form in FORMATS),
    *(quantized_linear(f"{form}-some-rows", (17, 70), 96, form, activation="gelu") for form in FORMATS),
    *(quantized_linear(f"{form}-gelu-tanh", (3, 40), 20, form, activation="gelu_tanh") for form in FORMATS),
    *(quantized_linear(f"{form}-gelu-erf", (3, 33), 20, form, activation="gelu") for form in FORMATS),
    *(quantized_linear(f"{form}-silu", (5, 70), 40, form, activation="silu") for form in FORMATS),
    *(quantized_linear(f"{form}-many-rows", (131, 64), 150, form) for form in FORMATS),
    *(quantized_linear(f"{form}-empty-rows", (0, 40), 5, form) for form in FORMATS),
]
