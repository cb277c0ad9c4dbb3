"""Records as what a picture shows: lines where a size changes, bars where none does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmfast.benchmarking.drawing import Bar, Bars, Dots, Line, Panel
from llmfast.benchmarking.records import Record
from llmfast.benchmarking.startup_cases import ANY
from llmfast.benchmarking.tables import figure_of

# What a quantity is called on an axis, and what changes along the other one.
AXES = {
    "tokens_per_second": "tokens/s",
    "megabytes_per_second": "MB/s of text",
    "gigabytes_per_second": "GB/s",
    "gigaflops_per_second": "GFLOP/s",
    "seconds": "milliseconds",
    "bytes": "MB",
}
SIZES = {
    "tokens": "tokens",
    "context": "tokens before",
    "batch": "sequences at once",
    "bytes": "bytes of text",
    "vocabulary": "tokens of vocabulary",
}
WIDE = 20  # from this ratio between the largest and the smallest on, an axis is logarithmic
# A peer's name for a precision, and ours of the same width.
SAME_PRECISION = {"f32": "fp32", "float32": "fp32", "q8_0": "int8", "q4_0": "int4", "int4-all": "int4"}


def rate_of(records: Sequence[Record]) -> str:
    """GB/s for an op that memory bounds, GFLOP/s for one that arithmetic bounds."""
    return "gigabytes_per_second" if records[-1].limit in ("read", "copy") else "gigaflops_per_second"


def line_panels(records: Sequence[Record], quantity: str | None = None) -> list[Panel]:
    """A panel for each name, size that changes, and precision; none where nothing changes."""
    found = []
    for name, model in dict.fromkeys((record.name, record.model) for record in records):
        mine = [record for record in records if (record.name, record.model) == (name, model)]
        for size in SIZES:
            for precision in dict.fromkeys(record.precision for record in mine):
                these = varying([record for record in mine if record.precision == precision], size)
                if these:
                    title = ", ".join([name.replace("_", " "), *([precision] if precision != ANY else [])])
                    found.append(_lines(title, size, these, quantity or rate_of(these)))
    return found


def varying(records: Sequence[Record], size: str) -> list[Record]:
    """Those that differ in `size` alone, the others being at their least; none where it takes one value."""
    least: dict[str, int] = {}
    for record in records:
        for name, value in record.sizes.items():
            least[name] = min(value, least.get(name, value))
    others = {name: value for name, value in least.items() if name != size}
    # The numbers of operations and the like that follow from a size are no sizes of their own.
    found = [r for r in records if all(r.sizes.get(n) == v for n, v in others.items() if n in SIZES)]
    found = [record for record in found if size in record.sizes]
    return sorted(found, key=lambda r: r.sizes[size]) if len({r.sizes[size] for r in found}) > 1 else []


def _lines(title: str, size: str, records: Sequence[Record], quantity: str) -> Panel:
    lines = []
    for backend in dict.fromkeys(record.backend for record in records):
        points = [_point(record, size, quantity) for record in records if record.backend == backend]
        lines.append(Line(backend, backend, tuple(points)))
    # What bounds the work gives the same figure from each competitor's share of it.
    limit = {r.sizes[size]: _value(r, quantity) / r.share_of_limit for r in records if r.share_of_limit}
    bounded = tuple(limit.items()) if quantity.endswith("per_second") and len(limit) > 1 else ()
    values = [_value(record, quantity) for record in records]
    log = quantity == "bytes" and max(values) > WIDE * min(values)
    return Panel(title, SIZES[size], AXES[quantity], tuple(lines), bounded, log)


def _point(record: Record, size: str, quantity: str) -> tuple[float, float, float, float]:
    x, y = record.sizes[size], _value(record, quantity)
    if record.seconds is None:
        return x, y, y, y
    low, high = record.seconds.low / record.seconds.median, record.seconds.high / record.seconds.median
    return (x, y, y * low, y * high) if quantity == "seconds" else (x, y, y / high, y / low)


def _value(record: Record, quantity: str) -> float:
    if quantity == "bytes":
        return (record.bytes or 0) / 1e6
    if quantity == "seconds":
        return 1000 * record.seconds.median if record.seconds else 0.0
    return record.rates.get(quantity, 0.0)


def cache_panels(records: Sequence[Record]) -> list[Panel]:
    """Time over tokens, both logarithmic: a straight line of slope 1 with the cache, steeper without."""
    panels = []
    for precision in dict.fromkeys(record.precision for record in records):
        lines = []
        for backend, name in dict.fromkeys((record.backend, record.name) for record in records):
            these = [r for r in records if (r.precision, r.backend, r.name) == (precision, backend, name)]
            points = [_point(r, "tokens", "seconds") for r in sorted(these, key=lambda r: r.sizes["tokens"])]
            if len(points) > 1:
                label = f"{backend}, {name.rpartition(' ')[2]}"
                lines.append(Line(label, backend, tuple(points), dashed="uncached" in name))
        if lines:
            panels.append(Panel(precision, "new tokens", AXES["seconds"], tuple(lines), log=True))
    return panels


def cache_bars(records: Sequence[Record]) -> list[Bars]:
    """The same for texts of one length."""
    found = []
    for tokens in dict.fromkeys(record.sizes["tokens"] for record in records):
        bars = [
            Bar(f"{r.backend} {r.precision}, {r.name.rpartition(' ')[2]}", r.backend, rate, f"{rate:,.0f}")
            for r in records
            if r.sizes["tokens"] == tokens and (rate := _value(r, "tokens_per_second"))
        ]
        found.append(Bars(f"{tokens} new tokens", AXES["tokens_per_second"], tuple(bars)))
    return found


def bar_panels(records: Sequence[Record], quantity: str) -> list[Bars]:
    """For each task the engines that did it: those of a precision together, and a bar for a limit that is known."""
    found = []
    order = list(dict.fromkeys(map(_width, records)))
    for task in dict.fromkeys(record.same_task for record in records):
        mine = sorted((r for r in records if r.same_task == task), key=lambda r: order.index(_width(r)))
        bars = []
        for r in mine:
            share = f", {r.share_of_limit:.0%} of the limit" if r.share_of_limit else ""
            limit = _value(r, quantity) / r.share_of_limit if r.share_of_limit and quantity != "seconds" else None
            name = r.backend if r.precision == ANY else f"{r.backend} {r.precision}"
            bars.append(Bar(name, r.backend, _value(r, quantity), f"{figure_of(r)}{share}", limit))
        sizes = [f"{value:,} {SIZES[size]}" for size, value in mine[0].sizes.items() if size in SIZES and value > 1]
        found.append(Bars(", ".join([mine[0].name.replace("_", " "), *sizes]), AXES[quantity], tuple(bars)))
    return found


def _width(record: Record) -> str:
    return SAME_PRECISION.get(record.precision, record.precision)


def overview(records: Iterable[Record]) -> Dots:
    """How many times as fast as the first of each record's competitors, every size a dot."""
    rows: dict[str, list[tuple[str, float]]] = {}
    for record in records:
        if record.versus:
            name, versus = record.name.replace("_", " "), record.versus[0]
            competitor = versus.competitor.rpartition(" ")[0]
            if competitor != "pytorch":
                name += f" against {competitor}"
            rows.setdefault(name, []).append((record.backend, versus.ratio.median))
    title, x = "Faster or slower", "times as fast as PyTorch, or as the library named"
    return Dots(title, x, {name: tuple(values) for name, values in rows.items()})


def roofline_points(ops: Sequence[Record]) -> dict[str, list[Record]]:
    """By precision, each op's records at its largest size."""
    found: dict[str, list[Record]] = {}
    for record in ops:
        if {"gigabytes_per_second", "gigaflops_per_second"} <= set(record.rates):
            found.setdefault(record.precision, []).append(record)
    for precision, records in found.items():
        largest = {r.name: max(sum(o.sizes.values()) for o in records if o.name == r.name) for r in records}
        found[precision] = [r for r in records if sum(r.sizes.values()) == largest[r.name]]
    return found
