"""What every launch needs, whichever kernel it is."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

# Offsets inside one tile are 32-bit, to save registers; offsets of the tile itself are 64-bit. A tile has at most 256
# rows.
_LARGEST_STRIDE = 2**31 // 256 - 1


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many programs run side by side, at least; under the interpreter a few, so that the loops over programs are
    exercised.
    """
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 3


@cache
def _capability(device_index: int) -> int:
    return 10 * torch.cuda.get_device_capability(device_index)[0] if torch.version.hip is None else 0


def is_hopper(tensor: torch.Tensor) -> bool:
    """Whether the tensor's GPU is of the family with warp-group matrix instructions and 227 KiB of shared memory a
    program (sm_90).
    """
    return tensor.is_cuda and _capability(tensor.device.index) == 90


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself when a kernel can walk it by strides (the ordinary case), else a contiguous copy."""
    walkable = tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
    return tensor if walkable and tensor.stride(-2) <= _LARGEST_STRIDE else tensor.contiguous()


def stride_unit(*strides: int) -> int:
    """16 where it divides every stride, else 1.

    Kernels get strides in this unit and multiply it back as a compile-time constant, which tells the compiler that
    rows are aligned (and loads can be vectorised) without the strides themselves, which vary with the sequence
    length, specialising anything.
    """
    return 16 if all(stride % 16 == 0 for stride in strides) else 1
