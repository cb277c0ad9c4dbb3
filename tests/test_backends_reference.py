"""The reference held to what is independent of it: sums written out in Python, published numbers, finite differences.

Every case of the contract that is small enough is computed here again, element by element, without torch's arithmetic.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.backends import OPS, reference
from llmfast.contract import CASES, Case


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, kv_lengths: Tensor | None = None, window: int | None = None, **more: Any
) -> list[Any]:
    T, S = q.shape[2], k.shape[2]

    def seen(b: int, t: int) -> range:
        position = length_of(kv_lengths, b, S) - T + t
        return range(0 if window is None else max(0, position - window + 1), max(0, position + 1))

    return attention(q, k, v, seen, **more)


def bidirectional_attention(
    q: Tensor, k: Tensor, v: Tensor, *, kv_lengths: Tensor | None = None, **more: Any
) -> list[Any]:
    return attention(q, k, v, lambda b, t: range(length_of(kv_lengths, b, k.shape[2])), **more)


def length_of(kv_lengths: Tensor | None, b: int, S: int) -> int:
    return S if kv_lengths is None else sorted((0, int(kv_lengths[b]), S))[1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen_by: Callable[[int, int], range],
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> list[Any]:
    """Over the keys that `seen_by(sequence, query)` gives."""
    (B, H, T, D), Hkv = q.shape, k.shape[1]
    queries, keys, values = q.tolist(), k.tolist(), v.tolist()
    out = torch.zeros(B, H, T, D, dtype=torch.float64).tolist()
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        group, seen = h * Hkv // H, seen_by(b, t)
        scores = [scale * dot(queries[b][h][t], keys[b][group][s]) for s in seen]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        for s, exponential in zip(seen, exponentials, strict=True):
            weight = exponential / math.fsum(exponentials) / (1 - dropout_p)
            if dropout_p and philox((s, t, b * H + h, 0), int(dropout_seed or 0)) >> 1 < int(dropout_p * 2**31):
                continue
            out[b][h][t] = [o + weight * x for o, x in zip(out[b][h][t], values[b][group][s], strict=True)]
    return [out]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> list[Any]:
    def normed(row: list[float]) -> list[float]:
        mean = math.fsum(row) / len(row)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / len(row) + eps)
        terms = zip(row, weight.tolist(), numbers(bias, row), strict=True)
        return [(value - mean) / deviation * w + b for value, w, b in terms]

    return [[normed(row) for row in rows(x)]]


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> list[Any]:
    total = added(x, residual)
    return [*layer_norm(total, weight, bias, eps), rows(total)]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> list[Any]:
    def normed(row: list[float]) -> list[float]:
        root = math.sqrt(math.fsum(value**2 for value in row) / len(row) + eps)
        return [value / root * w for value, w in zip(row, weight.tolist(), strict=True)]

    return [[normed(row) for row in rows(x)]]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> list[Any]:
    total = added(x, residual)
    return [*rms_norm(total, weight, eps), rows(total)]


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> list[Any]:
    (B, H, T, _), half = x.shape, cos.shape[-1]
    out = x.tolist()
    for b, h, t, i in itertools.product(range(B), range(H), range(T), range(half)):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = complex(x[b, h, t, first], x[b, h, t, second]) * complex(
            cos[b % len(cos), t, i], sin[b % len(sin), t, i]
        )
        out[b][h][t][first], out[b][h][t][second] = turned.real, turned.imag
    return [out]


def gelu(x: Tensor, approximate: str = "tanh") -> list[Any]:
    return [[activated(value, {"tanh": "gelu_tanh", "none": "gelu"}[approximate]) for value in x.flatten().tolist()]]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> list[Any]:
    outputs = list(zip(weight.tolist(), numbers(bias, weight), strict=True))
    return [[[activated(dot(row, w) + b, activation) for w, b in outputs] for row in rows(x)]]


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> list[Any]:
    ((gate,), (up,)) = linear(x, gate_weight, gate_bias, activation), linear(x, up_weight, up_bias)
    return [[[g * u for g, u in zip(*pair, strict=True)] for pair in zip(gate, up, strict=True)]]


def quantized_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    minimum: Tensor | None = None,
    scale_code: Tensor | None = None,
    minimum_code: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> list[Any]:
    def of_group(numbers: list[list[float]], codes: list[list[int]] | None, row: int, group: int) -> float:
        return numbers[row][group] if codes is None else numbers[row][group // 8] * codes[row][group]

    def element(row: int, k: int) -> float:
        if values.dtype == torch.int8:
            return integers[row][k] * (scales[row] if scale.ndim == 1 else scales[row][k // 32])
        byte = integers[row][k // 2]
        nibble = byte >> 4 if k % 2 else byte & 15
        of_scale = of_group(scales, scale_codes, row, k // 32)
        if minima is None:
            return (nibble - 8) * of_scale
        return nibble * of_scale + of_group(minima, minimum_codes, row, k // 32)

    integers, scales = values.tolist(), scale.tolist()
    minima = None if minimum is None else minimum.tolist()
    scale_codes = None if scale_code is None else scale_code.tolist()
    minimum_codes = None if minimum_code is None else minimum_code.tolist()
    weight = [[element(row, k) for k in range(x.shape[-1])] for row in range(values.shape[0])]
    return linear(x, torch.tensor(weight, dtype=torch.float64), bias, activation)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> list[Any]:
    losses = []
    for row, target in zip(rows(hidden), targets.flatten().tolist(), strict=True):
        logits = [dot(row, w) for w in weight.tolist()]
        if target != ignore_index:
            largest = max(logits)
            losses.append(largest + math.log(math.fsum(math.exp(x - largest) for x in logits)) - logits[target])
    return [math.fsum(losses) / len(losses)]


BY_HAND: dict[str, Callable[..., list[Any]]] = {
    "causal_attention": causal_attention,
    "bidirectional_attention": bidirectional_attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rotary": rotary,
    "gelu": gelu,
    "linear": linear,
    "gated_linear": gated_linear,
    "linear_cross_entropy": linear_cross_entropy,
    "quantized_linear": quantized_linear,
}


def rows(x: Tensor) -> list[list[float]]:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).tolist()


def added(x: Tensor, residual: Tensor) -> Tensor:
    pairs = zip(rows(x), rows(residual), strict=True)
    total = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
    return torch.tensor(total, dtype=torch.float64).view(x.shape)


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def numbers(bias: Tensor | None, like: Any) -> list[float]:
    return [0.0] * len(like) if bias is None else bias.tolist()


def activated(x: float, activation: str | None) -> float:
    if activation == "silu":
        return x / (1 + math.exp(-x))
    if activation == "gelu_tanh":
        return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + math.erf(x / math.sqrt(2))) if activation == "gelu" else x


def philox(counter: tuple[int, ...], key: int) -> int:
    """The first word of Philox4x32-10 (Salmon et al., 2011), in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % 2**32, key >> 32
    for _ in range(10):
        first, third = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = third >> 32 ^ c1 ^ k0, third % 2**32, first >> 32 ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


