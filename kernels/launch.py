"""What every launch needs, whichever kernel it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_already_there = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _already_there
    return torch.cuda.device(tensor.device)


@dataclass(frozen=True)
class Device:
    """What a launch wants to know about a GPU."""

    family: str  # the file of configs/ that it reads
    multiprocessors: int  # programs that run side by side, at least


# What a tensor on the CPU counts as. Under the interpreter a few multiprocessors exercise the loops over programs.
_no_gpu = Device("default", 3)


def device_of(tensor: torch.Tensor) -> Device:
    return _device(tensor.device.index) if tensor.is_cuda else _no_gpu


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """In this block CPU tensors count as being on `device`: for the interpreter and for ahead-of-time compilation."""
    global _no_gpu
    before, _no_gpu = _no_gpu, device
    try:
        yield
    finally:
        _no_gpu = before


@cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        # AMD's data centre line: 64-wide wavefronts and matrix instructions with 64 KiB of local memory at least.
        family = "cdna" if properties.gcnArchName.startswith(("gfx90a", "gfx94", "gfx95")) else "default"
    else:
        # Consumer GPUs of the same generations (8.6, 8.9, 12.0) have less shared memory and take the default.
        capability = (properties.major, properties.minor)
        family = {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell"}.get(
            capability, "default"
        )
    return Device(family, properties.multi_processor_count)


def gpu_family(tensor: torch.Tensor) -> str:
    return device_of(tensor).family


def multiprocessors(tensor: torch.Tensor) -> int:
    return device_of(tensor).multiprocessors


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the tiles of all kernels share: `registers` that a thread may have.

    Left to itself NVIDIA's assembler takes fewer than there are, so that more programs run at once, and in some kernels
    spills 8 to 24 bytes for it. Told a number it uses up to so many first.
    """

    registers: int | None = None


def scheduled(tile: Any) -> dict[str, int]:
    """What Triton's compiler is told of a tile."""
    options = {"num_warps": tile.warps}
    if hasattr(tile, "stages"):
        options["num_stages"] = tile.stages
    if tile.registers is not None and torch.version.hip is None:  # AMD's compiler takes no such number
        options["maxnreg"] = tile.registers
    return options


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
