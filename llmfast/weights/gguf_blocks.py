"""ggml's blocks of quantised weights, and what they become here.

    Q4_0, Q4_1, Q8_0, Q4_K   the parts of `quantization.encodings`, which hold the same numbers without another rounding
    other types              floats, which the package `gguf` makes of them

In a row of ggml's, the parts of a block lie side by side; here every part is a tensor. Byte j of 16 holds elements j
and j + 16 there, and 2j and 2j + 1 here. (llama.cpp: ggml/src/ggml-common.h, ggml-quants.c)
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmfast.quantization.formats import QuantizedWeight
from llmfast.weights.gguf import FLOATS, GGUFTensor

# The format that holds what a type of ggml's does.
FORMATS = {"Q4_0": "q4_1", "Q4_1": "q4_1", "Q8_0": "q8_0", "Q4_K": "q4_k"}


def quantized(type: str, blocks: Tensor, K: int) -> QuantizedWeight:
    """Rows of blocks (N, bytes) uint8, of a type in `FORMATS`, as the weight (N, K) that they are.

    `ValueError` where a scale is not finite, or so large that a format can't hold what follows from it.
    """
    return QuantizedWeight(FORMATS[type], (blocks.shape[0], K), PARTS[type](blocks))


def as_stored(weight: QuantizedWeight, type: str) -> Tensor | None:
    """The rows of blocks (N, bytes) uint8 of a type that hold the very numbers of a weight, or None where none do."""
    parts = weight.parts
    if FORMATS.get(type) != weight.precision or type not in STORED or weight.shape[1] % 32:
        return None
    if type == "Q4_0" and not torch.equal(parts["minimum"], parts["scale"] * -8):
        return None
    halves = [parts[name].unsqueeze(2).view(torch.uint8) for name in STORED[type]]
    values = parts["values"]
    values = values.view(torch.uint8).unflatten(1, (-1, 32)) if type == "Q8_0" else _runs(values)
    return torch.cat([*halves, values], dim=2).flatten(1)


def floats(tensor: GGUFTensor, rows: slice | None = None) -> Tensor:
    """Some rows of a tensor of any type that can be read, as floats: as stored, or float32 of blocks."""
    data = tensor.read(rows)
    if tensor.type in FLOATS:
        return data
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[tensor.type]
    try:
        return torch.from_numpy(quants.dequantize(data.numpy(), kind)).view(*data.shape[:-1], tensor.shape[-1])
    except NotImplementedError:
        raise ValueError(f"{tensor.name} is of type {tensor.type}, which can't be read") from None


def is_readable(type: str) -> bool:
    """Whether `floats` reads a type."""
    from gguf import GGMLQuantizationType, quants

    return type in FLOATS or GGMLQuantizationType[type] in quants._type_traits


def _q4_0(blocks: Tensor) -> dict[str, Tensor]:
    blocks = blocks.unflatten(1, (-1, 18))
    scale = _halves(blocks[..., :2])
    return {"values": _neighbours(blocks[..., 2:]), "scale": scale, "minimum": scale * -8}


def _q4_1(blocks: Tensor) -> dict[str, Tensor]:
    blocks = blocks.unflatten(1, (-1, 20))
    return {
        "values": _neighbours(blocks[..., 4:]),
        "scale": _halves(blocks[..., :2]),
        "minimum": _halves(blocks[..., 2:4]),
    }


def _q8_0(blocks: Tensor) -> dict[str, Tensor]:
    blocks = blocks.unflatten(1, (-1, 34))
    return {"values": blocks[..., 2:].reshape(len(blocks), -1).view(torch.int8), "scale": _halves(blocks[..., :2])}


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    """256 elements: two float16, 12 bytes with eight pairs of 6-bit codes, and four times 32 bytes of nibbles."""
    blocks = blocks.unflatten(1, (-1, 144))
    first, second, third = blocks[..., 4:16].unflatten(2, (3, 4)).unbind(2)
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=2)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=2)
    return {
        "values": _neighbours(blocks[..., 16:], run=32),
        "scale": _halves(blocks[..., :2]),
        "minimum": -_halves(blocks[..., 2:4]),
        "scale_code": scales.flatten(1),
        "minimum_code": minima.flatten(1),
    }


STORED = {"Q4_0": ("scale",), "Q4_1": ("scale", "minimum"), "Q8_0": ("scale",)}  # before the integers of a block
PARTS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k}


def _halves(pairs: Tensor) -> Tensor:
    """(N, G, 2) uint8 -> (N, G) float16."""
    return pairs.contiguous().view(torch.float16).squeeze(2)


def _neighbours(nibbles: Tensor, run: int = 16) -> Tensor:
    """(N, G, bytes) whose low halves are one run of elements and whose high halves the next -> (N, 16 G).

    Two bytes at a time: a word holds two neighbours of the first run in its low halves, and two of the next.
    """
    words = nibbles.contiguous().view(torch.int16).unflatten(-1, (-1, run // 2))
    low = (words & 0x000F) | ((words >> 4) & 0x00F0)
    high = ((words >> 4) & 0x000F) | ((words >> 8) & 0x00F0)
    return torch.stack([low, high], dim=-2).to(torch.uint8).flatten(1)


def _runs(values: Tensor) -> Tensor:
    """`_neighbours` of runs of 16 undone: (N, 16 G) uint8 -> (N, G, 16)."""
    bytes_ = values.unflatten(1, (-1, 16))
    elements = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(2)
    return elements[..., :16] | elements[..., 16:] << 4
