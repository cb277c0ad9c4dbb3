"""What makes a quick, a usual and a full run, and running a selection of it.

A run on two cores takes less than two minutes quickly, less than ten as usual, and as long as it takes in full.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmfast.benchmarking import (
    limits,
    model_cases,
    op_cases,
    peak_memory,
    startup_cases,
    tokenizer_cases,
    training_cases,
)
from llmfast.benchmarking.comparison import Comparison, Measured
from llmfast.benchmarking.comparison import run as run_comparison
from llmfast.benchmarking.op_cases import DTYPES
from llmfast.benchmarking.timing import FULL, QUICK, USUAL, Effort

GROUPS = ("ops", "prefill", "decode", "generate", "latency", "training", "tokenizer", "memory")
Item = Comparison | peak_memory.Task


@dataclass(frozen=True)
class Scale:
    """How much of everything. Lengths are in tokens, texts in characters."""

    effort: Effort
    op_lengths: tuple[int, ...]
    most_operations: float  # of an op: what takes more is left out
    compiled: bool  # torch.compile as a competitor
    model: str  # of prefill and decode
    precisions: tuple[str, ...]
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    generated: tuple[int, ...]
    training: tuple[int, ...]
    texts: tuple[int, ...]
    vocabularies: tuple[int, ...]
    learn_from: int
    memory_lengths: tuple[int, ...]
    small_model: str = "stories"  # of texts, latency and training
    trained: tuple[str, ...] = ("fp32", "bf16")
    started: tuple[str, ...] = ("fp32", "int8")  # precisions in which fresh processes start
    compiled_training: bool = False  # a minute for each precision


SCALES = {
    "quick": Scale(
        effort=QUICK,
        op_lengths=(64, 512),
        most_operations=2e10,
        compiled=False,
        model="stories",
        precisions=("fp32", "bf16", "int8"),
        prompts=(64, 256),
        contexts=(32, 256),
        batches=(4,),
        generated=(32,),
        training=(64,),
        texts=(20_000,),
        vocabularies=(500,),
        learn_from=20_000,
        memory_lengths=(256,),
        trained=("fp32",),
        started=("fp32",),
    ),
    "usual": Scale(
        effort=USUAL,
        op_lengths=(64, 256, 1024, 4096),
        most_operations=4e10,
        compiled=True,
        model="gpt2",
        precisions=("fp32", "bf16", "int8", "int4"),
        prompts=(32, 128, 512),
        contexts=(32, 480, 928),
        batches=(8,),
        generated=(32, 128),
        training=(64, 256),
        texts=(20_000, 400_000),
        vocabularies=(500, 4000),
        learn_from=400_000,
        memory_lengths=(256, 1024, 4096),
    ),
    "full": Scale(
        effort=FULL,
        op_lengths=(64, 128, 256, 512, 1024, 2048, 4096, 8192),
        most_operations=float("inf"),
        compiled=True,
        model="gpt2",
        precisions=("fp32", "bf16", "int8", "int4", "int4-all"),
        prompts=(32, 64, 128, 256, 512, 1024),
        contexts=(32, 128, 256, 512, 960),
        batches=(2, 4, 8, 16),
        generated=(32, 64, 128, 256, 500),
        training=(64, 128, 256, 512),
        texts=(2_000, 20_000, 400_000),
        vocabularies=(500, 4000, 8000),
        learn_from=2_000_000,
        memory_lengths=(64, 256, 1024, 4096),
        compiled_training=True,
    ),
}


@dataclass(frozen=True)
class Selection:
    """What to run of a scale; empty choices leave it to the scale."""

    groups: tuple[str, ...] = GROUPS
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    model: str | None = None
    device: str = "cpu"


def plan(scale: Scale, selection: Selection = Selection()) -> list[Item]:  # noqa: B008  (it is frozen)
    """The comparisons and the memory tasks, in the order in which they run."""
    s, chosen, device = scale, selection.backends, selection.device
    model, small = selection.model or s.model, selection.model or s.small_model
    precisions = selection.precisions or s.precisions
    compiled = s.compiled and has_compiler()
    of_dtypes = [p for p in selection.precisions or ("fp32", "bf16") if p in DTYPES]
    trained = [p for p in selection.precisions or s.trained if p in DTYPES]

    def items(group: str) -> Iterator[Item]:
        if group == "ops":
            yield from op_cases.comparisons(s.op_lengths, s.most_operations, of_dtypes, device, chosen, compiled)
        elif group == "prefill":
            yield from model_cases.prefill(model, s.prompts, precisions, device, chosen)
        elif group == "decode":
            yield from model_cases.decode(model, s.contexts, s.batches, precisions, device, chosen)
        elif group == "generate":
            generated = [p for p in selection.precisions or ("fp32",) if p in DTYPES]
            yield from model_cases.generate(small, s.generated, generated, device, chosen)
        elif group == "latency":
            yield from model_cases.first_token(small, s.prompts, precisions, device, chosen)
            yield from startup_cases.startup(small, s.started, chosen)
        elif group == "training":
            yield from training_cases.training(
                small, s.training, trained, device, chosen, s.compiled_training and compiled
            )
        elif group == "tokenizer":
            yield from tokenizer_cases.comparisons(s.texts, s.vocabularies, s.learn_from)
        elif group == "memory":
            most = min(s.most_operations, SCALES["usual"].most_operations)
            yield from peak_memory.tasks(
                s.memory_lengths, most, model, s.prompts, small, s.training, precisions, device, chosen
            )

    planned = [item for group in selection.groups for item in items(group)]
    return [item for item in planned if isinstance(item, peak_memory.Task) or item.entries]


def has_compiler() -> bool:
    """Whether torch.compile can make code for a CPU here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def group_of(item: Item) -> str:
    return item.group if isinstance(item, Comparison) else "memory"


