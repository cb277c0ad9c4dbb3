"""The contract's cases on this device, before anything is timed: Triton's kernels against float64.

On a GPU most of the time goes into compiling kernels, which a dozen processes do side by side.
"""

from __future__ import annotations

import multiprocessing
import os
import time

import torch

from benchmarks.gpu.bench import Bench
from llmfast import contract

PROCESSES = 12  # at most
TASKS_A_PROCESS = 25  # then a new one: a kernel that reads where it may not spoils its process for those after it
DTYPES = ("bfloat16", "float32", "float16")  # in the order of how much hangs on them
TINY = 20  # cases without a GPU

Found = tuple[str, tuple[str, ...], float]  # the case, what is wrong, its largest error in units of what is allowed


def run(bench: Bench) -> None:
    """Puts into `bench.facts` how many cases passed, failed (and how) and were not reached."""
    tasks = _tasks(bench.device)
    found: list[Found] = []
    if not bench.on_gpu:
        small = sorted(range(len(tasks)), key=lambda index: tasks[index].case.elements)[:TINY]
        found = [_verdict((bench.device, index)) for index in small]
        return _note(bench, found, len(small))
    processes = min(PROCESSES, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=TASKS_A_PROCESS) as pool:
        verdicts = pool.imap_unordered(_verdict, [(bench.device, index) for index in range(len(tasks))])
        try:
            while len(found) < len(tasks):
                found.append(verdicts.next(timeout=max(0.1, bench.deadline - time.monotonic())))
                if len(found) % 50 == 0:
                    _note(bench, found, len(tasks))
        except multiprocessing.TimeoutError:
            pass  # the rest is counted as not reached
    _note(bench, found, len(tasks))


def _tasks(device: str) -> list[contract.Task]:
    """Every case in one dtype before any in the next."""
    tasks = contract.plan(["triton"], device=device).tasks
    return sorted(tasks, key=lambda task: DTYPES.index(task.dtype))


def _verdict(place: tuple[str, int]) -> Found:
    """Of the n-th task on a device, in any process."""
    device, index = place
    torch.set_num_threads(1)
    verdict = contract.run(_tasks(device)[index])
    worst = max((c.relative for c in verdict.outcome.comparisons), default=0.0)
    return verdict.task.name, verdict.outcome.problems, round(worst, 4)


def _note(bench: Bench, found: list[Found], planned: int) -> None:
    failed = {name: list(problems) for name, problems, _ in found if problems}
    bench.facts["correctness"] = {
        "passed": len(found) - len(failed),
        "failed": failed,
        "not_reached": planned - len(found),
        "worst": max(((error, name) for name, problems, error in found if not problems), default=None),
    }
    bench.save(bench)
