"""Quantised weights: linear layers on them at any shape, and a model that keeps them."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import assert_same_greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import AT_ANY_SHAPE

import llmfast
from llmfast import ops
from llmfast.contract import check
from llmfast.contract.cases import quantized_linear
from llmfast.quantization.formats import FORMATS, quantize
from llmfast.quantization.modules import QuantizedLinear
from llmfast.quantization.plan import PRECISIONS, plan
from llmfast.weights import checkpoint
from llmfast.weights.quantizing import quantize_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

AVAILABLE = [r for r in llmfast.backends() if r.op == "quantized_linear" and r.available and r.backend != "reference"]
PLACES = [
    pytest.param(r.backend, r.device, getattr(torch, r.dtype), id=f"{r.backend}-{r.device}-{r.dtype}")
    for r in AVAILABLE
    if (r.backend, r.device, r.dtype) != ("pytorch", "cpu", "float16")
]


@settings(max_examples=25)
@given(
    st.sampled_from(PLACES),
    st.tuples(st.integers(1, 90), st.integers(1, 300)),
    st.integers(1, 100),
    st.sampled_from(FORMATS),
    st.booleans(),
    st.sampled_from([None, "gelu", "gelu_tanh"]),
)
def test_it_agrees_with_the_dequantised_weights_at_any_shape(place, shape, N, precision, bias, activation):
    case = quantized_linear("any", shape, N, precision, bias, activation)
    assert not check(case, *place.values, **AT_ANY_SHAPE).problems


@pytest.mark.parametrize("precision", ["int4", "q4_k"])
@pytest.mark.parametrize("backend, device, dtype", PLACES)
def test_nothing_in_nothing_out_and_strides_do_not_matter(backend, device, dtype, precision):
    weight = quantize(torch.randn(6, 40, device=device), precision)
    x = torch.randn(40, 3, 2, dtype=dtype, device=device).permute(2, 1, 0)
    with llmfast.use_backend(backend):
        y = ops.quantized_linear(x, **weight.parts)
        assert torch.equal(y, ops.quantized_linear(x.contiguous(), **weight.parts))
        assert ops.quantized_linear(x[:0], **weight.parts).shape == (0, 3, 6)


def test_wrong_arguments_are_named():
    weight = quantize(torch.randn(6, 40), "int8")
    x = torch.randn(2, 40)
    for call, complaint in {
        (x[:, 1:], weight.values, weight.scale): r"int8 must have values \(6, 39\), scale \(6,\), got x \(2, 39\)",
        (x, weight.values, weight.scale[1:]): r"must have .*, scale \(6,\), got .*, scale \(5,\)",
        (x, weight.values.float(), weight.scale): "got values torch.float32",
        (x, weight.values, weight.scale, torch.ones(5)): r"bias must be \(N,\)",
        (x, weight.values, weight.scale, None, "relu"): "activation must be",
        (x, weight.values, weight.scale, torch.ones(6, dtype=torch.float64)): "share one dtype",
        (x, weight.values, weight.scale.clone().requires_grad_()): "has no gradients for the parts",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            ops.quantized_linear(*call)


def test_the_parts_of_a_format_come_together():
    parts = dict(quantize(torch.randn(6, 40), "q4_k").parts)
    x = torch.randn(2, 40)
    del parts["minimum_code"]
    with pytest.raises(ValueError, match=r"those of a weight in int8, .*, got .*, scale_code torch.uint8$"):
        ops.quantized_linear(x, **parts)
    parts = dict(quantize(torch.randn(6, 40), "q4_1").parts)
    parts["minimum"] = parts["minimum"][:, :1]
    with pytest.raises(ValueError, match=r"q4_1 must have .*, minimum \(6, 2\), got .*, minimum \(6, 1\)"):
        ops.quantized_linear(x, **parts)


def test_explain_says_where_the_weights_are_made_floats():
    weight = quantize(torch.randn(6, 40), "int8")
    with llmfast.use_backend("pytorch"):
        found = llmfast.explain("quantized_linear", torch.randn(2, 40), weight.values, weight.scale)
    assert found.backend == "pytorch" and "floats in every call" in str(found)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="opcheck on CPU tensors needs the interpreter")
@pytest.mark.parametrize("precision", FORMATS)
def test_the_operator_keeps_pytorchs_rules(precision):
    weight = quantize(torch.randn(9, 40), precision)
    arguments = (torch.randn(2, 40), weight.values, weight.scale, torch.randn(9), "gelu")
    further = {name: part for name, part in weight.parts.items() if name not in ("values", "scale")}
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.llmfast_triton.quantized_linear, arguments, further, test_utils=checks)


# --- the model ------------------------------------------------------------------------------------------------------


def places_and_precisions() -> list:
    """In the interpreter one model is enough: int4 has both formats."""
    places = dict.fromkeys((r.backend, r.device) for r in AVAILABLE if r.backend != "cpp")
    pairs = [(place, precision) for place in places for precision in PRECISIONS]
    return [
        pytest.param(*place, precision, id="-".join((*place, precision)))
        for place, precision in pairs
        if place != ("triton", "cpu") or precision == "int4"
    ]


@pytest.mark.parametrize("backend, device, precision", places_and_precisions())
def test_a_quantised_model_gives_the_text_of_its_dequantised_weights(storyteller_directory, backend, device, precision):
    llm = llmfast.load(storyteller_directory, backend=backend, device=device, precision=precision)
    assert llm.precision == precision == llm.model.quantized_to
    floats = llmfast.load(storyteller_directory, backend="pytorch", device=device, precision="fp32")
    with torch.no_grad():
        for name, form in plan(llm.config, precision).items():
            weight = floats.model.get_parameter(name)
            weight.copy_(quantize(weight, form).dequantize())
    ids = torch.tensor(floats.tokenizer.encode("The dog"))
    expected = floats.generate(ids, max_new_tokens=4, temperature=0)
    got = llm.generate(ids, max_new_tokens=4, temperature=0)
    if llm.model.dtype == torch.float32:
        assert_same_greedy(expected.tolist(), got.tolist(), floats.model, len(ids), f"{backend} {precision}")
        loss = llm.model.loss(ids[None, :-1].to(device), ids[None, 1:].to(device))
        torch.testing.assert_close(loss, floats.model.loss(ids[None, :-1].to(device), ids[None, 1:].to(device)))


def test_a_tied_head_and_embedding_are_one_weight_in_memory(storyteller_directory):
    model = llmfast.load(storyteller_directory, backend="pytorch", device="cpu", precision="int4").model
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.values is model.transformer.wte.values
    assert model.lm_head.part_names == ("values", "scale")
    moved = model.to(torch.device("cpu"))
    assert moved.lm_head.scale is moved.transformer.wte.scale


@pytest.mark.parametrize("precision", ["int4", "q4_1", "q4_k"])
def test_a_quantised_model_saves_what_quantize_writes(storyteller_directory, tmp_path, precision):
    llm = llmfast.load(storyteller_directory, backend="pytorch", device="cpu", precision=precision)
    llm.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(storyteller_directory, tmp_path / "written", precision)
    saved, written = (dict(checkpoint.stream(tmp_path / name)) for name in ("saved", "written"))
    assert saved.keys() == written.keys()
    for name in plan(llm.config, precision):
        assert all(torch.equal(part, written[name].parts[p]) for p, part in saved[name].parts.items())
    again = llmfast.load(tmp_path / "saved", backend="pytorch", device="cpu", precision=precision)
    assert again.generate("The", temperature=0) == llm.generate("The", temperature=0)


def test_a_quantised_file_runs_in_another_precision_too(storyteller_directory, tmp_path):
    quantize_checkpoint(storyteller_directory, tmp_path, "int8")
    llm = llmfast.load(tmp_path, backend="pytorch", device="cpu", precision="int4")
    assert llm.precision == "int4"
    formats = {f"{n}.weight": m.precision for n, m in llm.model.named_modules() if hasattr(m, "stored")}
    assert formats == plan(llm.config, "int4") | {"lm_head.weight": "int8"}
