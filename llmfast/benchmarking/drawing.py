"""Lines, bars and dots with their names beside them, in colours that the colour-blind can tell apart.

What a plot shows is plain data (`Panel`, `Bars`, `Dots`); here it becomes a matplotlib figure. A name stands at its
line or bar, not in a legend, and each of a plot's competitors has a marker as well as a colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange, teal, magenta and grey: apart in lightness and on the blue-yellow axis, so for any colour vision. All of
# a theme's colours are different, because a page replaces them by its own (`as_svg`).
LIGHT = {
    **{"ink": "#1f2328", "muted": "#59636d", "grid": "#d9dee3", "paper": "#ffffff"},
    **{"series0": "#0a62a8", "series1": "#b8510d", "series2": "#00786b", "series3": "#a8327d", "series4": "#6b7280"},
}
DARK = {
    **{"ink": "#e6edf3", "muted": "#9aa4ae", "grid": "#30363d", "paper": "#0d1117"},
    **{"series0": "#58b0f2", "series1": "#f0945a", "series2": "#3cc8b4", "series3": "#ef82c4", "series4": "#a3abb5"},
}
MARKERS = "osD^v"
# Who has which colour wherever it appears; the others take what is left.
FIXED = {"cpp": 0, "llmfast": 0, "triton": 2, "pytorch": 1, "pytorch compiled": 4}
FIXED |= {"llama.cpp": 1, "CTranslate2": 2, "transformers": 3, "torch": 1, "tokenizers": 1, "tiktoken": 2}

PANEL = (3.5, 2.5)  # inches
LABEL = 0.085  # the height of a name beside a line, as a share of a panel's


def series_of(names: Iterable[str]) -> dict[str, int]:
    """The number of each competitor's colour and marker."""
    names = list(dict.fromkeys(names))
    found = {name: FIXED[name] for name in names if name in FIXED}
    free = [number for number in (3, 2, 4, 1, 0) if number not in found.values()] or [3]
    for i, name in enumerate(name for name in names if name not in FIXED):
        found[name] = free[i % len(free)]
    return found


