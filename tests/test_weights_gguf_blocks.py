"""ggml's blocks: whatever bits they hold, they become the numbers that the package `gguf` makes of them."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmfast.weights import gguf_blocks
from llmfast.weights.gguf import GGUFTensor

Type = gguf.GGMLQuantizationType
HALVES = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1, "Q4_K": 2}  # float16 numbers at a block's beginning
READ = [kind.name for kind in gguf.quants._type_traits if kind.name not in ("F32", "F16", "BF16")]


def blocks(kind: str, rows: int, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes, their scales finite."""
    generator = np.random.default_rng(seed)
    _, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    data = generator.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for half in range(HALVES.get(kind, 0)):
        scales = generator.normal(size=(rows, count, 1)).astype(np.float16)
        data[..., 2 * half : 2 * half + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", gguf_blocks.FORMATS)
@given(rows=st.integers(1, 3), count=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_a_weight_holds_just_the_numbers_of_its_blocks(kind, rows, count, seed):
    data = blocks(kind, rows, count, seed)
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    weight = gguf_blocks.quantized(kind, torch.from_numpy(data), block * count)
    assert weight.precision == gguf_blocks.FORMATS[kind] and weight.shape == (rows, block * count)
    assert np.array_equal(weight.dequantize().numpy(), gguf.quants.dequantize(data, Type[kind]))
    assert weight.nbytes <= 1.12 * data.nbytes, f"{weight.nbytes} bytes of {data.nbytes}"


@pytest.mark.parametrize("kind", gguf_blocks.STORED)
@given(rows=st.integers(1, 3), count=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_a_weight_becomes_the_blocks_that_it_was(kind, rows, count, seed):
    data = torch.from_numpy(blocks(kind, rows, count, seed))
    weight = gguf_blocks.quantized(kind, data, 32 * count)
    assert torch.equal(gguf_blocks.as_stored(weight, kind), data)


def test_what_a_type_does_not_hold_is_none_of_its_blocks():
    weight = gguf_blocks.quantized("Q4_1", torch.from_numpy(blocks("Q4_1", 2, 2)), 64)
    for kind in ("Q4_0", "Q8_0", "F32", "BF16", "Q4_K"):
        assert gguf_blocks.as_stored(weight, kind) is None
    k = gguf_blocks.quantized("Q4_K", torch.from_numpy(blocks("Q4_K", 2, 1)), 256)
    assert gguf_blocks.as_stored(k, "Q4_K") is None  # no type that is written


@pytest.mark.parametrize("bits, complaint", [(0x7C00, "infinities"), (0x7000, "infinities")])
def test_a_scale_beyond_float16_is_an_error(bits, complaint):
    """Infinity, and 8192, whose -8 times as minimum of a Q4_0 block is beyond it."""
    data = blocks("Q4_0", 2, 2)
    data[1, 18:20] = np.array([bits], dtype="<u2").view(np.uint8)
    with pytest.raises(ValueError, match=complaint):
        gguf_blocks.quantized("Q4_0", torch.from_numpy(data), 64)


@pytest.mark.parametrize("kind", READ)
def test_every_type_that_the_package_reads_becomes_floats(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    data = blocks(kind, 3, 2)
    path = tmp_path / "blocks"
    path.write_bytes(bytes(7) + data.tobytes())
    tensor = GGUFTensor(path, "weight", (3, 2 * block), kind, block, size, 7)
    assert gguf_blocks.is_readable(kind)
    expected = torch.from_numpy(gguf.quants.dequantize(data, Type[kind]))
    torch.testing.assert_close(gguf_blocks.floats(tensor), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gguf_blocks.floats(tensor, slice(1, 2)), expected[1:2], rtol=0, atol=0, equal_nan=True)


def test_types_that_are_not_read_say_so():
    assert not gguf_blocks.is_readable("Q8_K") and not gguf_blocks.is_readable("I32")