def named(cases: Sequence[Case]) -> list[Any]:
    return [pytest.param(case, id=f"{case.op}-{case.name}") for case in cases]


SMALL = [case for case in CASES if case.elements <= 40_000]


@pytest.mark.parametrize("case", named(SMALL))
def test_the_reference_is_the_formula(case: Case) -> None:
    tensors = case.make(torch.float64, "cpu")
    settings = dict(case.settings)
    if "q" in tensors:
        settings.setdefault("scale", tensors["q"].shape[-1] ** -0.5)
    expected = BY_HAND[case.op](**tensors, **settings)
    for got, by_hand in zip(case.call(reference, tensors), expected, strict=True):
        wanted = torch.tensor(by_hand, dtype=torch.float64).reshape(got.shape)
        assert got.dtype == torch.float64
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13 * max(1.0, largest))


def test_every_op_is_written_by_hand() -> None:
    assert BY_HAND.keys() == set(OPS)
    assert {case.op for case in SMALL} == set(OPS)


@pytest.mark.parametrize("case", named([case for case in SMALL if case.differentiable and case.elements]))
def test_the_gradients_of_the_reference_are_finite_differences(case: Case) -> None:
    tensors = case.make(torch.float64, "cpu")
    leaves = {name: t for name, t in case.leaves(tensors).items() if t is not None and t.requires_grad}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return case.call(reference, {**tensors, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize(
    "counter, key, word",
    [  # from the tests of Random123, the authors' library
        ((0, 0, 0, 0), 0, 0x6627E8D5),
        ((2**32 - 1,) * 4, 2**64 - 1, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 0xD16CFE09),
    ],
)
def test_philox_gives_the_published_numbers(counter: tuple[int, ...], key: int, word: int) -> None:
    assert philox(counter, key) == word


def test_a_known_value_of_each_op() -> None:
    """Small enough for a pocket calculator, so that this file and the reference can't be wrong in the same way."""
    one = torch.ones(1, 1, 2, 1)
    ramp = torch.tensor([[[[0.0], [math.log(3)]]]])  # the second query's weights are 1/4 and 3/4
    assert reference.causal_attention(one, ramp, torch.tensor([[[[4.0], [8.0]]]]), scale=1.0).tolist() == [
        [[[4.0], [pytest.approx(7.0)]]]
    ]
    normed = reference.layer_norm(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0]), torch.ones(2), eps=8.0)
    assert normed.tolist() == pytest.approx([1 - 2 / 3, 1 + 5 / 3])
    assert reference.gelu(torch.tensor([1.0]), "none").item() == pytest.approx(0.8413447460685429)
    assert reference.gelu(torch.tensor([1.0]), "tanh").item() == pytest.approx(0.8411919906082768)
    product = reference.linear(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]))
    assert product.tolist() == [16.0]
    assert reference.rms_norm(torch.tensor([1.0, 7.0]), torch.tensor([2.0, 5.0]), eps=11.0).tolist() == pytest.approx(
        [2 / 6, 35 / 6]
    )
    quarter = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # a quarter turn takes (1, 0) to (0, 1)
    assert reference.rotary(torch.tensor([[[[1.0, 0.0, 5.0]]]]), *quarter).tolist() == [[[[0.0, 1.0, 5.0]]]]
    gate = torch.tensor([[math.log(3)]])  # silu(log 3) is 3/4 log 3
    gated = reference.gated_linear(torch.ones(1), gate, torch.tensor([[8.0]]))
    assert gated.item() == pytest.approx(6 * math.log(3))
    both = reference.bidirectional_attention(one, ramp, torch.tensor([[[[4.0], [8.0]]]]), scale=1.0)
    assert both.flatten().tolist() == pytest.approx([7.0, 7.0])
    # two of three rows count: log 4 - log 3 and log 4
    logits = torch.tensor([[math.log(3), 0.0]] * 3)
    loss = reference.linear_cross_entropy(logits, torch.eye(2), torch.tensor([0, 1, 7]), ignore_index=7)
    assert loss.item() == pytest.approx((2 * math.log(4) - math.log(3)) / 2)


def test_the_reference_shares_no_code_with_what_it_judges() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not any(str(name).startswith("llmfast") for name in imported)
