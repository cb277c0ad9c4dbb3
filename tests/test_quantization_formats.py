"""Weights in 8 and 4 bits: what the bytes mean, how much they lose at most, and what is refused."""

import dataclasses

import gguf.quants as ggml
import numpy as np
import pytest
import torch
from conftest import tiny_config
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llmfast
from llmfast.quantization.formats import FORMATS, QuantizedWeight, dequantize, layout, quantize, squared_error
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
    values = torch.tensor([[-127, 0, 127], [1, 2, -3]], dtype=torch.int8)
    weight = QuantizedWeight("int8", (2, 3), {"values": values, "scale": torch.tensor([0.5, 2.0])})
    assert weight.dequantize().tolist() == [[-63.5, 0, 63.5], [2, 4, -6]]
    assert weight.nbytes == 6 + 8


def test_the_bytes_of_int4():
    """The first element is in the low nibble of the first byte; a nibble is eight more than what it means."""
    values = torch.full((1, 32), 0x88, dtype=torch.uint8)
    values[0, :3] = torch.tensor([0x1F, 0x80, 0x97])
    values[0, 16] = 0xA9  # the second group
    scale = torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16)
    weight = QuantizedWeight("int4", (1, 35), {"values": values, "scale": scale})
    expected = torch.zeros(1, 35)
    expected[0, :6] = torch.tensor([3.5, -3.5, -4.0, 0.0, -0.5, 0.5])
    expected[0, 32:34] = torch.tensor([-2.0, -4.0])
    assert torch.equal(weight.dequantize(), expected)
    assert weight.nbytes == 32 + 4


def test_the_bytes_of_q8_0():
    """-128 is what no rounding gives and a file may hold."""
    values = torch.full((1, 35), 2, dtype=torch.int8)
    values[0, :2] = torch.tensor([-128, 127])
    weight = QuantizedWeight("q8_0", (1, 35), {"values": values, "scale": torch.tensor([[0.5, -1.0]]).half()})
    assert weight.dequantize().tolist() == [[-64.0, 63.5, *[1.0] * 30, -2.0, -2.0, -2.0]]
    assert weight.nbytes == 35 + 4


def test_the_bytes_of_q4_1():
    values = torch.zeros((1, 32), dtype=torch.uint8)
    values[0, 0], values[0, 17] = 0xF1, 0x32
    halves = {"scale": torch.tensor([[0.5, -2.0]]).half(), "minimum": torch.tensor([[-1.0, 4.0]]).half()}
    weight = QuantizedWeight("q4_1", (1, 36), {"values": values, **halves})
    assert weight.dequantize().tolist() == [[-0.5, 6.5, *[-1.0] * 30, 4.0, 4.0, 0.0, -2.0]]
    assert weight.nbytes == 32 + 8


def test_the_bytes_of_q4_k():
    """Nine groups: the last is by itself in a second block."""
    values = torch.zeros((1, 9 * 16), dtype=torch.uint8)
    values[0, 0], values[0, 16], values[0, 8 * 16] = 0x21, 0x0F, 0x30
    codes = torch.zeros((2, 1, 9), dtype=torch.uint8)
    codes[:, 0, 0], codes[:, 0, 1], codes[:, 0, 8] = torch.tensor([3, 1]), torch.tensor([63, 0]), torch.tensor([1, 2])
    parts = {
        "values": values,
        "scale": torch.tensor([[0.5, 2.0]]).half(),
        "minimum": torch.tensor([[-0.25, 1.0]]).half(),
        "scale_code": codes[0],
        "minimum_code": codes[1],
    }
    expected = torch.zeros(1, 260)
    expected[0, :32], expected[0, 256:] = -0.25, 2.0
    expected[0, :2], expected[0, 32], expected[0, 257] = torch.tensor([1.25, 2.75]), 15 * 31.5, 2 + 3 * 2.0
    weight = QuantizedWeight("q4_k", (1, 260), parts)
    assert torch.equal(weight.dequantize(), expected)
    assert weight.nbytes == 9 * 16 + 2 * 9 + 8


# Blocks as ggml lays them out (llama.cpp, ggml-common.h) to the parts of our formats. The elements of a block of 32
# nibbles are the low halves of its 16 bytes, then the high ones; a Q4_K block has 64 in every 32 bytes.


def halves(blocks: np.ndarray, at: int) -> torch.Tensor:
    return torch.from_numpy(blocks[..., at : at + 2].copy().view(np.float16)[..., 0])


def in_pairs(blocks: np.ndarray) -> torch.Tensor:
    """(..., 2n): the low halves of n bytes, then the high ones, to bytes of neighbours."""
    nibbles = np.concatenate([blocks & 15, blocks >> 4], axis=-1)
    return torch.from_numpy(nibbles[..., 0::2] | nibbles[..., 1::2] << 4)


