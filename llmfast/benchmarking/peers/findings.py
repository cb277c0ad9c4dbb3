"""What a campaign found, as records, and beside what it should have come to. Losses stand there like wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from llmfast.benchmarking.peers.campaign import Group, Row
from llmfast.benchmarking.peers.plan import OURS, Case, Target
from llmfast.benchmarking.records import Record, Spread, Versus


def records(groups: Mapping[str, Group]) -> list[Record]:
    """Speeds by case, then the memory of every engine; what could not be measured says why."""
    rows = [(group, row) for group in groups.values() for row in group.rows]
    speeds = [speed_of(group, row, case) for group, row in rows for case in group.cases]
    return speeds + [memory_of(group, row) for group, row in rows if row.memory is not None]


def speed_of(group: Group, row: Row, case: Case) -> Record:
    """One engine in one case: seconds are those of a token."""
    seconds = row.seconds.get(case.name, [])
    if not seconds:
        return Record(**_engine(group, row), name=case.what, sizes=case.sizes, problem=row.problem or "not measured")
    rate = 1 / Spread.of(seconds).median
    share = group.share(row, case)
    unit = "gigabytes_per_second" if case.new else "gigaflops_per_second"
    others = [other for other in group.rows if other.engine.library != OURS and group.rates(other, case.name)]
    return Record(
        **_engine(group, row),
        name=case.what,
        sizes=case.sizes,
        seconds=Spread.of(seconds),
        rates={"tokens_per_second": round(rate, 1), unit: round(rate * group.work(row, case) / 1e9, 1)},
        limit=None if share is None else "read" if case.new else row.engine.arithmetic,
        share_of_limit=None if share is None else round(share, 3),
        versus=tuple(
            Versus(other.engine.name, Spread.of(group.ratios(row, case.name, other)))
            for other in others
            if row.engine.library == OURS
        ),
        checked=_checked(row),
    )


def memory_of(group: Group, row: Row) -> Record:
    note = "above a process that has only imported its library"
    assert row.memory is not None
    return Record(
        **_engine(group, row) | {"group": "memory"}, name="load, decode 16 tokens", bytes=row.memory, note=note
    )


def _engine(group: Group, row: Row) -> dict[str, Any]:
    who = {"backend": row.engine.library, "precision": row.engine.precision}
    return {"group": "peers", "device": "cpu", "model": group.model.name} | who


def _checked(row: Row) -> float | None:
    """How far the correlation with transformers' logits is from 1, in units of what is allowed."""
    if row.agreement is None or row.engine.agreement is None:
        return None
    return round((1 - row.agreement) / (1 - row.engine.agreement), 4)


def targets(groups: Mapping[str, Group]) -> Table:
    """What the figures should come to: times a peer's speed, shares of its own, bytes of memory."""
    table = Table(title="what it should come to", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "case", "against", "at least", "reached (lowest–highest)", ""):
        table.add_column(title)
    for name, group in groups.items():
        for target in group.model.targets:
            if target.group == name:
                table.add_row(*_target(group, target))
    for group in groups.values():
        for row in group.rows:
            if row.engine.library == OURS and row.memory is not None:
                bound = group.memory_bound(row)
                most, verdict = f"at most {bound / 1e6:.0f} MB", "met" if row.memory <= bound else "MISSED"
                table.add_row(
                    row.engine.name, "memory", "its weights and cache", most, f"{row.memory / 1e6:.0f}", verdict
                )
    return table


def _target(group: Group, target: Target) -> tuple[str, ...]:
    reached = group.reached(target)
    own = {"long": "its GB/s at 32 tokens", "busy": "its speed alone"}
    against = target.peer or (own[target.case] if target.own else "the machine's limit")
    shown, verdict = "not measured", ""
    if reached:
        spread = Spread.of(reached)
        shown = f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"
        verdict = "met" if spread.median >= target.least else "MISSED"
    return (target.ours, group.case(target.case).name, against, f"{target.least:.2f}", shown, verdict)