def title_of(item: Item) -> str:
    if isinstance(item, Comparison):
        precisions = ", ".join(dict.fromkeys(entry.precision for entry in item.entries))
        return f"{item.group}: {item.title}, {precisions}"
    return f"memory: {item.name}, {item.entry}, {item.tokens} tokens"


def run(
    items: Sequence[Item],
    effort: Effort,
    measured_limits: list[dict[str, Any]],
    places: Mapping[str, str] | None = None,
    before: Callable[[int, Item], None] = lambda number, item: None,
    fresh_limits: bool = True,
) -> Iterator[tuple[Item, list[Measured]]]:
    """Runs them, one after another; `before(number, item)` is told what comes next. `places` are the modules or files
    of a user's own backends by name, for the processes in which memory is measured.

    The CPU's limits are measured at the beginning of every group (unless `fresh_limits` is off) and added to
    `measured_limits`: the best of them is what shares are of. What runs on a GPU gets no shares here.
    """
    group = None
    for number, item in enumerate(items):
        before(number, item)
        if fresh_limits and group_of(item) != group:
            group = group_of(item)
            measure_limits(measured_limits, item.device)
        if isinstance(item, Comparison):
            yield item, run_comparison(item, effort, measured_limits if item.device == "cpu" else ())
        else:
            yield item, [peak_memory.run(item, places or {})]


def measure_limits(measured: list[dict[str, Any]], device: str) -> None:
    """Adds the limits of this moment, where they can be measured."""
    if device == "cpu" and limits.why_not() is None:
        measured.append(limits.measure(rounds=3))


def best_limits(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measurement with the best of everything, on all threads, in the form of one."""
    if not measured:
        return {}
    best = dict(measured[-1])
    for name in limits.UNITS:
        found = [taken[name] for taken in measured if taken.get(name)]
        best[name] = max(found, key=lambda rates: rates[str(best["threads"])]["best"], default=None)
    return best
