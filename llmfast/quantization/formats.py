"""Weights in 8 and 4 bits: the formats.

A weight (N, K), N outputs of K inputs, becomes integers `values` and the `scale` they are multiplied with:

    int8   values int8 (N, K) in [-127, 127]      scale float32 (N,)             w ≈ values * scale[:, None]
    int4   values uint8 (N, 16 * G), G = ⌈K/32⌉   scale bfloat16 (N, G)          w ≈ (nibble - 8) * scale

int8 has one scale a row; int4 one for each group of 32 along K. Byte j of an int4 row holds element 2j in its low
nibble and 2j + 1 in its high one; rows are padded to whole groups with nibble 8, which is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("int8", "int4")  # of a weight
GROUP_SIZE = 32
# Where a group's largest element may land on the 4-bit grid: the sign of the scale turns it to the side that ends at
# -8, and beyond 8 it is cut off, which makes the steps finer for the rest. Measured on the weights of `stories`, these
# 25 come within 0.2 % of the error of 800 candidates of both signs; the other sign by itself adds 0.002 %.
LANDINGS = [6 + step / 8 for step in range(25)]
LARGEST = torch.finfo(torch.bfloat16).max  # what an integer times its scale may reach without overflow
CHUNK = 1 << 16  # elements worked on at once: temporaries that stay in the cache


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of `shape` (N, K) in the format `precision`, "int8" or "int4"; see the module for `values` and `scale`.

    `ValueError` says what is wrong where the two tensors are not what the format asks for.
    """

    precision: str
    values: Tensor
    scale: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for part, (shape, dtype) in layout(self.precision, self.shape).items():
            tensor: Tensor = getattr(self, part)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = f"{tuple(tensor.shape)} {_name(tensor.dtype)}"
                raise ValueError(f"the {part} of {self.precision} must be {shape} {_name(dtype)}, got {found}")
        if not self.scale.isfinite().all():
            raise ValueError("the scale holds infinities or NaN")
        if self.precision == "int8" and self.values.numel() and int(self.values.min()) < -127:
            raise ValueError("the values hold -128, where int8 goes from -127 to 127")

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as ordinary numbers: (N, K) `dtype`, contiguous, computed in float32."""
        result = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        for rows in _row_chunks(self.shape):
            result[rows] = self.floats(rows).to(dtype)
        return result

    def floats(self, rows: slice) -> Tensor:
        """Some rows of the weight as float32."""
        return dequantize(self.values[rows], self.scale[rows], self.shape[1])


def dequantize(values: Tensor, scale: Tensor, K: int) -> Tensor:
    """Rows of a weight, whatever stands before their K elements, as float32: (..., K). int8 values are int8, int4
    uint8."""
    if values.dtype == torch.int8:
        return values.float() * scale.unsqueeze(-1)
    nibbles = torch.stack([values & 15, values >> 4], dim=-1).view(*scale.shape, GROUP_SIZE)
    return ((nibbles.float() - 8) * scale.float().unsqueeze(-1)).flatten(-2)[..., :K]


def layout(precision: str, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of the `values` and the `scale` of a weight (N, K) in a format."""
    if precision not in FORMATS:
        raise ValueError(f"a weight's precision must be {' or '.join(FORMATS)}, got {precision!r}")
    N, K = shape
    if precision == "int8":
        return {"values": ((N, K), torch.int8), "scale": ((N,), torch.float32)}
    groups = math.ceil(K / GROUP_SIZE)
    return {"values": ((N, groups * GROUP_SIZE // 2), torch.uint8), "scale": ((N, groups), torch.bfloat16)}


def quantize(weight: Tensor, precision: str) -> QuantizedWeight:
    """`weight` (N, K), of any floating-point dtype and strides, in the format "int8" or "int4".

    The result is contiguous, on the weight's device. `ValueError` for weights that are not finite numbers in float32.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(
            f"a weight must be floating point (N, K) with K at least 1, got {tuple(weight.shape)} {weight.dtype}"
        )
    parts = {
        part: torch.empty(shape, dtype=dtype, device=weight.device)
        for part, (shape, dtype) in layout(precision, weight.shape).items()
    }
    rounded = _rounded_int8 if precision == "int8" else _rounded_int4
    for rows in _row_chunks(weight.shape):
        chunk = weight[rows].detach().float().contiguous()
        if not chunk.isfinite().all():
            raise ValueError("the weight holds infinities or NaN")
        parts["values"][rows], parts["scale"][rows] = rounded(chunk)
    return QuantizedWeight(precision, parts["values"], parts["scale"], (weight.shape[0], weight.shape[1]))


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """The sums of squares of what `weight` (N, K) lost by becoming `quantized`, and of the weight itself."""
    lost, whole = 0.0, 0.0
    for rows in _row_chunks(quantized.shape):
        chunk = weight[rows].double()
        lost += float((quantized.floats(rows) - chunk).square().sum())
        whole += float(chunk.square().sum())
    return lost, whole


def _rounded_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(dim=1) / 127).clamp_(max=LARGEST / 127)
    values = (weight / _nonzero(scale)[:, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), scale


def _rounded_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tries a few dozen scales for each group and keeps the one with the smallest squared error.

    A scale is rounded to bfloat16 before the integers are chosen for it, so that its rounding costs next to nothing.
    """
    N, K = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -K % GROUP_SIZE)).view(N, -1, GROUP_SIZE)
    largest = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True))  # (N, G, 1), with its sign
    unit = _nonzero(largest)
    padded = padded / unit  # all in [-1, 1]: squares neither overflow nor vanish, however large the weights are
    scale = torch.zeros_like(largest)
    error = torch.full_like(largest, torch.inf)
    for landing in LANDINGS:
        candidate = (largest / -landing).clamp_(-LARGEST / 8, LARGEST / 8).bfloat16().float()
        step = candidate / unit
        integers = (padded / _nonzero(step)).round_().clamp_(-8, 7)
        candidate_error = integers.mul_(step).sub_(padded).square_().sum(dim=2, keepdim=True)
        better = candidate_error < error
        scale = torch.where(better, candidate, scale)
        error = torch.where(better, candidate_error, error)
    nibbles = (padded / _nonzero(scale / unit)).round_().clamp_(-8, 7).add_(8).to(torch.uint8).view(N, -1)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale.squeeze(2).bfloat16()


def _nonzero(divisor: Tensor) -> Tensor:
    return divisor.masked_fill(divisor == 0, 1.0)


def _row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
