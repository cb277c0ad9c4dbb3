"""What this machine can do at most: the bandwidth of reading and of copying memory, and arithmetic in each format.

    llmfast bench limits             # --threads 2, --json FILE

Every figure of the benchmarks stands beside the limit that bounds it, and a shared machine drifts, so the limits are
measured again in every run. The loops are `csrc/ops/limits.inl`, in the instruction set that the kernels use: a limit
of the CPU as these kernels can reach it. Without an instruction for a format there is no limit for it.

    {"isa": "avx2", "threads": 2, "read": {"1": {"median": 20.1, "best": 21.0}, "2": {...}}, "bf16": None, ...}
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmfast.backends import cpp
from llmfast.threads import thread_count

UNITS = {"read": "GB/s", "copy": "GB/s", "fp32": "GFLOP/s", "bf16": "GFLOP/s", "int8": "GOP/s"}
CHUNK = 2 << 20  # memory is read in multiples of this
TASKS_PER_THREAD = 8

Rates = dict[str, float]  # "median" and "best" of some rounds, in 10^9 a second


def why_not() -> str | None:
    """Why the limits can't be measured here, or None."""
    missing = cpp.why_not("gelu", torch.device("cpu"), torch.float32)
    return None if missing is None else f"the machine's limits are measured by the C++ extension: {missing}"


def measure(threads: int | None = None, megabytes: int = 512, seconds: float = 0.02, rounds: int = 7) -> dict[str, Any]:
    """The limits on one thread and on `threads` (as many as kernels use), each the median and the best of `rounds`.

    Each of `UNITS` holds a figure for each number of threads; a format is None where the instruction set in use
    cannot. `megabytes` should be many times the caches; `seconds` is about how long a round of arithmetic takes.
    """
    counts = sorted({1, threads or thread_count()})
    memory = huge_pages(megabytes << 20)
    limits: dict[str, Any] = {"isa": cpp.isa(), "threads": counts[-1]}
    limits |= {"read": reading(memory, counts, rounds), "copy": copying(memory, counts, rounds)}
    return limits | {name: arithmetic(name, counts, seconds, rounds) for name in ("fp32", "bf16", "int8")}


def best(runs: Iterable[dict[str, Any]], name: str) -> float | None:
    """The best that any of some measurements found for `name` on all threads, in 10^9 a second."""
    taken = [limits[name][str(limits["threads"])]["best"] for limits in runs if limits.get(name)]
    return max(taken, default=None)


def reading(memory: Tensor, counts: list[int], rounds: int) -> dict[str, Rates]:
    def call() -> int:
        torch.ops.llmfast.limit_read(memory)
        return memory.nbytes

    found = {}
    for count in counts:
        with using_threads(count):
            found[str(count)] = rates(call, rounds)
    return found


def copying(memory: Tensor, counts: list[int], rounds: int) -> dict[str, Rates]:
    """From one half of the memory to the other; what is read counts, and what is written.

    The C library's `memmove` goes past the caches when it writes, which torch's `copy_` does not: it is the faster.
    """
    half = memory.nbytes // 2
    source, target = memory.data_ptr(), memory.data_ptr() + half
    found = {}
    for count in counts:
        share = half // count
        with ThreadPoolExecutor(count) as pool:

            def call(pool: ThreadPoolExecutor = pool, count: int = count, share: int = share) -> int:
                starts = [i * share for i in range(count)]
                list(pool.map(lambda start: ctypes.memmove(target + start, source + start, share), starts))
                return 2 * share * count

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