@dataclass(frozen=True)
class Line:
    """`points` are (x, y, lowest y, highest y). `series` says whose colour it has."""

    name: str
    series: str
    points: tuple[tuple[float, float, float, float], ...]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over one axis. `limit` is (x, y) of what the machine allows."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    limit: tuple[tuple[float, float], ...] = ()
    log: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar from 0 to `value`, before a pale one that reaches to its `limit`; `text` stands after both."""

    name: str
    series: str
    value: float
    text: str
    limit: float | None = None


@dataclass(frozen=True)
class Bars:
    title: str
    x: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Dots:
    """For each row some values around 1, by series."""

    title: str
    x: str
    rows: dict[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)


def lines_figure(title: str, panels: Sequence[Panel], theme: dict[str, str]) -> Figure:
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, (PANEL[0] * columns, PANEL[1] * rows + 0.4), title, theme)
    series = series_of(line.series for panel in panels for line in panel.lines)
    for ax, panel in zip(axes, panels, strict=False):
        _lines(ax, panel, series, theme)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def _lines(ax: Axes, panel: Panel, series: dict[str, int], theme: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for line in panel.lines:
        color, marker = theme[f"series{series[line.series]}"], MARKERS[series[line.series]]
        x, y, low, high = (list(values) for values in zip(*line.points, strict=True))
        style: Any = (0, (4, 2)) if line.dashed else "-"
        hollow = theme["paper"] if line.dashed else color
        ax.plot(x, y, color=color, linestyle=style, marker=marker, markersize=4, markerfacecolor=hollow, linewidth=1.6)
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if panel.limit:
        ax.plot(*zip(*panel.limit, strict=True), color=theme["muted"], linestyle=(0, (1, 1.5)), linewidth=1.4)
    ticks = sorted({point[0] for line in panel.lines for point in line.points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [short(x) for x in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    if panel.log:
        ax.set_yscale("log")
        bottom, top = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if top < 200 * bottom else (1.0,), numticks=12))
        ax.yaxis.set_minor_locator(NullLocator())
    else:  # a band may leave the panel, a line may not
        ax.set_ylim(0, 1.1 * max(y for line in panel.lines for _, y in [*(p[:2] for p in line.points), *panel.limit]))
    ax.yaxis.set_major_formatter(lambda y, _: short(y))
    ax.set(xlabel=panel.x, ylabel=panel.y)
    ax.set_title(panel.title, **title_style(theme))
    ends = [(*line.points[-1][:2], line.name, theme[f"series{series[line.series]}"]) for line in panel.lines]
    if panel.limit:
        ends.append((*panel.limit[-1], "limit", theme["muted"]))
    _name_the_ends(ax, ends)


def _name_the_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Each name to the right of its line's last point, apart from the others, with a hair line where it moved."""
    to_axes = ax.transScale.transform
    (_, bottom), (_, top) = to_axes([(1, ax.get_ylim()[0]), (1, ax.get_ylim()[1])])
    heights = [(to_axes((x, y))[1] - bottom) / (top - bottom) for x, y, _, _ in ends]
    for (x, y, name, color), height in zip(ends, apart(heights, LABEL), strict=True):
        ax.annotate(
            name,
            xy=(x, y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=color,
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def apart(heights: Sequence[float], least: float) -> list[float]:
    """The heights, moved as little as it takes for each two to be `least` apart; in their order, within 0 and 1."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(heights[i], placed[-1] + least) if placed else max(heights[i], 0.0))
    ceiling = 1.0 + least / 2
    for at in range(len(placed) - 1, -1, -1):  # what was pushed out of the top comes back
        placed[at] = min(placed[at], ceiling)
        ceiling = placed[at] - least
    found = [0.0] * len(heights)
    for i, height in zip(order, placed, strict=True):
        found[i] = height
    return found


def bars_figure(title: str, panels: Sequence[Bars], theme: dict[str, str]) -> Figure:
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = -(-len(panels) // columns)
    tallest = max(len(panel.bars) for panel in panels)
    size = (5.2 * columns, rows * (0.7 + 0.24 * tallest) + 0.4)
    figure, axes = subplots(rows, columns, size, title, theme)
    series = series_of(bar.series for panel in panels for bar in panel.bars)
    for ax, panel in zip(axes, panels, strict=False):
        widest = max(max(bar.value, bar.limit or 0.0) for bar in panel.bars)
        for at, bar in enumerate(panel.bars):
            ax.barh(at, bar.limit or 0.0, height=0.72, color=theme["grid"])
            ax.barh(at, bar.value, height=0.72, color=theme[f"series{series[bar.series]}"])
            end = max(bar.value, bar.limit or 0.0) + 0.015 * widest
            ax.text(end, at, bar.text, va="center", fontsize=8, color=theme["ink"])
        ax.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars])
        ax.set_ylim(max(len(panel.bars), tallest) - 0.4, -0.6)
        ax.set_xlim(0, 1.5 * widest)
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.xaxis.set_major_formatter(lambda x, _: short(x))
        ax.set(xlabel=panel.x)
        ax.set_title(panel.title, **title_style(theme))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def dots_figure(dots: Dots, theme: dict[str, str]) -> Figure:
    from matplotlib.ticker import NullLocator

    figure, (ax,) = subplots(1, 1, (8.0, 1.2 + 0.27 * len(dots.rows)), dots.title, theme)
    series = series_of(name for values in dots.rows.values() for name, _ in values)
    ax.set_xscale("log")
    ax.axvline(1, color=theme["ink"], linewidth=1.2)
    for at, values in enumerate(dots.rows.values()):
        for name, value in values:
            color, marker = theme[f"series{series[name]}"], MARKERS[series[name]]
            # Filled where it wins, hollow where it loses.
            face = color if value >= 1 else theme["paper"]
            ax.plot(value, at, marker=marker, color=color, markerfacecolor=face, markersize=5, alpha=0.85)
    low, high = (f([v for values in dots.rows.values() for _, v in values]) for f in (min, max))
    ax.set_xlim(min(0.45, low / 1.2), max(2.2, high * 1.2))
    ticks = [
        t
        for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        if ax.get_xlim()[0] < t < ax.get_xlim()[1]
    ]
    ax.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yticks(range(len(dots.rows)), list(dots.rows))
    ax.set_ylim(len(dots.rows) - 0.4, -0.6)
    ax.set(xlabel=dots.x)
    if len(set(series.values())) > 1:
        legend(ax, series, theme, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def legend(of: Axes | Figure, series: dict[str, int], theme: dict[str, str], **place: Any) -> None:
    """Marks and names, where they can't stand beside each other; names that share a colour share a mark."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=MARKERS[number], color=theme[f"series{number}"], linestyle="", label=", ".join(names))
        for number, names in {n: [name for name in series if series[name] == n] for n in series.values()}.items()
    ]
    of.legend(handles=handles, frameon=False, fontsize=9, labelcolor=theme["ink"], **place)


def subplots(rows: int, columns: int, size: tuple[float, float], title: str, theme: dict[str, str]) -> Any:
    """A figure without a window, its panels in one list, in the theme's colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=size, layout=layout, facecolor=theme["paper"])
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.suptitle(title, color=theme["ink"], fontsize=11, fontweight="bold", x=0.01, ha="left")
    for ax in axes:
        ax.set_facecolor(theme["paper"])
        ax.tick_params(colors=theme["muted"], labelsize=8, which="both")
        ax.grid(True, color=theme["grid"], linewidth=0.6)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme["grid"])
        for text in (ax.xaxis.label, ax.yaxis.label):
            text.set(color=theme["muted"], fontsize=8.5)
    return figure, axes


def title_style(theme: dict[str, str]) -> dict[str, Any]:
    return {"loc": "left", "fontsize": 9.5, "color": theme["ink"]}


def short(value: float) -> str:
    """4096 -> "4k", 0.25 -> "0.25": for axes."""
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1000:
        return f"{value / 1024:g}k" if value % 1024 == 0 else f"{value / 1e3:.3g}k"
    return f"{value:.3g}" if math.isfinite(value) else ""


def as_svg(figure: Figure) -> str:
    """A drawing in the light theme for a page, whose colours are the page's variables (`--ink`, `--series0`, …)."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmfast"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
