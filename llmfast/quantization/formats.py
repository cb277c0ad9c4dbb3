"""Weights in 8 and 4 bits: a weight in one of the formats, from floats and back; `encodings` says what bytes mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.quantization.encodings import ENCODINGS, GROUP_SIZE, Encoding, Parts, encoding_of
from llmfast.threads import one_thread

__all__ = ["FORMATS", "GROUP_SIZE", "QuantizedWeight", "dequantize", "encoding", "layout", "quantize", "squared_error"]

FORMATS = tuple(ENCODINGS)  # of a weight
CHUNK = 1 << 16  # elements worked on at once: temporaries that stay in the cache


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of `shape` (N, K) in the format `precision`, one of `FORMATS`: its parts by name, as `layout` has them.

    `ops.quantized_linear(x, **weight.parts)` multiplies with it. `ValueError` says what is wrong where the parts are
    not what the format asks for.
    """

    precision: str
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        expected = layout(self.precision, self.shape)
        if list(self.parts) != list(expected):
            raise ValueError(
                f"{self.precision} has the parts {', '.join(expected)}, in this order, got {', '.join(self.parts)}"
            )
        for part, (shape, dtype) in expected.items():
            tensor = self.parts[part]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = f"{tuple(tensor.shape)} {_name(tensor.dtype)}"
                raise ValueError(f"the {part} of {self.precision} must be {shape} {_name(dtype)}, got {found}")
        if (complaint := encoding(self.precision).complaint(self.parts)) is not None:
            raise ValueError(complaint)

    @property
    def values(self) -> Tensor:
        return self.parts["values"]

    @property
    def scale(self) -> Tensor:
        return self.parts["scale"]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as ordinary numbers: (N, K) `dtype`, contiguous, computed in float32."""
        result = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        for rows in _row_chunks(self.shape):
            result[rows] = self.floats(rows).to(dtype)
        return result

    def floats(self, rows: slice) -> Tensor:
        """Some rows of the weight as float32."""
        return dequantize({name: part[rows] for name, part in self.parts.items()}, self.shape[1])


def encoding(precision: str) -> Encoding:
    """The encoding of a format; `ValueError` for a name that is none."""
    if precision not in ENCODINGS:
        raise ValueError(f"a weight's precision must be {' or '.join(FORMATS)}, got {precision!r}")
    return ENCODINGS[precision]


def layout(precision: str, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of the parts of a weight (N, K) in a format."""
    return encoding(precision).layout(shape[0], shape[1])


def dequantize(parts: Parts, K: int) -> Tensor:
    """Rows of a weight, whatever stands before their K elements, as float32: (..., K). Names and dtypes of the parts
    tell the format; `ValueError` where they are of none."""
    found = encoding_of(parts)
    if found is None:
        kinds = ", ".join(f"{name} {_name(part.dtype)}" for name, part in parts.items())
        raise ValueError(f"these are not the parts of a quantised weight: {kinds}")
    return found.floats(parts, K)


def quantize(weight: Tensor, precision: str) -> QuantizedWeight:
    """`weight` (N, K), of any floating-point dtype and strides, in one of the `FORMATS`.

    The result is contiguous, on the weight's device. `ValueError` for weights that are not finite numbers in float32,
    or too large for the format.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(
            f"a weight must be floating point (N, K) with K at least 1, got {tuple(weight.shape)} {weight.dtype}"
        )
    form = encoding(precision)
    parts = {
        part: torch.empty(shape, dtype=dtype, device=weight.device)
        for part, (shape, dtype) in layout(precision, weight.shape).items()
    }
    with one_thread():
        for rows in _row_chunks(weight.shape):
            chunk = weight[rows].detach().float().contiguous()
            if not chunk.isfinite().all():
                raise ValueError("the weight holds infinities or NaN")
            if chunk.numel() and (largest := float(chunk.abs().max())) > form.largest:
                raise ValueError(f"the weight holds ±{largest:.4g}, where {precision} goes up to {form.largest:.4g}")
            for part, rounded in zip(parts.values(), form.rounded(chunk), strict=True):
                part[rows] = rounded
    return QuantizedWeight(precision, (weight.shape[0], weight.shape[1]), parts)


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """The sums of squares of what `weight` (N, K) lost by becoming `quantized`, and of the weight itself."""
    lost, whole = 0.0, 0.0
    for rows in _row_chunks(quantized.shape):
        chunk = weight[rows].double()
        lost += float((quantized.floats(rows) - chunk).square().sum())
        whole += float(chunk.square().sum())
    return lost, whole


def _row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
