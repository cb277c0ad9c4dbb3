"""Searching for configurations on the GPU at hand: `LLMFAST_AUTOTUNE=1`, for extending `configs/`.

Each kernel's first launch under a key then times every candidate on the very tensors of the call, uses the fastest from
there on, and prints the line to put into the family's file. Nothing is searched otherwise: a launch costs one look
into a table.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import triton

from .configurations import configuration, line
from .launch import gpu_family

AUTOTUNE = os.environ.get("LLMFAST_AUTOTUNE", "0") == "1"

Tile = TypeVar("Tile")

_found: dict[tuple, Any] = {}


def choose(
    kernel: str, kind: type[Tile], tensor: torch.Tensor, candidates: Iterable[Tile], launch: Callable[[Tile], object],
    **key: int | str | bool,
) -> Tile:  # fmt: skip
    """The configuration for a launch on `tensor`'s GPU. `launch(tile)` must be repeatable: a search runs it often."""
    family = gpu_family(tensor)
    tile = configuration(kernel, kind, family, **key)
    if not AUTOTUNE:
        return tile
    place = (kernel, tensor.device, *key.items())
    if place not in _found:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return tile  # nothing can be timed inside a CUDA graph
        _found[place] = _search(kernel, family, tile, candidates, launch, key)
    return _found[place]


def describe(kernel: str, kind: type[Tile], tensor: torch.Tensor, **key: int | str | bool) -> str:
    """The configuration that `choose` gives, in words, for `llmfast.explain`."""
    family = gpu_family(tensor)
    tile = _found.get((kernel, tensor.device, *key.items())) or configuration(kernel, kind, family, **key)
    said = ", ".join(f"{name} {value}" for name, value in vars(tile).items() if value is not None)
    return f"{kernel} with {said} ({family})"


def _search(
    kernel: str, family: str, shipped: Tile, candidates: Iterable[Tile], launch: Callable[[Tile], object],
    key: dict[str, Any],
) -> Tile:  # fmt: skip
    times = {}
    for tile in dict.fromkeys([shipped, *candidates]):
        try:
            times[tile] = _milliseconds(lambda tile=tile: launch(tile))  # type: ignore[misc]
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue  # too large for this GPU
    best = min(times, key=times.__getitem__)
    print(
        f"configs/{family}.json, {kernel}: {times[best]:.4f} ms against {times[shipped]:.4f} of the shipped one, "
        f"{len(times)} tried; to commit:\n    {line(best, key)}",
        file=sys.stderr,
    )
    return best


def _milliseconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        return triton.testing.do_bench(run, return_mode="median")
    start = time.perf_counter()  # the interpreter: no measure of anything, but the search can be tried
    run()
    return 1e3 * (time.perf_counter() - start)
