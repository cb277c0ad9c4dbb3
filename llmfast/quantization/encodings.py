"""Weights in 8 and 4 bits: the encodings, one class each.

A weight (N, K), N outputs of K inputs, is stored in a few named parts, tensors whose first dimension is N. K is cut
into G = ⌈K/32⌉ groups, and for q4_k into S = ⌈K/256⌉ blocks of eight groups:

    int8   values int8 (N, K) in [-127, 127]   scale float32 (N,)      w = values · scale
    int4   values uint8 (N, 16 G)              scale bfloat16 (N, G)   w = (nibble - 8) · scale
    q8_0   values int8 (N, K)                  scale float16 (N, G)    w = values · scale
    q4_1   values uint8 (N, 16 G)              scale float16 (N, G)    w = nibble · scale + minimum
           minimum float16 (N, G)
    q4_k   values uint8 (N, 16 G)              scale float16 (N, S)    w = nibble · (scale · scale_code)
           minimum float16 (N, S)                                           + minimum · minimum_code
           scale_code, minimum_code uint8 (N, G)

Byte j of a row of nibbles holds element 2j in its low half and 2j + 1 in its high one; rows are padded to whole groups.

The last three hold what ggml's blocks of the same names hold, without another rounding (llama.cpp, ggml-common.h): the
parts of a block side by side, nibbles in another order, and the minimum of a Q4_K block, which ggml subtracts, with
its sign turned. A Q4_0 block is a q4_1 whose minimum is -8 · scale, which float16 holds exactly up to a scale of 8188.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

GROUP_SIZE = 32
BLOCK_GROUPS = 8  # groups of q4_k that share a scale and a minimum
# Where a group's largest element may land on the 4-bit grid: the sign of the scale turns it to the side that ends at
# -8, and beyond 8 it is cut off, which makes the steps finer for the rest. Measured on the weights of `stories`, these
# 25 come within 0.2 % of the error of 800 candidates of both signs; the other sign by itself adds 0.002 %.
LANDINGS = [6 + step / 8 for step in range(25)]
LARGEST = torch.finfo(torch.bfloat16).max  # what an integer times its scale may reach without overflow
LARGEST_HALF = torch.finfo(torch.float16).max

Parts = Mapping[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Encoding(ABC):
    """What the parts of a weight are, what they mean, and how floats are rounded to them."""

    name: str
    largest: float = torch.finfo(torch.float32).max  # a weight's number may be so large

    @abstractmethod
    def layout(self, N: int, K: int) -> Layout:
        """The shape and dtype of each part of a weight (N, K)."""

    @abstractmethod
    def floats(self, parts: Parts, K: int) -> Tensor:
        """Rows of a weight, whatever stands before their K elements, as float32 (..., K)."""

    @abstractmethod
    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The parts, in the order of the layout, of a contiguous float32 weight (N, K)."""

    def complaint(self, parts: Parts) -> str | None:
        """What is wrong with parts of the right layout, or None."""
        for part, tensor in parts.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"the {part} holds infinities or NaN"
        return None


class Int8(Encoding):
    """The largest number of a row becomes ±127."""

    name = "int8"

    def layout(self, N: int, K: int) -> Layout:
        return {"values": ((N, K), torch.int8), "scale": ((N,), torch.float32)}

    def floats(self, parts: Parts, K: int) -> Tensor:
        return parts["values"].float() * parts["scale"].unsqueeze(-1)

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        scale = (weight.abs().amax(dim=1) / 127).clamp_(max=LARGEST / 127)
        values = (weight / _nonzero(scale)[:, None]).round_().clamp_(-127, 127)
        return values.to(torch.int8), scale

    def complaint(self, parts: Parts) -> str | None:
        values = parts["values"]
        if values.numel() and int(values.min()) < -127:
            return "the values hold -128, where int8 goes from -127 to 127"
        return super().complaint(parts)