def from_ggml(kind: str, data: np.ndarray, shape: tuple[int, int]) -> QuantizedWeight:
    N, K = shape
    blocks = data.reshape(N, -1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])
    if kind == "Q8_0":
        values = torch.from_numpy(blocks[..., 2:].copy().view(np.int8)).reshape(N, K)
        return QuantizedWeight("q8_0", shape, {"values": values, "scale": halves(blocks, 0)})
    if kind in ("Q4_0", "Q4_1"):
        scale = halves(blocks, 0)
        minimum = scale * -8 if kind == "Q4_0" else halves(blocks, 2)
        values = in_pairs(blocks[..., 2 if kind == "Q4_0" else 4 :]).reshape(N, -1)
        return QuantizedWeight("q4_1", shape, {"values": values, "scale": scale, "minimum": minimum})
    codes = blocks[..., 4:16]
    high = codes[..., 8:] & 15 | codes[..., :4] >> 6 << 4, codes[..., 8:] >> 4 | codes[..., 4:8] >> 6 << 4
    parts = {
        "values": in_pairs(blocks[..., 16:].reshape(N, -1, 32)).reshape(N, -1),
        "scale": halves(blocks, 0),
        "minimum": -halves(blocks, 2),
    }
    for part, low, more in zip(("scale_code", "minimum_code"), (codes[..., :4], codes[..., 4:8]), high, strict=True):
        parts[part] = torch.from_numpy(np.concatenate([low & 63, more], axis=-1)).reshape(N, -1)
    return QuantizedWeight("q4_k", shape, parts)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_ggmls_blocks_mean_the_same_to_the_bit(kind):
    """Random bytes, so every integer and every code comes up, and random halves."""
    N, K = 7, 768
    size, per_block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (N, K // size, per_block), dtype=np.uint8)
    for at in (0, 2) if kind in ("Q4_1", "Q4_K") else (0,):
        blocks[..., at : at + 2] = random.normal(size=(N, K // size, 1)).astype(np.float16).view(np.uint8)
    expected = ggml.dequantize(blocks.reshape(N, -1), GGMLQuantizationType[kind])
    assert np.array_equal(from_ggml(kind, blocks, (N, K)).dequantize().numpy(), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the second has halves to round
def test_floats_are_rounded_as_ggml_does(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(40, 320, generator=generator) + torch.randn(40, 1, generator=generator)).to(dtype)
    weight[3, :64] = 0
    data = ggml.quantize(weight.float().numpy(), GGMLQuantizationType[kind])
    expected, actual = from_ggml(kind, data, (40, 320)), quantize(weight, kind.lower())
    for part, tensor in actual.parts.items():
        assert torch.equal(tensor, expected.parts[part]), part


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
        tensor = weight.parts[part]
        assert (tuple(tensor.shape), tensor.dtype) == (size, dtype) and tensor.is_contiguous()
    assert weight.shape == shape
    assert weight.nbytes == sum(part.nbytes for part in weight.parts.values())


@given(st.integers(1, 70))
def test_int4_pads_rows_with_zeros(K):
    padding = quantize(torch.randn(2, K), "int4").values[:, (K + 1) // 2 :]
    assert (padding == 0x88).all()
    if K % 2:
        assert (quantize(torch.randn(2, K), "int4").values[:, K // 2] >> 4 == 8).all()


@given(st.integers(1, 300), st.sampled_from(["q4_1", "q4_k"]))
def test_what_pads_a_row_counts_for_nothing(K, precision):
    """Neither in the bytes nor in a group's smallest and largest number, here all on one side of zero."""
    weight = quantize(10 + torch.rand(2, K), precision)
    assert not weight.values[:, (K + 1) // 2 :].any()
    assert K % 2 == 0 or not (weight.values[:, K // 2] >> 4).any()
    if precision == "q4_1":
        assert (weight.parts["minimum"] >= 10).all() and (weight.scale <= 1 / 15).all()


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
@given(weights(), st.sampled_from(["q8_0", "q4_1", "q4_k"]))
def test_ggmls_formats_are_off_by_at_most_half_a_step(weight, precision):
    """And by what rounding the scale and the minimum costs: 2⁻¹¹ of a half, half a 63rd of the block's largest code."""
    error = in_groups((quantize(weight, precision).dequantize(torch.float64) - weight.double()).abs())
    groups = in_groups(weight.double())
    largest = groups.abs().amax(2)
    if precision == "q8_0":
        most = largest / 127 * 0.5 + largest * 2**-11
    elif precision == "q4_1":
        most = (groups.amax(2) - groups.amin(2)) / 15 * 0.5 + 4 * largest * 2**-11
    else:
        of_block = torch.nn.functional.pad(largest, (0, -largest.shape[1] % 8)).unflatten(1, (-1, 8)).amax(2)
        of_block = of_block.repeat_interleave(8, dim=1)[:, : largest.shape[1]]
        most = 2 * largest / 15 * 0.5 + of_block * (0.5 / 63) * 2 + of_block * (2 * 0.5 / 63 + 4 * 2**-11)
    assert (error <= most[:, :, None] * 1.001 + 1e-6).all()


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


HOW_MUCH = (("int8", 0.0080), ("int4", 0.0815), ("q8_0", 0.0055), ("q4_1", 0.080), ("q4_k", 0.080))


def test_how_much_normal_weights_lose():
    weight = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    for precision, most in HOW_MUCH:
        lost, whole = squared_error(weight, quantize(weight, precision))
        assert 0.95 * most < (lost / whole) ** 0.5 < most
        difference = quantize(weight, precision).dequantize() - weight
        assert lost == pytest.approx(float(difference.double().square().sum()), rel=1e-5)
        assert whole == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


@settings(max_examples=50)
@given(weights(), st.sampled_from(["int8", "int4", "q8_0"]))
def test_what_has_been_quantised_loses_nothing_more(weight, precision):
    once = quantize(weight, precision).dequantize()
    torch.testing.assert_close(quantize(once, precision).dequantize(), once, rtol=1e-6, atol=0)


@settings(max_examples=100)
@given(st.floats(-44, 38.53), SHAPES, st.sampled_from(["int8", "int4"]))
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


@given(st.floats(-12, 4.8), SHAPES, st.sampled_from(["q8_0", "q4_1", "q4_k"]))
@example(-7.1, (3, 300), "q4_k")
def test_the_range_of_a_half_bounds_ggmls_formats(exponent, shape, precision):
    """A group whose scale is below the smallest half becomes nothing, or its minimum, as in ggml."""
    largest = 10.0**exponent
    weight = (torch.rand(shape, dtype=torch.float64) * 2 - 1).mul(largest).float()
    restored = quantize(weight, precision).dequantize()
    assert restored.isfinite().all()
    if largest > (0.1 if precision == "q4_k" else 1e-2):  # the scale is a normal half
        tolerance = largest * (0.005 if precision == "q8_0" else 0.1)
        assert ((restored.double() - weight.double()).abs() <= tolerance).all()


@pytest.mark.parametrize("precision, largest", [("q8_0", 8.32e6), ("q4_1", 65505.0), ("q4_k", 4.16e6)])
def test_what_no_half_can_scale_is_refused(precision, largest):
    with pytest.raises(ValueError, match=rf"holds ±.*, where {precision} goes up to"):
        quantize(torch.full((2, 40), -largest), precision)
    assert quantize(torch.full((2, 40), -largest * 0.99), precision).dequantize().isfinite().all()


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
        for part, tensor in whole.parts.items():
            assert torch.equal(tensor[::50], torch.cat([row.parts[part] for row in rows]))
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
    with pytest.raises(ValueError, match="must be int8 or int4 or q8_0 or q4_1 or q4_k, got 'int3'"):
        quantize(torch.ones(2, 2), "int3")
    with pytest.raises(ValueError, match="must be int8, .*, int4-all, .*got 'int2'"):
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
        ("int8", {"precision": "int5"}, "must be int8 or int4 or .*, got 'int5'"),
        ("int4", {"precision": "q4_1"}, "q4_1 has the parts values, scale, minimum, in this order, got values, scale"),
        ("q4_1", {"precision": "int4"}, "int4 has the parts values, scale, in this order, got values, scale, minimum"),
        ("q8_0", {"scale": torch.zeros(3, 2)}, r"scale of q8_0 must be \(3, 2\) float16, got \(3, 2\) float32"),
        ("q4_1", {"minimum": torch.full((3, 2), torch.nan).half()}, "minimum holds infinities or NaN"),
        ("q4_k", {"scale_code": torch.zeros(3, 2)}, r"scale_code of q4_k must be \(3, 2\) uint8"),
        ("int4", {"shape": (3, 70)}, r"values of int4 must be \(3, 48\) uint8, got \(3, 32\) uint8"),
        ("int4", {"scale": torch.zeros(3, 2)}, r"scale of int4 must be \(3, 2\) bfloat16, got \(3, 2\) float32"),
        ("int4", {"scale": torch.full((3, 2), torch.inf).bfloat16()}, "scale holds infinities or NaN"),
    ],
)
def test_a_weight_that_is_not_what_its_format_says_is_refused(precision, changes, complaint):
    weight = quantize(torch.randn(3, 40), precision)
    fields = {name: changes[name] for name in ("precision", "shape") if name in changes}
    parts = weight.parts | {name: change for name, change in changes.items() if name not in fields}
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(weight, **fields, parts=parts)


def test_parts_that_are_of_no_format_are_refused():
    with pytest.raises(ValueError, match="not the parts of a quantised weight: values uint8, scale float32"):
        dequantize({"values": torch.zeros(3, 16, dtype=torch.uint8), "scale": torch.zeros(3)}, 32)


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
        ({"precision": "int3"}, "precision must be int8, .*, int4-all, .*not 'int3'"),
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
