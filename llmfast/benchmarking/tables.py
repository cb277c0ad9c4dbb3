"""Records as tables for a terminal: a group at a time, the competitors side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from llmfast.benchmarking import limits
from llmfast.benchmarking.records import GROUPS, Record, Results

WIDTH = 140  # where there is no terminal to ask


def tables(results: Results) -> Iterator[Table]:
    """One for each group that has records."""
    for group in GROUPS:
        if found := results.of(group):
            yield peers_table(found) if group == "peers" else group_table(group, found)


def problems(records: Sequence[Record]) -> list[str]:
    """A line for everything that was not measured."""
    return [f"{_what(record)}, {record.backend} {record.precision}: {record.problem}" for record in _failed(records)]


def group_table(group: str, records: Sequence[Record]) -> Table:
    """A row for each task and precision, a column for each backend: its speed, how many times the baseline's that is,
    and the share of the limit."""
    backends = list(dict.fromkeys(record.backend for record in records))
    table = _table(f"{group}: {GROUPS[group]}")
    for title in ("", "", "precision"):
        table.add_column(title)
    for backend in backends:
        table.add_column(backend, justify="right")
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((*record.same_task, record.precision), {})[record.backend] = record
    before = None
    for cells in rows.values():
        first = next(iter(cells.values()))
        name = ", ".join(filter(None, (first.name, first.model)))
        shown = [cell(cells[backend]) if backend in cells else "" for backend in backends]
        table.add_row(name if name != before else "", sizes_of(first), first.precision, *shown)
        before = name
    return table


def peers_table(records: Sequence[Record]) -> Table:
    """A row for each library and precision, a column for each case."""
    cases = list(dict.fromkeys((record.name, sizes_of(record)) for record in records))
    table = _table(f"peers: {GROUPS['peers']}, tokens a second, share of the limit")
    table.add_column("")
    for name, sizes in cases:
        table.add_column(f"{name}\n{sizes}", justify="right")
    for engine in dict.fromkeys((record.backend, record.precision) for record in records):
        cells = {(r.name, sizes_of(r)): r for r in records if (r.backend, r.precision) == engine}
        table.add_row(" ".join(engine), *[cell(cells[case], ratio=False) if case in cells else "" for case in cases])
    return table


def limits_table(measured: dict[str, Any]) -> Table:
    """The machine's limits on one thread and on all."""
    table = _table(f"limits: the {measured['isa']} kernels' machine, the median (best) of some rounds")
    counts = list(dict.fromkeys(["1", str(measured["threads"])]))
    table.add_column("")
    for count in counts:
        table.add_column(f"{count} thread" + "s" * (count != "1"), justify="right")
    table.add_column("")
    for name, unit in limits.UNITS.items():
        rates = measured.get(name) or {}
        shown = [f"{rates[n]['median']:.1f} ({rates[n]['best']:.1f})" if n in rates else "–" for n in counts]
        table.add_row(name, *shown, unit if rates else "no instruction for it")
    return table


def cell(record: Record, ratio: bool = True) -> str:
    """ "0.47 ms  5.8 ×  62%": what it took, times the baseline's speed, share of the limit."""
    if record.problem is not None:
        return "not measured"
    parts = [figure_of(record)]
    if ratio and record.versus:
        parts.append(f"{record.versus[0].ratio.median:.2f} ×")
    if record.share_of_limit is not None:
        parts.append(f"{record.share_of_limit:.0%}")
    return "  ".join(parts)


def figure_of(record: Record) -> str:
    """Memory in MB, a model's speed in tokens and a tokenizer's in text a second, everything else in time."""
    if record.bytes is not None:
        return f"{record.bytes / 1e6:.1f} MB"
    if record.group in ("prefill", "decode", "generate", "training", "peers"):
        return f"{record.rates['tokens_per_second']:,.0f}/s"
    if record.group == "tokenizer":
        return f"{record.rates['megabytes_per_second']:.1f} MB/s"
    assert record.seconds is not None
    return duration(record.seconds.median)


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _failed(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.problem is not None]


def _what(record: Record) -> str:
    return ", ".join(filter(None, (record.name, record.model, sizes_of(record))))


def sizes_of(record: Record) -> str:
    """The sizes that differ within a group: not the width of a model, nor a batch of one."""
    shown = {n: v for n, v in record.sizes.items() if n in ("tokens", "context", "bytes", "vocabulary", "batch")}
    if shown.get("batch") == 1:
        del shown["batch"]
    if record.group == "ops":
        shown.pop("vocabulary", None)
    return ", ".join(f"{value:,} {name}" if name != "batch" else f"batch {value}" for name, value in shown.items())


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