class Int4(Encoding):
    """Tries a few dozen scales for each group and keeps the one with the smallest squared error.

    A scale is rounded to bfloat16 before the integers are chosen for it, so that its rounding costs next to nothing.
    """

    name = "int4"

    def layout(self, N: int, K: int) -> Layout:
        G = groups(K)
        return {"values": ((N, G * GROUP_SIZE // 2), torch.uint8), "scale": ((N, G), torch.bfloat16)}

    def floats(self, parts: Parts, K: int) -> Tensor:
        numbers = (_nibbles(parts["values"]) - 8) * parts["scale"].float().unsqueeze(-1)
        return numbers.flatten(-2)[..., :K]

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        padded = _in_groups(weight)
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
        integers = (padded / _nonzero(scale / unit)).round_().clamp_(-8, 7).add_(8)
        return _packed(integers), scale.squeeze(2).bfloat16()


class Q8_0(Encoding):
    """The largest number of a group becomes ±127; halves are rounded away from zero, as ggml does."""

    name = "q8_0"
    largest = LARGEST_HALF * 127

    def layout(self, N: int, K: int) -> Layout:
        return {"values": ((N, K), torch.int8), "scale": ((N, groups(K)), torch.float16)}

    def floats(self, parts: Parts, K: int) -> Tensor:
        return parts["values"].float() * _over_groups(parts["scale"].float(), GROUP_SIZE, K)

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        K = weight.shape[1]
        scale = _in_groups(weight).abs().amax(dim=2) / 127
        values = weight * _over_groups(_inverse(scale), GROUP_SIZE, K)
        values = values.abs().add_(0.5).floor_().clamp_(max=127).copysign_(weight)
        return values.to(torch.int8), scale.half()


class Q4_1(Encoding):
    """The smallest number of a group becomes 0, the largest 15; the scale is rounded last, as ggml does."""

    name = "q4_1"
    largest = LARGEST_HALF

    def layout(self, N: int, K: int) -> Layout:
        G = groups(K)
        half = ((N, G), torch.float16)
        return {"values": ((N, G * GROUP_SIZE // 2), torch.uint8), "scale": half, "minimum": half}

    def floats(self, parts: Parts, K: int) -> Tensor:
        scale, minimum = (parts[part].float().unsqueeze(-1) for part in ("scale", "minimum"))
        return (_nibbles(parts["values"]) * scale + minimum).flatten(-2)[..., :K]

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        padded, minimum, scale = _range(weight)
        integers = ((padded - minimum) * _inverse(scale)).add_(0.5).floor_().clamp_(0, 15)
        return _packed(integers, weight.shape[1]), scale.squeeze(2).half(), minimum.squeeze(2).half()


class Q4_K(Encoding):
    """Scale and minimum of a group are themselves rounded to 6 bits; the integers are then chosen for what they are.

    ggml searches for better scales than these: what it has rounded is read without loss, not made here.
    """

    name = "q4_k"
    largest = LARGEST_HALF * 63

    def layout(self, N: int, K: int) -> Layout:
        G = groups(K)
        half, codes = ((N, math.ceil(G / BLOCK_GROUPS)), torch.float16), ((N, G), torch.uint8)
        nibbles = ((N, G * GROUP_SIZE // 2), torch.uint8)
        return {"values": nibbles, "scale": half, "minimum": half, "scale_code": codes, "minimum_code": codes}

    def floats(self, parts: Parts, K: int) -> Tensor:
        scale, minimum = (self._of_groups(parts, part).unsqueeze(-1) for part in ("scale", "minimum"))
        return (_nibbles(parts["values"]) * scale + minimum).flatten(-2)[..., :K]

    @staticmethod
    def _of_groups(parts: Parts, part: str) -> Tensor:
        codes = parts[f"{part}_code"]
        return _over_groups(parts[part].float(), BLOCK_GROUPS, codes.shape[-1]) * codes.float()  # exact in float32

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        padded, minimum, scale = _range(weight, torch.zeros(()))
        parts: dict[str, Tensor] = {}
        for part, wanted in (("scale", scale.squeeze(2)), ("minimum", minimum.squeeze(2))):
            blocks = torch.nn.functional.pad(wanted, (0, -wanted.shape[1] % BLOCK_GROUPS)).unflatten(1, (-1, 8))
            unit = (blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True)).squeeze(2) / 63).half()
            codes = wanted * _over_groups(_inverse(unit.float()), BLOCK_GROUPS, wanted.shape[1])
            parts |= {part: unit, f"{part}_code": codes.round_().clamp_(0, 63).to(torch.uint8)}
        scale, minimum = (self._of_groups(parts, part).unsqueeze(-1) for part in ("scale", "minimum"))
        integers = ((padded - minimum) * _inverse(scale)).round_().clamp_(0, 15)
        return _packed(integers, weight.shape[1]), *(parts[part] for part in self.layout(1, 1) if part != "values")


def groups(K: int) -> int:
    """How many groups a row of K has."""
    return -(-K // GROUP_SIZE)


def _in_groups(weight: Tensor) -> Tensor:
    """(N, G, 32), padded with zeros."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE))


def _range(weight: Tensor, most: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Groups (N, G, 32), and (N, G, 1) of each the minimum, at most `most`, and what is a fifteenth of its range."""
    padded = _in_groups(weight)
    beyond = torch.arange(padded[0].numel(), device=weight.device).view(padded.shape[1:]) >= weight.shape[1]
    lowest = padded.masked_fill(beyond, torch.inf).amin(dim=2, keepdim=True)
    highest = padded.masked_fill(beyond, -torch.inf).amax(dim=2, keepdim=True)
    if most is not None:
        lowest = torch.minimum(lowest, most)
    return padded, lowest, (highest - lowest) / 15


def _nibbles(values: Tensor) -> Tensor:
    """The elements of bytes (..., 16 G) as float32 (..., G, 32), from 0 to 15."""
    return torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).unflatten(-1, (-1, GROUP_SIZE)).float()


def _packed(integers: Tensor, K: int | None = None) -> Tensor:
    """The bytes (N, 16 G) of numbers (N, G, 32) from 0 to 15; with K what lies beyond it becomes 0."""
    flat = integers.to(torch.uint8).flatten(1)
    if K is not None:
        flat[:, K:] = 0
    return flat[:, 0::2] | (flat[:, 1::2] << 4)


def _over_groups(of_groups: Tensor, size: int, count: int) -> Tensor:
    """(..., G) -> (..., count): each one `size` times, as far as there are."""
    return of_groups.repeat_interleave(size, dim=-1)[..., :count]


def _nonzero(divisor: Tensor) -> Tensor:
    return divisor.masked_fill(divisor == 0, 1.0)


def _inverse(divisor: Tensor) -> Tensor:
    """1 / divisor, and 0 where it is 0."""
    return torch.where(divisor == 0, 0.0, 1.0 / divisor)


ENCODINGS: dict[str, Encoding] = {kind.name: kind() for kind in (Int8, Int4, Q8_0, Q4_1, Q4_K)}
_BY_DTYPES = {tuple((p, dtype) for p, (_, dtype) in e.layout(1, 1).items()): e for e in ENCODINGS.values()}


def encoding_of(parts: Parts) -> Encoding | None:
    """The encoding that has parts of these names, in its order, and dtypes; None where none does."""
    return _BY_DTYPES.get(tuple((part, tensor.dtype) for part, tensor in parts.items()))
