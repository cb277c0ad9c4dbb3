"""The ops of the benchmarks: what they count, and that a wrong kernel is refused a speed."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import llmfast
from llmfast.backends import pytorch
from llmfast.benchmarking import op_cases
from llmfast.benchmarking.comparison import WrongResult, run
from llmfast.benchmarking.op_check import ROWS, OpCheck, checked_rows
from llmfast.benchmarking.timing import Effort
from llmfast.contract import cases

ONCE = Effort(seconds=0.0, rounds=(1, 1), turn=0.0)
C, V, N = 768, 50257, 2048
SMALL = {
    "causal_attention": cases.causal_attention("", 1, 2, 2, 300, 300, 16, fused=True),
    "window_attention": cases.causal_attention("", 1, 2, 2, 300, 300, 16, fused=True, window=50),
    "bidirectional_attention": cases.bidirectional_attention("", 1, 2, 2, 300, 300, 16, fused=True),
    "decode_attention": cases.causal_attention("", 1, 2, 2, 1, 300, 16),
    "layer_norm": cases.layer_norm("", (300, 24)),
    "add_layer_norm": cases.add_layer_norm("", (300, 24)),
    "rms_norm": cases.rms_norm("", (300, 24)),
    "add_rms_norm": cases.add_rms_norm("", (300, 24)),
    "rotary": cases.rotary("", 1, 2, 300, 16, 16, fused=True),
    "gelu": cases.gelu("", (300, 40), "tanh"),
    "linear": cases.linear("", (300, 24), 10),
    "gated_linear": cases.gated_linear("", (300, 24), 10),
    "linear_cross_entropy": cases.linear_cross_entropy("", (300,), 24, 90),
}


def test_the_counts_by_hand():
    def counts(op: str, T: int, direction: str = "forward") -> tuple[int, int, int]:
        work = getattr(op_cases.OPS[op](T), direction)
        return work.read, work.written, work.operations

    # Two tokens see three pairs; each pair is two products of 768 numbers.
    assert counts("causal_attention", 2) == (3 * 2 * C, 2 * C, 3 * 2 * 2 * C)
    assert counts("causal_attention", 2, "backward") == (5 * 2 * C, 3 * 2 * C, 5 * 3 * 2 * C)
    # Of 300 tokens the first 256 see all before them and themselves, the others 256.
    assert counts("window_attention", 300)[2] == (256 * 257 // 2 + 44 * 256) * 4 * C
    assert counts("bidirectional_attention", 3, "backward") == (5 * 3 * C, 3 * 3 * C, 5 * 9 * 2 * C)
    assert counts("decode_attention", 10) == ((2 * 10 + 1) * C, C, 10 * 2 * 2 * C)
    assert counts("layer_norm", 5) == (5 * C, 5 * C, 8 * 5 * C)
    assert counts("add_layer_norm", 5) == (10 * C, 10 * C, 9 * 5 * C)
    assert counts("rms_norm", 5, "backward") == (10 * C, 5 * C, 9 * 5 * C)
    assert counts("add_rms_norm", 5) == (10 * C, 10 * C, 5 * 5 * C)
    assert counts("rotary", 5) == (5 * C, 5 * C, 3 * 5 * C)
    assert counts("gelu", 5) == (20 * C, 20 * C, 400 * C)
    assert counts("linear", 5) == (5 * C + 4 * C * C, 20 * C, 2 * 5 * 4 * C * C)
    assert counts("linear", 5, "backward") == (25 * C + 4 * C * C, 5 * C + 4 * C * C, 4 * 5 * 4 * C * C)
    assert counts("gated_linear", 5) == (5 * C + 2 * C * N, 5 * N, 2 * 2 * 5 * C * N)
    assert counts("gated_linear", 5, "backward") == (5 * C + 15 * N + 2 * C * N, 5 * C + 2 * C * N, 8 * 5 * C * N)
    assert counts("linear_cross_entropy", 5) == ((5 + V) * C, 0, 2 * 5 * C * V)
    assert counts("linear_cross_entropy", 5, "backward")[2] == 6 * 5 * C * V


def test_what_takes_too_long_is_left_out():
    found = list(op_cases.comparisons([1, 4096], most_operations=1e9, precisions=["fp32"], compiled=False))
    names = {(c.name, c.sizes.get("tokens", c.sizes.get("context"))) for c in found}
    assert ("gelu forward", 4096) in names and ("linear forward", 1) in names
    assert ("linear forward", 4096) not in names and ("decode_attention backward", 1) not in names


@pytest.mark.parametrize("tokens", [1, 5, 3 * ROWS, 3 * ROWS + 1, 1000])
def test_checked_rows_lie_inside_and_reach_both_ends(tokens):
    rows = checked_rows(tokens)
    assert rows[0].start == 0 and rows[-1].stop == tokens
    assert all(a.stop <= b.start for a, b in zip(rows, rows[1:], strict=False))


@pytest.mark.parametrize("op", SMALL)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_is_right_passes(op, backward):
    torch.manual_seed(0)
    case = SMALL[op]
    for dtype in (torch.float32, torch.bfloat16):
        check = OpCheck(case, case.make(dtype, "cpu"), backward)
        with llmfast.use_backend("pytorch"):
            assert check(llmfast.ops) <= 1


@pytest.mark.parametrize("op", SMALL)
@pytest.mark.parametrize("where", [0, 150, 299], ids=["first", "middle", "last"])
def test_one_wrong_row_is_noticed(op, where):
    """In the result, and in a gradient."""
    case = SMALL[op]
    tensors = case.make(torch.float32, "cpu")
    row = 0 if op == "decode_attention" else where

    def wrong(*arguments, **settings):
        results = getattr(pytorch, case.op)(*arguments, **settings)
        first = results[0] if isinstance(results, tuple) else results
        spoiled = first.clone()
        if first.ndim == 0:
            spoiled = spoiled * 1.01
        else:
            spoiled.movedim(2 if spoiled.ndim == 4 else 0, 0)[row] += 0.1
        return (spoiled, *results[1:]) if isinstance(results, tuple) else spoiled

    functions = types.SimpleNamespace(**{case.op: wrong})
    with pytest.raises(WrongResult, match="the result 0 is off by"):
        OpCheck(case, tensors, backward=False)(functions)


@pytest.mark.parametrize("op", SMALL)
def test_a_wrong_gradient_is_noticed(op):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 0.5 * grad

    case = SMALL[op]
    name = next(iter(case.make(torch.float32, "cpu")))

    def wrong(*arguments, **settings):
        settings[name] = Halved.apply(settings[name])
        return getattr(pytorch, case.op)(*arguments, **settings)

    check = OpCheck(case, case.make(torch.float32, "cpu"), backward=True)
    with pytest.raises(WrongResult, match=f"gradient of {name} is off by"):
        check(types.SimpleNamespace(**{case.op: wrong}))


@pytest.fixture
def own_registry(monkeypatch):
    """Backends registered by a test are gone after it."""
    module = sys.modules["llmfast.backends"]  # `llmfast.backends` is the function
    monkeypatch.setattr(module, "_registry", module._registry.copy())


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_somebodys_kernel_is_measured_or_refused(direction, own_registry):
    """From the outside: registered, compared, timed; a wrong one gets a problem and no speed."""
    right = types.SimpleNamespace(gelu=lambda x, approximate: pytorch.gelu(x, approximate))
    wrong = types.SimpleNamespace(gelu=lambda x, approximate: torch.relu(x))
    llmfast.register_backend("right_gelu", right)
    llmfast.register_backend("wrong_gelu", wrong)
    found = op_cases.comparisons([3], 1e9, ["fp32"], chosen=["right_gelu", "wrong_gelu"], compiled=False)
    (comparison,) = [c for c in found if c.name == f"gelu {direction}"]
    records = {m.record.backend: m.record for m in run(comparison, ONCE)}
    assert set(records) == {"pytorch", "right_gelu", "wrong_gelu"}
    assert records["right_gelu"].seconds.median > 0 and records["right_gelu"].checked <= 1
    assert [v.competitor for v in records["right_gelu"].versus] == ["pytorch fp32"]
    assert records["wrong_gelu"].seconds is None and "not timed" in records["wrong_gelu"].problem


def test_only_ops_that_a_chosen_backend_has_are_compared(own_registry):
    llmfast.register_backend("only_gelu", types.SimpleNamespace(gelu=pytorch.gelu))
    found = op_cases.comparisons([3], 1e9, ["fp32"], chosen=["only_gelu"], compiled=False)
    assert {c.name for c in found if c.entries} == {"gelu forward", "gelu backward"}
