"""Every backend × op × dtype × shape against the float64 reference: the parity suite.

The rule: the error against the reference is at most twice that of PyTorch's own op in the same dtype, plus
eps(dtype) · max(1, max |reference|), for the result and for every gradient. Two runs give the same bits, and inputs
are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import llmfast
from llmfast import ops
from llmfast.backends import pytorch, reference

AVAILABLE = {(r.backend, r.op, r.device, r.dtype): r.reason for r in llmfast.backends()}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Case:
    """One call of an op. `make(dtype, device)` gives its tensors; those that float are differentiated."""

    op: str
    name: str
    make: Callable[[torch.dtype, str], dict[str, Tensor | None]]
    settings: dict[str, Any] = field(default_factory=dict)
    elements: int = 0  # roughly, so that Triton's interpreter gets the small ones only


def randn(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(device)


def attention(
    name: str, B: int, H: int, Hkv: int, T: int, S: int, D: int, lengths: list[int] | None = None,
    fused: bool = False, **settings: Any,
) -> Case:  # fmt: skip
    def make(dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        if fused:  # strided views of one projection, as the model makes them
            qkv = randn(B, T, 3, H, D, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            q = randn(B, H, T, D, dtype=dtype, device=device)
            k = randn(B, Hkv, S, D, dtype=dtype, device=device)
            v = randn(B, Hkv, S, D, dtype=dtype, device=device)
        tensors: dict[str, Tensor | None] = {"q": q, "k": k, "v": v}
        if lengths is not None:
            tensors["kv_lengths"] = torch.tensor(lengths, device=device)
        if settings.get("dropout_p"):
            tensors["dropout_seed"] = torch.tensor([1234567890123456789], device=device)
        return tensors

    return Case("causal_attention", name, make, settings, B * H * T * S * D)


def norm(name: str, shape: tuple[int, ...], bias: bool = True, transposed: bool = False, add: bool = False) -> Case:
    def make(dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        N = shape[-1]
        x = randn(*shape, dtype=dtype, device=device, scale=2) + 1
        if transposed:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        tensors: dict[str, Tensor | None] = {"x": x}
        if add:
            tensors["residual"] = randn(*shape, dtype=dtype, device=device, scale=3)
        tensors["weight"] = randn(N, dtype=dtype, device=device)
        tensors["bias"] = randn(N, dtype=dtype, device=device) if bias else None
        return tensors

    return Case("add_layer_norm" if add else "layer_norm", name, make, {"eps": 1e-5}, torch.Size(shape).numel())


def gelu(name: str, shape: tuple[int, ...], approximate: str, scale: float = 3.0, strided: bool = False) -> Case:
    def make(dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        x = randn(*shape, dtype=dtype, device=device, scale=scale)
        return {"x": x[..., ::2] if strided else x}

    return Case("gelu", name, make, {"approximate": approximate}, torch.Size(shape).numel())


def linear(
    name: str, shape: tuple[int, ...], N: int, bias: bool = True, activation: str | None = None, strided: bool = False
) -> Case:
    def make(dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        K = shape[-1]
        x = randn(*shape, dtype=dtype, device=device)
        weight = randn(N, K, dtype=dtype, device=device, scale=max(1, K) ** -0.5)
        if strided:
            x = x.transpose(0, -2).contiguous().transpose(0, -2)
            weight = weight.t().contiguous().t()
        return {"x": x, "weight": weight, "bias": randn(N, dtype=dtype, device=device) if bias else None}

    return Case("linear", name, make, {"activation": activation}, torch.Size(shape).numel() * N)


def cross_entropy(name: str, shape: tuple[int, ...], K: int, V: int, ignored: str = "none") -> Case:
    def make(dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        targets = torch.randint(V, shape)
        if ignored == "some":
            targets[torch.rand(shape) < 0.3] = -100
            targets.view(-1)[0] = 0  # at least one counts
        return {
            "hidden": randn(*shape, K, dtype=dtype, device=device),
            "weight": randn(V, K, dtype=dtype, device=device, scale=2 * K**-0.5),
            "targets": targets.to(device),
        }

    return Case("linear_cross_entropy", name, make, {}, torch.Size(shape).numel() * K * V)


CASES = [
    attention("square", 2, 3, 3, 32, 32, 16),
    attention("odd-lengths", 1, 2, 2, 37, 37, 24),
    attention("longer-than-a-tile", 1, 2, 2, 197, 197, 64),
    attention("long", 1, 1, 1, 700, 700, 32),
    attention("qkv-views", 2, 3, 3, 65, 65, 32, fused=True),
    attention("qkv-views-gpt2", 1, 12, 12, 130, 130, 64, fused=True),
    attention("one-token", 1, 1, 1, 1, 1, 16),
    attention("decode", 2, 4, 4, 1, 333, 64),
    attention("decode-long-one-head", 1, 1, 1, 1, 2049, 64),
    attention("more-keys", 1, 2, 2, 17, 60, 32),
    attention("grouped", 2, 6, 2, 33, 33, 32),
    attention("grouped-decode", 2, 8, 2, 1, 75, 64),
    attention("one-kv-head", 1, 4, 1, 20, 41, 16),
    attention("head-dim-1", 1, 2, 2, 9, 9, 1),
    attention("head-dim-17", 1, 2, 2, 21, 21, 17),
    attention("head-dim-80", 1, 2, 2, 40, 40, 80),
    attention("head-dim-128", 1, 2, 2, 70, 70, 128),
    attention("head-dim-256", 1, 1, 1, 33, 33, 256),
    attention("ragged", 3, 2, 2, 12, 12, 16, lengths=[12, 5, 1]),
    attention("ragged-blind-rows", 2, 2, 2, 6, 10, 16, lengths=[0, 10]),
    attention("ragged-decode", 4, 4, 2, 1, 50, 32, lengths=[50, 1, 17, 0]),
    attention("lengths-out-of-range", 3, 2, 2, 12, 27, 32, lengths=[-2, 99, 20]),
    attention("scaled", 1, 2, 2, 19, 19, 16, scale=0.7),
    attention("sharp", 1, 2, 2, 40, 40, 16, scale=0.7),
    attention("dropout", 2, 2, 2, 35, 35, 16, dropout_p=0.25),
    attention("dropout-ragged-grouped", 2, 4, 2, 9, 14, 16, lengths=[14, 6], dropout_p=0.5),
    attention("empty-batch", 0, 2, 2, 8, 8, 16),
    attention("empty-tokens", 1, 2, 2, 0, 8, 16),
    *(norm(f"width-{N}", (5, N)) for N in (1, 2, 3, 31, 64, 257, 768, 1600, 4097)),
    norm("three-dims", (2, 7, 48)),
    norm("many-rows", (333, 40)),
    norm("one-row", (96,)),
    norm("no-bias", (4, 33), bias=False),
    norm("transposed", (6, 5, 32), transposed=True),
    norm("empty", (0, 16)),
    *(norm(f"add-width-{N}", (5, N), add=True) for N in (1, 33, 768, 4097)),
    norm("add-three-dims", (3, 11, 64), add=True),
    norm("add-no-bias", (4, 50), bias=False, add=True),
    norm("add-transposed", (4, 9, 24), transposed=True, add=True),
    norm("add-empty", (0, 16), add=True),
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
    linear("empty-rows", (0, 8), 5),
    linear("no-inner", (3, 0), 4),
    cross_entropy("small", (11,), 16, 50),
    cross_entropy("two-dims", (3, 9), 24, 131),
    cross_entropy("one-row-one-class", (1,), 4, 1),
    cross_entropy("some-ignored", (40,), 17, 77, ignored="some"),
    cross_entropy("many-classes", (37,), 32, 5003),
    cross_entropy("many-rows", (1030,), 8, 300),
]


def parameters() -> list[Any]:
    chosen = []
    for case in CASES:
        for backend in dict.fromkeys(row[0] for row in AVAILABLE):
            if backend == "reference":
                continue
            for device in DEVICES:
                for name, dtype in DTYPES.items():
                    if AVAILABLE[backend, case.op, device, name] is not None:
                        continue
                    if (backend, device, name) == ("pytorch", "cpu", "float16"):
                        continue  # not of the contract: float16 is for GPUs
                    marks = []
                    if backend == "triton" and device == "cpu" and case.elements > 300_000:
                        marks.append(pytest.mark.slow)  # minutes in the interpreter
                    label = f"{case.op}-{case.name}-{backend}-{device}-{name}"
                    chosen.append(pytest.param(case, backend, device, dtype, id=label, marks=marks))
    return chosen


def run(module_or_ops: Any, case: Case, tensors: dict[str, Tensor | None], in_float64: bool) -> dict[str, Tensor]:
    """The results and the gradients of a fixed random projection of them, by name."""
    leaves = {}
    for name, t in tensors.items():
        if t is not None and t.is_floating_point():
            # A leaf that keeps the strides of the case.
            leaf = t.detach().double() if in_float64 else t.detach()
            leaves[name] = leaf.requires_grad_()
        else:
            leaves[name] = t
    settings = dict(case.settings)
    if case.op == "causal_attention" and "scale" not in settings and module_or_ops is not ops:
        settings["scale"] = tensors["q"].shape[-1] ** -0.5  # type: ignore[union-attr]
    result = getattr(module_or_ops, case.op)(**leaves, **settings)
    results = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for r in results:
        projection = torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device)
        dtype = tensors_dtype(tensors)
        total = total + (r * projection.to(dtype).to(r.dtype)).sum()
    names = [name for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad]
    grads = torch.autograd.grad(total, [leaves[name] for name in names])
    outputs = {f"result {i}": r.detach() for i, r in enumerate(results)}
    return outputs | {f"gradient of {name}": g for name, g in zip(names, grads, strict=True)}


def tensors_dtype(tensors: dict[str, Tensor | None]) -> torch.dtype:
    return next(t.dtype for t in tensors.values() if t is not None and t.is_floating_point())


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max()) if got.numel() else 0.0


@pytest.mark.parametrize("case, backend, device, dtype", parameters())
def test_backend_agrees_with_the_reference(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    check(case, backend, device, dtype)


def check(case: Case, backend: str, device: str, dtype: torch.dtype, slack: float = 1.0) -> None:
    torch.manual_seed(0)
    tensors = case.make(dtype, device)
    before = {name: t.clone() for name, t in tensors.items() if t is not None}

    expected = run(reference, case, tensors, in_float64=True)
    torch_own = run(pytorch, case, tensors, in_float64=False)
    with llmfast.use_backend(backend):
        got = run(ops, case, tensors, in_float64=False)
        again = run(ops, case, tensors, in_float64=False)

    for name, t in before.items():
        assert torch.equal(tensors[name], t), f"{name} was changed"  # type: ignore[arg-type]
    for name, value in got.items():
        assert torch.equal(value, again[name]) or bool(value.isnan().all()), f"{name}: two runs differ"
        assert value.shape == expected[name].shape, f"{name} has shape {tuple(value.shape)}"
        scale = max(1.0, float(expected[name].abs().max())) if value.numel() else 1.0
        allowed = slack * (2 * error(torch_own[name], expected[name]) + torch.finfo(dtype).eps * scale)
        assert error(value, expected[name]) <= allowed, f"{name}: {error(value, expected[name]):.3g} > {allowed:.3g}"


@st.composite
def any_case(draw: st.DrawFn, longest: int = 70, widest: int = 150, heads: int = 3) -> Case:
    """An op at a shape that nobody thought of."""
    rows, width, out = draw(st.integers(1, longest)), draw(st.integers(1, widest)), draw(st.integers(1, widest))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, heads)), draw(st.integers(1, heads))
    S = draw(st.integers(rows, rows + longest))
    lengths = draw(st.none() | st.lists(st.integers(0, S), min_size=batch, max_size=batch))
    heads, D = kv_heads * group, draw(st.integers(1, widest))
    return draw(
        st.sampled_from(
            [
                attention(
                    f"{(batch, heads, kv_heads, rows, S, D, lengths)}", batch, heads, kv_heads, rows, S, D, lengths
                ),
                norm(f"{(rows, width)}", (rows, width)),
                norm(f"{(rows, width)}", (rows, width), add=True),
                linear(f"{(rows, width, out)}", (rows, width), out, activation=draw(st.sampled_from([None, "gelu"]))),
                cross_entropy(f"{(rows, width, out)}", (rows,), width, out, ignored="some"),
            ]
        )
    )


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@given(case=any_case())
def test_cpp_agrees_with_the_reference_at_any_shape(name: str, case: Case) -> None:
    if AVAILABLE["cpp", case.op, "cpu", name] is not None:
        pytest.skip(str(AVAILABLE["cpp", case.op, "cpu", name]))
    # Wrong elements are looked for here, not roundings: at some shapes torch's own error is small by luck.
    check(case, "cpp", "cpu", DTYPES[name], slack=4.0)


def every_backend(op: str) -> list[str]:
    names = dict.fromkeys(row[0] for row in AVAILABLE)
    return [name for name in names if name != "reference" and AVAILABLE[name, op, "cpu", "float32"] is None]


@pytest.mark.parametrize("backend", every_backend("causal_attention"))
def test_dropout_drops_the_same_weights_everywhere(backend: str) -> None:
    # With v the identity, the result is the attention weights themselves.
    q = k = torch.zeros(1, 2, 16, 16)
    v = torch.eye(16).expand(1, 2, 16, 16)
    seed = torch.tensor([42])
    arguments = {"scale": 1.0, "dropout_p": 0.4, "dropout_seed": seed}
    expected = reference.causal_attention(q, k, v, **arguments)
    with llmfast.use_backend(backend):
        got = ops.causal_attention(q, k, v, **arguments)
    assert torch.equal(got == 0, expected == 0)
    share = float((expected[:, :, -1] == 0).double().mean())
    assert 0.1 < share < 0.7


@pytest.mark.parametrize("backend", every_backend("linear_cross_entropy"))
def test_all_targets_ignored_gives_nan_as_in_torch(backend: str) -> None:
    with llmfast.use_backend(backend):
        loss = ops.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.full((3,), -100))
    assert loss.isnan()


@pytest.mark.parametrize("backend", every_backend("causal_attention"))
def test_heads_merge_back_without_a_copy(backend: str) -> None:
    q, k, v = torch.randn(2, 8, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    with llmfast.use_backend(backend):
        out = ops.causal_attention(q, k, v)
    merged = out.transpose(1, 2).reshape(2, 8, 64)
    assert out.shape == (2, 4, 8, 16) and merged.shape == (2, 8, 64)


@pytest.mark.skipif("cpp" not in every_backend("gelu"), reason="the C++ extension is not built here")
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_cpp_gelu_everywhere_on_the_axis(approximate: str) -> None:
    # Finely enough to meet every segment of its table and both ends, and far beyond, where PyTorch's slope is nan.
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e30, -100.0, 100.0, 1e30, math.inf, math.nan])])
    with llmfast.use_backend("cpp"):
        got = ops.gelu(x.requires_grad_(), approximate)
        (slope,) = torch.autograd.grad(got.sum(), x)
    leaf = x.detach().double().requires_grad_()
    expected = reference.gelu(leaf, approximate)
    (expected_slope,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(got.double()[:-2], expected[:-2], rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(slope.double()[:-2], expected_slope[:-2], rtol=0, atol=5e-7)
    assert got[-2] == math.inf and got[-1].isnan() and slope[-1].isnan()


@pytest.mark.parametrize("backend", every_backend("add_layer_norm"))
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_where_only_one_result_is_used(backend: str, used: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.randn(8)]

    def gradients(name: str) -> tuple[Tensor | None, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        with llmfast.use_backend(name):
            result = ops.add_layer_norm(*leaves, eps=1e-5)[used]
        return torch.autograd.grad((result * torch.arange(8.0)).sum(), leaves, allow_unused=True)

    for got, expected in zip(gradients(backend), gradients("pytorch"), strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if got is None else got, zero if expected is None else expected)


BAD_CALLS = {
    "q, k, v must be": lambda: ops.causal_attention(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
    "k and v must be": lambda: ops.causal_attention(*(torch.ones(1, 2, 4, d) for d in (8, 8, 9))),
    "at least as many tokens": lambda: ops.causal_attention(*(torch.ones(1, 2, t, 8) for t in (4, 3, 3))),
    "heads of k must divide": lambda: ops.causal_attention(*(torch.ones(1, h, 4, 8) for h in (3, 2, 2))),
    "kv_lengths must be": lambda: ops.causal_attention(*[torch.ones(1, 1, 2, 8)] * 3, kv_lengths=torch.tensor([1, 2])),
    "dropout_p must be": lambda: ops.causal_attention(*[torch.ones(1, 1, 2, 8)] * 3, dropout_p=1.0),
    "dropout_seed must be": lambda: ops.causal_attention(
        *[torch.ones(1, 1, 2, 8)] * 3, dropout_p=0.1, dropout_seed=torch.ones(1)
    ),
    "weight must be": lambda: ops.layer_norm(torch.ones(2, 3), torch.ones(4), None),
    "bias must have": lambda: ops.layer_norm(torch.ones(2, 3), torch.ones(3), torch.ones(4)),
    "one shape": lambda: ops.add_layer_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3), None),
    "approximate must be": lambda: ops.gelu(torch.ones(2), "fast"),
    "x must be": lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 5)),
    "bias must be": lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)),
    "activation must be": lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), None, "relu"),
    "hidden must be": lambda: ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 5), torch.zeros(2).long()),
    "targets must be": lambda: ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(3).long()),
    "one dtype and one device": lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3).double()),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_wrong_arguments_are_named_with_their_shapes(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()
