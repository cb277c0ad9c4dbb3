"""The pictures of a run: which there are, and drawing one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.benchmarking.drawing import DARK, LIGHT, Bars, Panel, bars_figure, dots_figure, lines_figure
from llmfast.benchmarking.panels import bar_panels, cache_bars, cache_panels, line_panels, overview, roofline_points
from llmfast.benchmarking.records import Record, Results
from llmfast.benchmarking.roofline import roofline_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160

Draw = Callable[[dict[str, str]], "Figure"]  # in a theme

# Groups whose models each have a picture, and what it shows.
OVER_SIZES = {
    "prefill": ("Reading a prompt", "tokens_per_second"),
    "decode": ("Decoding, a token at a time", "tokens_per_second"),
    "training": ("A step of training", "tokens_per_second"),
    "tokenizer": ("Tokenizers", "megabytes_per_second"),
}


def plots(results: Results) -> dict[str, Draw]:
    """Every picture that these results give, by the name of its file."""
    found: dict[str, Draw] = {}

    def add(name: str, title: str, panels: Sequence[Panel], bars: Sequence[Bars] = ()) -> None:
        """Lines, or bars where there are none."""
        if panels:
            found[name] = functools.partial(lines_figure, title, panels)
        elif bars:
            found[name] = functools.partial(bars_figure, title, bars)

    if any(record.versus for record in results.records):
        found["overview"] = functools.partial(dots_figure, overview(results.records))
    ops = [record for record in results.of("ops") if record.seconds]
    if points := roofline_points(ops):
        found["roofline"] = functools.partial(roofline_figure, points, measurements(results))
    for op in dict.fromkeys(record.name.rpartition(" ")[0] for record in ops):
        mine = [record for record in ops if record.name.rpartition(" ")[0] == op]
        add(f"ops-{op}", op.replace("_", " ").capitalize(), line_panels(mine), bar_panels(mine, "seconds"))
    for group, (title, rate) in OVER_SIZES.items():
        for model, mine in _by_model(results, group).items():
            add(*_named(group, title, model), line_panels(mine, rate), bar_panels(mine, rate))
    for model, mine in _by_model(results, "generate").items():
        title = "A whole text, with the cache and without"
        add(*_named("generate", title, model), cache_panels(mine), cache_bars(mine))
    memory = [record for record in results.of("memory") if record.bytes]
    add("memory", "The most memory at once", line_panels(memory, "bytes"))
    decoding = [record for record in memory if record.name == "decode"]
    add("memory-weights", "The most memory at once, by precision", (), bar_panels(decoding, "bytes"))
    latency = [record for record in results.of("latency") if record.seconds]
    add("latency", "Until something happens", (), bar_panels(latency, "seconds"))
    peers = [record for record in results.of("peers") if record.rates]
    add("peers", "GPT-2 124M beside other libraries", (), bar_panels(peers, "tokens_per_second"))
    return found


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


def measurements(results: Results) -> list[dict[str, Any]]:
    """The machine's limits, measured once or several times in a run."""
    return [results.limits] if "threads" in results.limits else list(results.limits.values())


def _by_model(results: Results, group: str) -> dict[str | None, list[Record]]:
    found: dict[str | None, list[Record]] = {}
    for record in results.of(group):
        if record.seconds:
            found.setdefault(record.model, []).append(record)
    return found


def _named(group: str, title: str, model: str | None) -> tuple[str, str]:
    """A file's name and a title."""
    return (group, title) if model is None else (f"{group}-{model}", f"{title}: {model}")
