"""The Triton kernels in the interpreter: what the parity suite does not reach through the contract alone.

Every family's tiles, tensor descriptors, very sharp attention, targets out of range. On a GPU they run there for real,
under that GPU's own tiles.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_contract import AT_ANY_SHAPE, any_case

import llmfast
from llmfast import ops
from llmfast.contract import Case, cases, check, checking
from llmfast.contract.suite import DTYPE_NAMED

pytest.importorskip("triton")

from llmfast.kernels import launch
from llmfast.kernels.attention_forward import ForwardTile
from llmfast.kernels.causal_attention import causal_attention, causal_attention_backward
from llmfast.kernels.configurations import configuration, using

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    not any(row.backend == "triton" and row.available for row in llmfast.backends()), reason="nothing runs Triton here"
)


@pytest.mark.parametrize("name", ["float32", "float16"])
@settings(max_examples=10)
@given(case=any_case(longest=24, widest=70, heads=2))
def test_the_kernels_agree_with_the_reference_at_any_shape(name: str, case: Case) -> None:
    assert not check(case, "triton", DEVICE, DTYPE_NAMED[name], **AT_ANY_SHAPE).problems


LONGER_THAN_EVERY_TILE = [
    cases.causal_attention("plain", 1, 2, 2, 150, 150, 64),
    cases.causal_attention("burdened", 2, 4, 2, 70, 140, 48, lengths=[140, 90], dropout_p=0.2),
    cases.causal_attention("decoding", 2, 4, 2, 2, 300, 64, lengths=[300, 17]),
    cases.causal_attention("window", 1, 2, 1, 150, 180, 64, lengths=[170], window=70),
    cases.causal_attention("decoding in a window", 2, 4, 2, 2, 300, 64, lengths=[300, 17], window=150),
    cases.bidirectional_attention("both ways", 2, 2, 2, 150, 140, 64, lengths=[130, 70]),
    cases.add_layer_norm("rows", (37, 768)),
    cases.add_rms_norm("rows", (37, 576)),
    cases.rotary("tokens", 2, 3, 40, 80, 32),
    cases.linear("epilogue", (150, 200), 140, activation="gelu_tanh"),
    cases.gated_linear("gated", (150, 200), 140, gate_bias=True),
    cases.linear_cross_entropy("loss", (150,), 70, 300, ignored=True),
    cases.quantized_linear("int4", (5, 200), 140, "int4"),
]


# The interpreter's own family runs in every other test. Most tiles of the last two are those of another one.
OTHER_FAMILIES = [
    "ampere",
    "hopper",
    pytest.param("blackwell", marks=pytest.mark.slow),
    pytest.param("cdna", marks=pytest.mark.slow),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has one family")
@pytest.mark.parametrize("case", LONGER_THAN_EVERY_TILE, ids=lambda case: f"{case.op}-{case.name}")
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_every_familys_tiles_compute_the_same(family: str, case: Case) -> None:
    with launch.pretend(launch.Device(family, 7)):
        assert not check(case, "triton", DEVICE, torch.float16).problems


def test_what_lies_outside_of_a_window_is_not_visited():
    # What is masked meets a NaN as 0 * NaN. So what stays finite was neither read nor multiplied.
    S, window, early = 600, 100, 200
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, S, 16, device=DEVICE).unbind(0)

    def spoiled(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[:, :, rows] = float("nan")
        return tensor

    late = slice(early + window + 128, None)  # 128 rows: the largest tile
    k_late, v_late = spoiled(k, slice(early)), spoiled(v, slice(early))
    inputs = (0.25, 0.0, None, None, window, True)
    out, lse = causal_attention(q[:, :, late], k_late, v_late, *inputs)
    step, _ = causal_attention(q[:, :, -1:], k_late, v_late, *inputs)  # few queries: the keys are split
    assert out.isfinite().all() and step.isfinite().all()
    dq, _, _ = causal_attention_backward(out, q[:, :, late], k_late, v_late, out, lse, *inputs)
    assert dq.isfinite().all()
    out, lse = causal_attention(q, k, v, *inputs)
    _, dk, dv = causal_attention_backward(spoiled(out, late), q, k, v, out, lse, *inputs)
    assert dk[:, :, :early].isfinite().all() and dv[:, :, :early].isfinite().all()


@pytest.mark.parametrize("lengths", [None, [90, 41]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensor_descriptors_give_the_same_bits_as_pointers(dtype: torch.dtype, lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 90, 3, 2, 80, dtype=dtype, device=DEVICE).permute(2, 0, 3, 1, 4).unbind(0)
    if lengths is not None:
        v[1, :, lengths[1] :] = float("nan")  # what lies past a length is never multiplied
        lengths = torch.tensor(lengths, device=DEVICE)
    family = launch.gpu_family(q)
    tile = configuration(
        "attention_forward", ForwardTile, family, element_bytes=dtype.itemsize, head_dim=128, heavy=False
    )
    out, lse = causal_attention(q, k, v, 0.1, 0.0, None, lengths, 0, True)
    with using("attention_forward", replace(tile, descriptors=True)):
        by_descriptors, its_lse = causal_attention(q, k, v, 0.1, 0.0, None, lengths, 0, True)
    assert out.isfinite().all() and torch.equal(out, by_descriptors) and torch.equal(lse, its_lse)


@pytest.fixture
def dots_in_one_order(monkeypatch):
    """In the interpreter, sums of products as a GPU adds them: in the order of the inner dimension.

    BLAS, which the interpreter asks, adds them in an order that depends on the sizes of the tiles and on which operand
    is the first.
    """
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, total, *_):
        result = np.array(total.data)
        for k in range(a.data.shape[-1]):
            result = result + a.data[:, k, None] * b.data[None, k, :]
        return interpreter.TensorHandle(result, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("scale, head_dim", [(3.0, 16), (8.0, 64), (60.0, 16)])
def test_gradients_of_very_sharp_attention_keep_float32s_accuracy(dots_in_one_order, monkeypatch, scale, head_dim):
    monkeypatch.setattr(checking, "CAP", math.inf)  # PyTorch's own error is beyond it here
    # Scores of hundreds and more: the log-sum-exp's rounding alone would be an error of 1e-5 and more in every weight.
    case = cases.causal_attention("sharp", 1, 2, 2, 40, 40, head_dim, scale=scale)
    assert not check(case, "triton", DEVICE, torch.float32).problems


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_a_target_out_of_range_makes_the_loss_and_the_gradients_nan(wrong: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(50, 16, device=DEVICE, requires_grad=True)
    targets = torch.tensor([3, wrong, -100, 0, 49], device=DEVICE)
    with llmfast.use_backend("triton"):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
        dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isnan() and dweight.isnan().all()
    assert dhidden[1].isnan().all() and dhidden[[0, 2, 3, 4]].isfinite().all()


def test_rows_that_start_anywhere_are_computed_like_others():
    torch.manual_seed(0)
    rows = torch.randn(2, 2, 30, 67, device=DEVICE)[..., 3:]  # 64 channels, 67 apart

    def result_and_gradient(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = q.detach().requires_grad_()
        with llmfast.use_backend("triton"):
            out = ops.causal_attention(q, q, q)
            return out, torch.autograd.grad(out.square().sum(), q)[0]

    for got, expected in zip(result_and_gradient(rows), result_and_gradient(rows.contiguous()), strict=True):
        assert torch.equal(got, expected)
