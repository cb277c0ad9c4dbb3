"""The measurement: group by group, the engines of a group take turns, and every speed is kept.

Everything drifts on a shared machine, by a third and more, so no engine is measured in one go: a round gives each of
them every case once, and ratios are taken within a round, their median over the rounds. Before anything is timed, each
engine has to give the logits that transformers gives.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.benchmarking import limits
from llmfast.benchmarking.peers import counting
from llmfast.benchmarking.peers.client import Worker, WorkerError, busy_neighbour, cpus_in_use
from llmfast.benchmarking.peers.plan import CT2, MEMORY_ALLOWANCE, OURS, Case, Effort, Engine, Model, Target
from llmfast.models import PRESETS, ModelConfig

EXACT = 1e-3  # how far our float32 logits may be from transformers'


@dataclass
class Row:
    """What was found out about one engine. `seconds` are a token's, by case and round."""

    engine: Engine
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: int | None = None  # bytes for loading and decoding, above a process that only imports
    agreement: float | None = None
    problem: str | None = None


@dataclass
class Group:
    rows: list[Row]
    cases: tuple[Case, ...]
    model: Model
    limits_before: dict[str, Any]
    limits_after: dict[str, Any]
    others: list[float | None]  # CPUs that other programs used before and after: the figures are as good as that

    @property
    def config(self) -> ModelConfig:
        return PRESETS[self.model.preset]

    def case(self, kind: str) -> Case:
        return next(case for case in self.cases if case.kind == kind)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.engine.name == name)

    def rates(self, row: Row, case: str) -> list[float]:
        """Tokens a second."""
        return [1 / seconds for seconds in row.seconds.get(case, [])]

    def ratios(self, row: Row, case: str, other: Row, other_case: str | None = None) -> list[float]:
        """How many times as fast, round by round."""
        pairs = zip(self.rates(row, case), self.rates(other, other_case or case), strict=False)
        return [a / b for a, b in pairs]

    def limit(self, name: str) -> float | None:
        """The best of the rounds before and after, on all threads, in 10^9 a second."""
        return limits.best([self.limits_before, self.limits_after], name)

    def work(self, row: Row, case: Case) -> float:
        """What a token needs: bytes when decoding, operations in a prompt."""
        if case.new:
            return counting.decode_bytes(self.config, row.engine.formats, case.prompt, case.new)
        return counting.prefill_operations(self.config, case.prompt) / case.prompt

    def share(self, row: Row, case: Case) -> float | None:
        """Of the limit: bandwidth when decoding, arithmetic in a prompt."""
        limit = self.limit("read" if case.new else row.engine.arithmetic)
        rates = self.rates(row, case.name)
        return statistics.median(rates) * self.work(row, case) / (limit * 1e9) if limit and rates else None

    def reached(self, target: Target) -> list[float]:
        """The figure that a target is about, round by round."""
        ours, case = self.row(target.ours), self.case(target.case)
        if target.peer is not None:
            return self.ratios(ours, case.name, self.row(target.peer))
        if target.own is None:
            if (limit := self.limit("read" if case.new else ours.engine.arithmetic)) is None:
                return []
            return [rate * self.work(ours, case) / (limit * 1e9) for rate in self.rates(ours, case.name)]
        own = self.case(target.own)
        ratios = self.ratios(ours, case.name, ours, own.name)
        if case.kind != "long":
            return ratios
        more = self.work(ours, case) / self.work(ours, own)  # a long context reads more for each token
        return [ratio * more for ratio in ratios]

    def memory_bound(self, row: Row) -> float:
        return counting.resident_bytes(self.config, row.engine.formats, self.model.capacity) + MEMORY_ALLOWANCE


def measure_group(
    engines: list[Engine],
    models: Path,
    model: Model,
    effort: Effort,
    threads: int,
    say: Callable[[str], None],
) -> Group:
    """Everything about the engines of a group. An engine that fails has a `problem`, and the others go on."""
    others_before, before = cpus_in_use(), limits.measure(threads, rounds=effort.limit_rounds)
    if (others_before or 0) > 0.1:
        say(f"other processes are using {others_before} CPUs: wait until the machine is idle for figures to keep")
    say("loading and checking " + ", ".join(engine.name for engine in engines))
    rows, cases = [Row(engine) for engine in engines], effort.cases(model)
    workers = [Worker(engine, models, model.capacity, threads) for engine in engines]  # they load side by side
    try:
        at_work = [pair for pair in zip(rows, workers, strict=True) if attempt(pair[0], prepare, *pair, models)]
        for number in range(effort.rounds):
            say(f"round {number + 1} of {effort.rounds}")
            for case in cases:
                with busy_neighbour() if case.busy else nullcontext():
                    for row, worker in at_work:
                        if row.problem is None:
                            attempt(row, time_once, row, worker, case)
    finally:
        for worker in workers:
            worker.close()
    others_after, after = cpus_in_use(), limits.measure(threads, rounds=effort.limit_rounds)
    return Group(rows, cases, model, before, after, [others_before, others_after])


def attempt(row: Row, action: Callable[..., None], *arguments: Any) -> bool:
    """Whether it went well; if not, the row says why."""
    try:
        action(*arguments)
    except WorkerError as error:
        row.problem = str(error)
    return row.problem is None


def prepare(row: Row, worker: Worker, models: Path) -> None:
    """Loads, decodes a little to see how much memory that takes, and checks the logits."""
    worker.wait_until_ready()
    worker.ask("decode", prompt=32, new=16)
    row.memory = worker.ask("memory")["bytes"]
    check(row, worker, models)
    worker.settle()


def check(row: Row, worker: Worker, models: Path) -> None:
    """The same text in one pass and, but for CTranslate2, partly token by token."""
    if row.engine.agreement is None:
        return
    with np.load(models / "reference.npz") as reference:
        expected = {int(length): reference[length] for length in reference}
    agreements = []
    for length, logits in expected.items():
        stepped = 0 if row.engine.library == CT2 or length > 32 else 8
        found = worker.logits(prompt=length - stepped, new=stepped)
        agreements.append(float(np.corrcoef(found, logits)[0, 1]))
        difference = float(np.abs(found - logits).max())
        if row.engine.library == OURS and row.engine.precision == "fp32" and not difference <= EXACT:
            raise WorkerError(f"{row.engine.name}: after {length} tokens its logits are wrong by {difference:.1e}")
    row.agreement = min(agreements)
    if not row.agreement >= row.engine.agreement:
        raise WorkerError(f"{row.engine.name}: its logits correlate with transformers' by {row.agreement:.4f} only")


def time_once(row: Row, worker: Worker, case: Case) -> None:
    what = "decode" if case.new else "prefill"
    seconds = worker.ask(what, prompt=case.prompt, new=case.new)["seconds"]
    row.seconds.setdefault(case.name, []).append(seconds / (case.new or case.prompt))
    worker.settle()
