"""Weights in 8 and 4 bits: what the bytes mean, how much they lose at most, and what is refused."""

import dataclasses

import pytest
import torch
from conftest import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llmfast
from llmfast.quantization.formats import FORMATS, QuantizedWeight, layout, quantize, squared_error
from llmfast.quantization.plan import PRECISIONS, Quantization, plan

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = st.tuples(st.integers(0, 7), st.integers(1, 100))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def weights(draw) -> torch.Tensor:
    """Any shape, strides and floating dtype; normal, with rows of zeros, and with outliers."""
    N, K = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(N, K, generator=generator)
    if draw(st.booleans()):
        weight[torch.rand(N, generator=generator) < 0.3] = 0
    if draw(st.booleans()):
        weight[torch.rand(N, K, generator=generator) < 0.02] *= 50
    weight = weight.to(draw(DTYPES))
    return weight.t().contiguous().t() if draw(st.booleans()) else weight


def in_groups(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-(-weight.shape[1] // 32), 32))


# --- what the bytes mean ----------------------------------------------------------------------------------------


def test_the_bytes_of_int8():
    weight = QuantizedWeight(
        "int8", torch.tensor([[-127, 0, 127], [1, 2, -3]], dtype=torch.int8), torch.tensor([0.5, 2.0]), (2, 3)
    )
    assert weight.dequantize().tolist() == [[-63.5, 0, 63.5], [2, 4, -6]]
    assert weight.nbytes == 6 + 8


def test_the_bytes_of_int4():
    """The first element is in the low nibble of the first byte; a nibble is eight more than what it means."""
    values = torch.full((1, 32), 0x88, dtype=torch.uint8)
    values[0, :3] = torch.tensor([0x1F, 0x80, 0x97])
    values[0, 16] = 0xA9  # the second group
    weight = QuantizedWeight("int4", values, torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16), (1, 35))
    expected = torch.zeros(1, 35)
    expected[0, :6] = torch.tensor([3.5, -3.5, -4.0, 0.0, -0.5, 0.5])
    expected[0, 32:34] = torch.tensor([-2.0, -4.0])
    assert torch.equal(weight.dequantize(), expected)
    assert weight.nbytes == 32 + 4


@pytest.mark.parametrize("largest", [8.0, -8.0])
def test_int4_reaches_its_end_with_the_largest_of_a_group(largest):
    """Nothing is lost of what lies on the grid; the side that has an eighth step is turned to where it is needed."""
    row = torch.arange(-7.0, 8.0).repeat(3)[:32]
    row[0] = largest
    weight = quantize(row[None] * 0.125, "int4")
    assert torch.equal(weight.dequantize(), row[None] * 0.125)
    assert abs(float(weight.scale)) == 0.125 and int(weight.values[0, 0]) & 15 == 0


@settings(max_examples=100)
@given(SHAPES, st.sampled_from(FORMATS))
def test_the_layout_is_what_quantize_makes(shape, precision):
    weight = quantize(torch.ones(shape), precision)
    for part, (size, dtype) in layout(precision, shape).items():
        tensor = getattr(weight, part)
        assert (tuple(tensor.shape), tensor.dtype) == (size, dtype) and tensor.is_contiguous()
    assert weight.shape == shape
    assert weight.nbytes == weight.values.nbytes + weight.scale.nbytes


@given(st.integers(1, 70))
def test_int4_pads_rows_with_zeros(K):
    padding = quantize(torch.randn(2, K), "int4").values[:, (K + 1) // 2 :]
    assert (padding == 0x88).all()
    if K % 2:
        assert (quantize(torch.randn(2, K), "int4").values[:, K // 2] >> 4 == 8).all()


# --- how much is lost -------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(weights())
def test_int8_is_off_by_at_most_half_a_step(weight):
    quantized = quantize(weight, "int8")
    error = (quantized.dequantize(torch.float64) - weight.double()).abs()
    assert (error <= quantized.scale.double()[:, None] * (0.5 + 1e-4)).all()
    torch.testing.assert_close(quantized.scale, weight.float().abs().amax(1) / 127)


@settings(max_examples=200)
@given(weights())
def test_int4_is_off_by_at_most_half_a_step_where_it_does_not_cut_off(weight):
    quantized = quantize(weight, "int4")
    error = in_groups((quantized.dequantize(torch.float64) - weight.double()).abs())
    half = quantized.scale.double().abs()[:, :, None] * (0.5 + 1e-4)
    nibbles = in_groups(torch.stack([quantized.values & 15, quantized.values >> 4], -1).flatten(1))
    assert ((error <= half) | (nibbles == 0) | (nibbles == 15)).all()


@settings(max_examples=100)
@given(weights())
def test_int4_is_no_worse_than_the_plain_choices_of_a_scale(weight):
    """Those of llama.cpp's q4_0 (the largest at -8) and of a symmetric grid (the largest at 7)."""
    groups = in_groups(weight.double())
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = torch.full(groups.shape[:2], torch.inf, dtype=torch.float64)
    for scale in (largest / -8, largest / 7):
        scale = scale.bfloat16().double()
        rounded = (groups / scale.masked_fill(scale == 0, 1)).round().clamp(-8, 7) * scale
        best = torch.minimum(best, (rounded - groups).square().sum(2))
    actual = in_groups(quantize(weight, "int4").dequantize(torch.float64) - weight.double()).square().sum(2)
    assert (actual <= best * (1 + 1e-5) + 1e-12).all()


def test_how_much_normal_weights_lose():
    weight = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    for precision, most in (("int8", 0.0080), ("int4", 0.0815)):
        lost, whole = squared_error(weight, quantize(weight, precision))
        assert 0.95 * most < (lost / whole) ** 0.5 < most
        difference = quantize(weight, precision).dequantize() - weight
        assert lost == pytest.approx(float(difference.double().square().sum()), rel=1e-5)
        assert whole == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


@settings(max_examples=50)
@given(weights(), st.sampled_from(FORMATS))
def test_what_has_been_quantised_loses_nothing_more(weight, precision):
    once = quantize(weight, precision).dequantize()
    torch.testing.assert_close(quantize(once, precision).dequantize(), once, rtol=1e-6, atol=0)


@settings(max_examples=100)
@given(st.floats(-44, 38.53), SHAPES, st.sampled_from(FORMATS))
@example(38.53, (3, 40), "int8")
@example(38.53, (3, 40), "int4")
@example(-44.0, (3, 40), "int4")
def test_huge_and_tiny_weights_stay_finite_and_in_proportion(exponent, shape, precision):
    largest = min(10.0**exponent, torch.finfo(torch.float32).max)
    weight = (torch.rand(shape, dtype=torch.float64) * 2 - 1).mul(largest).float()
    restored = quantize(weight, precision).dequantize()
    assert restored.isfinite().all()
    if largest > 1e-34:  # above what a scale in bfloat16 can still resolve
        tolerance = largest * (0.005 if precision == "int8" else 0.25)
        assert ((restored.double() - weight.double()).abs() <= tolerance).all()


@given(st.sampled_from(FORMATS), st.integers(1, 65), DTYPES)
def test_zeros_stay_zeros(precision, K, dtype):
    weight = quantize(torch.zeros(3, K, dtype=dtype), precision)
    assert not weight.scale.any() and not weight.dequantize().any()


@settings(max_examples=20)
@given(weights(), st.sampled_from(FORMATS), st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_dequantizing_to_another_dtype_rounds_the_float32(weight, precision, dtype):
    quantized = quantize(weight, precision)
    restored = quantized.dequantize(dtype)
    assert restored.is_contiguous() and restored.shape == weight.shape
    assert torch.equal(restored, quantized.dequantize().to(dtype))


def test_a_weight_of_many_chunks_is_quantised_row_by_row():
    weight = torch.randn(700, 300)
    for precision in FORMATS:
        whole, rows = quantize(weight, precision), [quantize(row[None], precision) for row in weight[::50]]
        assert torch.equal(whole.values[::50], torch.cat([row.values for row in rows]))
        assert torch.equal(whole.scale[::50], torch.cat([row.scale for row in rows]))
        assert torch.equal(whole.dequantize()[::50], torch.cat([row.dequantize() for row in rows]))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(precision, wrong):
    weight = torch.ones(500, 300)
    weight[444, 33] = wrong
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize(weight, precision)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 3, 4), torch.ones(3, 0), torch.ones(3, 4).int()])
def test_what_is_no_matrix_of_floats_is_refused(weight):
    with pytest.raises(ValueError, match="must be floating point"):
        quantize(weight, "int8")


def test_an_unknown_precision_names_the_known_ones():
    with pytest.raises(ValueError, match="must be int8 or int4, got 'int3'"):
        quantize(torch.ones(2, 2), "int3")
    with pytest.raises(ValueError, match="must be int8, int4, int4-all, got 'int2'"):
        plan(tiny_config(), "int2")


@pytest.mark.parametrize(
    "precision, changes, complaint",
    [
        ("int8", {"values": torch.zeros(3, 40)}, r"values of int8 must be \(3, 40\) int8, got \(3, 40\) float32"),
        (
            "int8",
            {"values": torch.zeros(3, 39, dtype=torch.int8)},
            r"values of int8 must be \(3, 40\) int8, got \(3, 39",
        ),
        ("int8", {"scale": torch.zeros(3, 1)}, r"scale of int8 must be \(3,\) float32, got \(3, 1\)"),
        ("int8", {"scale": torch.zeros(3).bfloat16()}, r"scale of int8 must be \(3,\) float32, got \(3,\) bfloat16"),
        ("int8", {"scale": torch.tensor([1.0, float("nan"), 1.0])}, "scale holds infinities or NaN"),
        ("int8", {"values": torch.full((3, 40), -128, dtype=torch.int8)}, "hold -128"),
        ("int8", {"precision": "int4"}, r"values of int4 must be \(3, 32\) uint8"),
        ("int8", {"precision": "int5"}, "must be int8 or int4, got 'int5'"),
        ("int4", {"shape": (3, 70)}, r"values of int4 must be \(3, 48\) uint8, got \(3, 32\) uint8"),
        ("int4", {"scale": torch.zeros(3, 2)}, r"scale of int4 must be \(3, 2\) bfloat16, got \(3, 2\) float32"),
        ("int4", {"scale": torch.full((3, 2), torch.inf).bfloat16()}, "scale holds infinities or NaN"),
    ],
)
def test_a_weight_that_is_not_what_its_format_says_is_refused(precision, changes, complaint):
    weight = quantize(torch.randn(3, 40), precision)
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(weight, **changes)


def test_a_quantised_weight_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantize(torch.ones(2, 2), "int8").precision = "int4"  # type: ignore[misc]


# --- which weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_plan_names_every_matrix_but_the_positions(precision, tied):
    config = tiny_config(tie_word_embeddings=tied)
    parameters = dict(llmfast.GPT(config).named_parameters())  # a tied head is not named twice
    matrices = {name for name, parameter in parameters.items() if parameter.ndim == 2}
    assert plan(config, precision).keys() == matrices - {"transformer.wpe.weight"}
    assert set(plan(config, precision).values()) <= set(FORMATS)


def test_what_the_plans_choose():
    config = tiny_config(tie_word_embeddings=False)
    assert set(plan(config, "int8").values()) == {"int8"}
    assert set(plan(config, "int4-all").values()) == {"int4"}
    mixed = plan(config, "int4")
    assert {name for name, precision in mixed.items() if precision == "int8"} == {
        "transformer.wte.weight",
        "lm_head.weight",
    }


# --- what config.json says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("quality", [{}, {"stories": {"loss_change": 0.01, "top1_agreement": 0.98}}])
def test_a_quantization_survives_its_document(precision, quality):
    record = Quantization(precision, plan(tiny_config(), precision), quality)
    document = record.to_document()
    assert document["group_size"] == 32 and ("quality" in document) == bool(quality)
    assert Quantization.from_document(document, tiny_config()) == record


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (None, "should be an object, not None"),
        ({"precision": "int3"}, "precision must be int8, int4, int4-all, not 'int3'"),
        ({"precision": ["int4"]}, "precision must be"),
        ({"group_size": 64}, "group_size must be 32, not 64"),
        ({"group_size": None}, "group_size must be 32, not None"),
        ({"weights": None}, "weights should say how"),
        ({"weights": {}}, "weights should say how"),
        ({"weights": ["transformer.wte.weight"]}, "weights should say how"),
        (
            {"weights": {"transformer.h.2.mlp.c_fc.weight": "int8"}},
            "names transformer.h.2.mlp.c_fc.weight, which is not",
        ),
        ({"weights": {"transformer.wpe.weight": "int8"}}, "names transformer.wpe.weight, which is not a matrix"),
        ({"weights": {"lm_head.weight": "int8"}}, "names lm_head.weight, which is not"),  # tied: it is the embedding
        ({"weights": {"transformer.wte.weight": "fp4"}}, "stores transformer.wte.weight as 'fp4'"),
        ({"weights": {"transformer.wte.weight": []}}, r"stores transformer.wte.weight as \[\]"),
        ({"quality": [1]}, "quality should hold numbers"),
        ({"quality": {"stories": 5}}, "quality should hold numbers"),
        ({"quality": {"stories": {"loss": "low"}}}, "quality should hold numbers"),
    ],
)
def test_a_document_that_is_not_understood_says_where(changes, complaint):
    config = tiny_config()
    document = Quantization("int4", plan(config, "int4")).to_document()
    with pytest.raises(ValueError, match=complaint):
        Quantization.from_document(document | changes if isinstance(changes, dict) else changes, config)
