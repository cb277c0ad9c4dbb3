"""What this machine can do at most: the bandwidth of reading memory, and arithmetic in each format.

    python benchmarks/limits.py             # --threads 2, --json

Every figure of the benchmarks stands beside the limit that bounds it, and a shared machine drifts, so the limits are
measured again in every run. The loops are `csrc/limits.inl`, in the instruction set that the kernels use: a limit of
the CPU as these kernels can reach it. Without an instruction for a format there is no limit for it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmfast.backends import cpp

UNITS = {"read": "GB/s", "fp32": "GFLOP/s", "bf16": "GFLOP/s", "int8": "GOP/s"}
CHUNK = 2 << 20  # memory is read in multiples of this
TASKS_PER_THREAD = 8

Rates = dict[str, float]  # "median" and "best" of some rounds, in 10^9 a second


def measure(threads: int | None = None, megabytes: int = 512, seconds: float = 0.02, rounds: int = 7) -> dict[str, Any]:
    """The limits on one thread and on `threads` (torch's own number), each the median and the best of `rounds`.

    "read", "fp32", "bf16" and "int8" hold a figure for each number of threads, in `UNITS`; a format is None where the
    instruction set in use cannot. `megabytes` should be many times the caches; `seconds` is about how long a round of
    arithmetic takes.
    """
    counts = sorted({1, threads or torch.get_num_threads()})
    limits: dict[str, Any] = {"isa": cpp.isa(), "threads": counts[-1], "read": reading(megabytes << 20, counts, rounds)}
    return limits | {name: arithmetic(name, counts, seconds, rounds) for name in ("fp32", "bf16", "int8")}


def reading(size: int, counts: list[int], rounds: int) -> dict[str, Rates]:
    memory = huge_pages(size)

    def call() -> int:
        torch.ops.llmfast.limit_read(memory)
        return memory.nbytes

    found = {}
    for count in counts:
        with using_threads(count):
            found[str(count)] = rates(call, rounds)
    return found


def huge_pages(size: int) -> Tensor:
    """At least `size` bytes that were written once, in huge pages where the system has them.

    With pages of 4 kB the limit would be that of address translation, and pages never written are all the same zeros.
    """
    pages = mmap.mmap(-1, -(-size // CHUNK) * CHUNK)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


def arithmetic(name: str, counts: list[int], seconds: float, rounds: int) -> dict[str, Rates] | None:
    operation = torch.ops.llmfast.limit_arithmetic
    if operation(name, 1, 1) == 0:
        return None
    length, took = 1000, 0.0
    with using_threads(1):
        while took < seconds / 8:  # the shortest of three: on a busy machine others' time would pass for ours
            length *= 2
            took = min(timed(lambda: operation(name, TASKS_PER_THREAD, length))[1] for _ in range(3))  # noqa: B023
    length = max(1, round(length * seconds / took))
    found = {}
    for count in counts:
        with using_threads(count):
            found[str(count)] = rates(lambda: operation(name, count * TASKS_PER_THREAD, length), rounds)  # noqa: B023
    return found


def rates(call: Callable[[], int], rounds: int) -> Rates:
    """How much of what `call` returns (bytes, operations) it does in a second, in 10^9."""
    found = [amount / took / 1e9 for amount, took in (timed(call) for _ in range(rounds))]
    return {"median": round(statistics.median(found), 1), "best": round(max(found), 1)}


def timed(call: Callable[[], int]) -> tuple[int, float]:
    start = time.perf_counter()
    amount = call()
    return amount, time.perf_counter() - start


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="how many threads (default: as many as torch uses)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    limits = measure(arguments.threads)
    if arguments.json:
        print(json.dumps(limits, indent=1))
        return
    print(f"{limits['isa']} kernels: median (best) on each number of threads")
    for name, unit in UNITS.items():
        found = limits[name] or {}
        columns = [f"{count}: {rate['median']:.1f} ({rate['best']:.1f})" for count, rate in found.items()]
        print(f"{name:5} {unit:8} {'    '.join(columns) or 'no instruction for it'}")


if __name__ == "__main__":
    main()
