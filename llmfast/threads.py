"""How many threads to compute with on a CPU, and what becomes of them in a forked process."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def thread_count() -> int:
    """torch's setting (`torch.set_num_threads`, `OMP_NUM_THREADS`), but no more than this process may use at once: the
    CPUs it is bound to, and its container's quota. More would only wait for one another."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), usable, _quota() or usable))


@functools.cache
def _quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many CPUs' time the container allows (cgroup v2, then v1), rounded up; None where it is not limited."""
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (root / quota_file).read_text().split()
            if period_file is not None:
                words += (root / period_file).read_text().split()
            return None if words[0] in ("max", "-1") else max(1, math.ceil(int(words[0]) / int(words[1])))
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return None


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on the calling thread alone: for many small operations in a row.

    With two threads each waits for the other, on a busy machine for its next slice of time: rounding a weight of
    1536 x 576 to int4 took 21 s instead of 0.1.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def fork_safe_torch() -> Iterator[None]:
    """Around small computations in torch: in a forked process they run on one thread.

    torch's OpenMP threads do not exist in a child, and one that waits for them waits forever; the native decoder has
    threads of its own, which it starts again.
    """
    with one_thread() if _forked and torch.get_num_threads() > 1 else contextlib.nullcontext():
        yield
