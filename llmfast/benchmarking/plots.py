"""The pictures of a run: which there are, and what each shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.benchmarking.drawing import (
    DARK,
    LIGHT,
    Bar,
    Bars,
    Dots,
    Line,
    Panel,
    bars_figure,
    dots_figure,
    lines_figure,
)
from llmfast.benchmarking.records import Record, Results
from llmfast.benchmarking.roofline import roofline_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160

Draw = Callable[[dict[str, str]], "Figure"]  # in a theme

# What a rate is called on an axis, and what changes along the other one.
AXES = {
    "tokens_per_second": "tokens/s",
    "megabytes_per_second": "MB/s of text",
    "gigabytes_per_second": "GB/s",
    "gigaflops_per_second": "GFLOP/s",
    "seconds": "seconds",
    "bytes": "MB",
}
SIZES = {
    "tokens": "tokens",
    "context": "tokens before",
    "batch": "sequences at once",
    "bytes": "bytes of text",
    "vocabulary": "size of the vocabulary",
}
# A peer's name for a precision, and ours of the same width.
SAME_PRECISION = {"f32": "fp32", "float32": "fp32", "q8_0": "int8", "q4_0": "int4", "int4-all": "int4"}


def plots(results: Results) -> dict[str, Draw]:
    """Every picture that these results give, by the name of its file."""
    found: dict[str, Draw] = {}
    if any(record.versus for record in results.records):
        found["overview"] = functools.partial(dots_figure, overview(results.records))
    ops = [record for record in results.of("ops") if record.seconds]
    for op in dict.fromkeys(record.name.rpartition(" ")[0] for record in ops):
        panels = [panel for record_name in _names(ops, op) for panel in _by_precision(ops, record_name)]
        _add(found, f"ops-{op}", op.replace("_", " "), panels)
    if points := roofline_points(ops):
        found["roofline"] = functools.partial(roofline_figure, points, measurements(results))
    for group, title, rate in (
        ("prefill", "Reading a prompt", "tokens_per_second"),
        ("decode", "Decoding, a token at a time", "tokens_per_second"),
        ("training", "A step of training", "tokens_per_second"),
        ("tokenizer", "Tokenizers", "megabytes_per_second"),
    ):
        for model in dict.fromkeys(record.model for record in results.of(group)):
            mine = [r for r in results.of(group) if r.model == model and r.seconds]
            panels = [p for name in dict.fromkeys(r.name for r in mine) for p in _by_precision(mine, name, rate)]
            _add(found, "-".join(filter(None, (group, model))), " of ".join(filter(None, (title, model))), panels)
    for model in dict.fromkeys(record.model for record in results.of("generate")):
        mine = [r for r in results.of("generate") if r.model == model and r.seconds]
        _add(found, f"generate-{model}", f"A whole text by {model}", _with_and_without_cache(mine))
    memory = [record for record in results.of("memory") if record.bytes]
    _add(
        found,
        "memory",
        "The most memory at once",
        [p for n in _each(memory) for p in _by_precision(memory, n, "bytes")],
    )
    for name, title, bars in (
        ("memory-weights", "Memory of a model, by precision", _weights(memory)),
        ("latency", "Until something happens", _latency(results.of("latency"))),
        ("peers", "GPT-2 124M beside other libraries", _peers(results.of("peers"))),
    ):
        if bars:
            found[name] = functools.partial(bars_figure, title, bars)
    return found


def measurements(results: Results) -> list[dict[str, Any]]:
    """The machine's limits, measured once or several times in a run."""
    return [results.limits] if "threads" in results.limits else list(results.limits.values())


def draw(results: Results, name: str, path: str | Path, dark: bool = False) -> None:
    """One picture to a file, as its ending says: .png or .svg. `ValueError` where there is none of that name."""
    require_matplotlib()
    there = plots(results)
    if name not in there:
        raise ValueError(f"these results give no picture {name!r}; they give {', '.join(there) or 'none'}")
    there[name](DARK if dark else LIGHT).savefig(path, dpi=DPI)


def require_matplotlib() -> None:
    """One clear line where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'llmfast-kernels[bench]'") from None


def overview(records: Iterable[Record]) -> Dots:
    """How many times as fast as the first of each record's competitors, every size a dot."""
    rows: dict[str, list[tuple[str, float]]] = {}
    for record in records:
        if record.versus:
            name, versus = record.name.replace("_", " "), record.versus[0]
            if record.group in ("peers", "tokenizer"):
                name += f" against {versus.competitor.rpartition(' ')[0]}"
            rows.setdefault(name, []).append((record.backend, versus.ratio.median))
    title, x = "Faster or slower", "times as fast as PyTorch, or as the library named"
    return Dots(title, x, {name: tuple(values) for name, values in rows.items()})


def _add(found: dict[str, Draw], name: str, title: str, panels: Sequence[Panel]) -> None:
    if panels:
        found[name] = functools.partial(lines_figure, title, panels)


def _names(records: Iterable[Record], op: str) -> list[str]:
    return list(dict.fromkeys(r.name for r in records if r.name.rpartition(" ")[0] == op))


def _each(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.name for record in records))


def _by_precision(records: Iterable[Record], name: str, quantity: str | None = None) -> list[Panel]:
    """A panel for each precision, model and size that changes; none where nothing does."""
    mine = [record for record in records if record.name == name]
    panels = []
    for precision in dict.fromkeys(record.precision for record in mine):
        for model in dict.fromkeys(record.model for record in mine):
            these = [record for record in mine if (record.precision, record.model) == (precision, model)]
            title = ", ".join(part for part in (name.replace("_", " "), precision) if part != "–")
            panels += [_panel(title, over, quantity or _rate(over[1])) for over in _varying(these)]
    return panels


def _varying(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """For each size that takes several values, the records that differ in it alone: the others are at their least."""
    values = {size: sorted({r.sizes[size] for r in records if size in r.sizes}) for size in SIZES}
    changing = [size for size, found in values.items() if len(found) > 1]
    found = []
    for size in changing:
        others = [other for other in changing if other != size]
        these = [r for r in records if all(r.sizes.get(other) == values[other][0] for other in others)]
        if len({r.sizes[size] for r in these}) > 1:
            found.append((size, sorted(these, key=lambda r: r.sizes[size])))
    return found


def _rate(records: Sequence[Record]) -> str:
    """GB/s for an op that memory bounds, GFLOP/s for one that arithmetic bounds."""
    return "gigabytes_per_second" if records[-1].limit in ("read", "copy") else "gigaflops_per_second"


def _panel(title: str, over: tuple[str, list[Record]], quantity: str) -> Panel:
    size, records = over
    lines = []
    for backend in dict.fromkeys(record.backend for record in records):
        points = [_point(record, size, quantity) for record in records if record.backend == backend]
        lines.append(Line(backend, backend, tuple(points)))
    # What bounds the work gives the same figure from each competitor's share of it.
    limit = {r.sizes[size]: _value(r, quantity) / r.share_of_limit for r in records if r.share_of_limit}
    bounded = quantity.endswith("per_second") and len(limit) > 1
    return Panel(
        title,
        SIZES[size],
        AXES[quantity],
        tuple(lines),
        tuple(limit.items()) if bounded else (),
        log=quantity == "bytes",
    )


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
        return record.seconds.median if record.seconds else 0.0
    return record.rates.get(quantity, 0.0)


def _with_and_without_cache(records: Sequence[Record]) -> list[Panel]:
    """Seconds over tokens, both logarithmic: a straight line of slope 1 with the cache, steeper without."""
    panels = []
    for precision in dict.fromkeys(record.precision for record in records):
        lines = []
        for backend in dict.fromkeys(record.backend for record in records):
            for name in _each(records):
                these = [r for r in records if (r.precision, r.backend, r.name) == (precision, backend, name)]
                cached = "uncached" not in name
                points = [_point(r, "tokens", "seconds") for r in sorted(these, key=lambda r: r.sizes["tokens"])]
                if len(points) > 1:
                    label = f"{backend}, {'cached' if cached else 'uncached'}"
                    lines.append(Line(label, backend, tuple(points), dashed=not cached))
        if lines:
            panels.append(Panel(precision, "new tokens", "seconds", tuple(lines), log=True))
    return panels


def _weights(records: Sequence[Record]) -> list[Bars]:
    """A model's memory while it decodes, in each precision."""
    found = []
    for model in dict.fromkeys(r.model for r in records if r.name == "decode"):
        mine = [r for r in records if (r.name, r.model) == ("decode", model)]
        bars = [
            Bar(f"{r.backend} {r.precision}", r.backend, (r.bytes or 0) / 1e6, f"{(r.bytes or 0) / 1e6:,.0f}")
            for r in mine
        ]
        found.append(Bars(f"{model}, decoding", "MB", tuple(bars)))
    return found


def _latency(records: Sequence[Record]) -> list[Bars]:
    found = []
    timed = [record for record in records if record.seconds]
    for name, tokens in dict.fromkeys((r.name, r.sizes.get("tokens")) for r in timed):
        bars = []
        for r in timed:
            if (r.name, r.sizes.get("tokens")) == (name, tokens) and r.seconds:
                ms = 1000 * r.seconds.median
                label = r.backend if r.precision == "–" else f"{r.backend} {r.precision}"
                bars.append(Bar(label, r.backend, ms, f"{ms:,.3g} ms"))
        found.append(Bars(name if tokens is None else f"{name}, after {tokens} tokens", "milliseconds", tuple(bars)))
    return found


def _peers(records: Sequence[Record]) -> list[Bars]:
    """For each case every engine: those of a precision together, the fastest first; a tick at what memory allows."""
    rates = [record for record in records if "tokens_per_second" in record.rates]
    found = []
    order = list(dict.fromkeys(map(_width, rates)))
    for task in dict.fromkeys((r.name, *r.sizes.items()) for r in rates):
        mine = [r for r in rates if (r.name, *r.sizes.items()) == task]
        mine.sort(key=lambda r: (order.index(_width(r)), -r.rates["tokens_per_second"]))
        bars = []
        for r in mine:
            rate = r.rates["tokens_per_second"]
            share = f", {r.share_of_limit:.0%} of the limit" if r.share_of_limit else ""
            limit = rate / r.share_of_limit if r.share_of_limit else None
            bars.append(Bar(f"{r.backend} {r.precision}", r.backend, rate, f"{rate:,.0f}{share}", limit))
        sizes = [f"{value} {SIZES[size]}" for size, value in mine[0].sizes.items() if size != "batch"]
        found.append(Bars(", ".join([mine[0].name, *sizes]), "tokens/s", tuple(bars)))
    return found


def _width(record: Record) -> str:
    return SAME_PRECISION.get(record.precision, record.precision)


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
