"""The pictures of the lessons: heat, curves, bars, points, rooflines. One look for all; each returns its figure.

Colours are those of the benchmarks' plots, which the colour-blind can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmfast.benchmarking.drawing import LIGHT, MARKERS

COLOURS = [LIGHT[f"series{i}"] for i in range(5)]
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "legend.frameon": False,
}


def panels(count: int, width: float = 3.2, height: float = 2.8, columns: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, row by row."""
    columns = min(count, columns)
    rows = -(-count // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
        axes = list(grid.flat)
        for ax in axes[count:]:
            ax.set_visible(False)
    return figure, axes[:count]


def heats(
    matrices: Mapping[str, Any],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    numbers: bool | None = None,
    width: float = 3.2,
    height: float = 2.9,
    across: int = 4,
    colours: str | None = None,
) -> Figure:
    """A panel for each (R, C) matrix: dark is large; blue and red where there are negative numbers.

    `numbers` writes each value into its field, by default where there are few enough of them.
    """
    figure, axes = panels(len(matrices), width, height, across)
    with plt.rc_context(STYLE):
        for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
            values = np.array(matrix, dtype=float)
            finite = values[np.isfinite(values)]
            signed = bool((finite < 0).any())
            top = float(np.abs(finite).max(initial=1e-9))
            chosen = colours or ("RdBu" if signed else "Blues")
            ax.imshow(values, cmap=chosen, vmin=-top if signed else 0, vmax=top, aspect="auto")
            ax.set_title(title)
            for axis, names in ((ax.yaxis, rows), (ax.xaxis, columns)):
                if names is not None:
                    axis.set_ticks(range(len(names)), names)
            if columns is not None and max(map(len, columns), default=0) > 2:
                ax.tick_params(axis="x", rotation=60)
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
            if numbers if numbers is not None else values.size <= 60:
                for (row, column), value in np.ndenumerate(values):
                    dark = np.isfinite(value) and abs(value) > 0.6 * top
                    text = f"{value:.2f}".replace("0.", ".", 1) if np.isfinite(value) else "−∞"
                    ax.text(column, row, text, ha="center", va="center", size=7.5, color="white" if dark else "black")
    return figure


def curves(
    lines: Mapping[str, Any],
    x: str = "",
    y: str = "",
    title: str = "",
    log: str = "",
    marks: bool = False,
    level: Mapping[str, float] | None = None,
    width: float = 6.0,
    height: float = 3.2,
    ax: Axes | None = None,
) -> Figure:
    """A line for each of `lines`, ys or (xs, ys), its name at its end. `log` is "x", "y" or "xy"; `level` draws
    horizontal lines with a name."""
    if ax is None:
        _, (ax,) = panels(1, width, height)
    with plt.rc_context(STYLE):
        ends = []
        for i, (name, line) in enumerate(lines.items()):
            xs, ys = line if isinstance(line, tuple) else (range(len(line)), line)
            xs, ys = np.array(xs, dtype=float), np.array(ys, dtype=float)
            colour = COLOURS[i % len(COLOURS)]
            style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4} if marks else {}
            ax.plot(xs, ys, color=colour, linewidth=1.6, linestyle="-" if i < len(COLOURS) else "--", **style)
            ends.append((name, xs[-1], ys[-1], colour))
        for name, height_ in (level or {}).items():
            ax.axhline(height_, color=LIGHT["muted"], linewidth=1, linestyle=":")
            ax.annotate(
                name, (0.01, height_), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                color=LIGHT["muted"], size=8,
            )  # fmt: skip
        if "x" in log:
            ax.set_xscale("log")
        if "y" in log:
            ax.set_yscale("log")
        if "x" in log and marks:  # the places that were measured, in plain numbers
            ax.set_xticks(xs, [f"{tick:g}" for tick in xs])
            ax.minorticks_off()
        ax.set(xlabel=x, ylabel=y)
        ax.set_title(title)
        _names_at_ends(ax, ends)
    return ax.figure  # type: ignore[return-value]


def _names_at_ends(ax: Axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Each name beside the last point of its line, moved apart where two would meet."""
    ax.figure.canvas.draw()
    heights = [float(ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1]) for _, x, y, _ in ends]
    taken: list[float] = []
    gap = 0.24 / (ax.get_window_extent().height / 100)
    for (name, x, _, colour), height in sorted(zip(ends, heights, strict=True), key=lambda pair: pair[1]):
        height = max([height, *(h + gap for h in taken[-1:])])
        taken.append(height)
        at = ax.transData.inverted().transform(ax.transAxes.transform((0, height)))[1]
        ax.text(x, at, f"  {name}", color=colour, va="center", size=8.5, clip_on=False)


def bars(values: Mapping[str, float], title: str = "", x: str = "", form: str = "{:.3g}", width: float = 6.0) -> Figure:
    """A horizontal bar for each of `values`, with its figure behind it."""
    figure, (ax,) = panels(1, width, 0.6 + 0.27 * len(values))
    with plt.rc_context(STYLE):
        names = list(values)
        ax.barh(range(len(names)), list(values.values()), color=COLOURS[0], height=0.7)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        for i, value in enumerate(values.values()):
            ax.annotate(form.format(value), (value, i), (4, 0), textcoords="offset points", va="center", size=8.5)
        ax.margins(x=0.15)
        ax.tick_params(axis="y", length=0)
        ax.set(xlabel=x)
        ax.set_title(title)
    return figure


def points(
    places: Any, names: Sequence[str], title: str = "", colours: Sequence[int] | None = None, width: float = 5.5,
    height: float = 4.5, arrows: bool = False,
) -> Figure:  # fmt: skip
    """Named points in the plane: `places` is (N, 2). `arrows` draws them from the origin."""
    figure, (ax,) = panels(1, width, height)
    with plt.rc_context(STYLE):
        at = np.array(places, dtype=float)
        colour = [COLOURS[c] for c in (colours if colours is not None else [0] * len(names))]
        if arrows:
            zero = np.zeros(len(at))
            ax.quiver(zero, zero, at[:, 0], at[:, 1], color=colour, angles="xy", scale_units="xy", scale=1, width=0.006)
        ax.scatter(at[:, 0], at[:, 1], color=colour, s=12)
        for name, place in zip(names, at, strict=True):
            ax.annotate(name, place, (3, 3), textcoords="offset points", size=8.5)
        ax.margins(0.12)
        ax.set_title(title)
    return figure


def roofline(
    bandwidth: float, peak: float, marks: Mapping[str, tuple[float, float]], title: str = "", width: float = 7.0
) -> Figure:
    """The roofline (Williams, Waterman and Patterson, 2009): GFLOP/s over FLOP a byte.

    `bandwidth` is in GB/s, `peak` in GFLOP/s; a mark is (FLOP a byte, GFLOP/s reached).
    """
    figure, (ax,) = panels(1, width, 4.2)
    with plt.rc_context(STYLE):
        xs, rates = [intensity for intensity, _ in marks.values()], [rate for _, rate in marks.values()]
        low, high = min(*xs, peak / bandwidth) / 3, max(*xs, peak / bandwidth) * 6
        bottom, top = min(rates) / 2, peak * 4
        ax.set(xlim=(low, high), ylim=(bottom, top))
        line = np.geomspace(low, high, 200)
        ax.plot(line, np.minimum(line * bandwidth, peak), color=LIGHT["ink"], linewidth=1.6)
        ax.text(peak / bandwidth, peak * 1.1, f"arithmetic: {peak:,.0f} GFLOP/s", size=8.5)
        start = max(low, bottom / bandwidth) * 1.3
        ax.text(
            start, start * bandwidth * 1.25, f"memory: {bandwidth:,.0f} GB/s", size=8.5, rotation_mode="anchor",
            rotation=math.degrees(math.atan(bandwidth)), transform_rotates_text=True,
        )  # fmt: skip
        taken, gap = 0.0, (top / bottom) ** 0.055
        for i, (name, (intensity, rate)) in enumerate(sorted(marks.items(), key=lambda mark: mark[1][1])):
            share = rate / min(peak, intensity * bandwidth)
            taken = max(rate, taken * gap)
            ax.plot(intensity, rate, MARKERS[i % 5], color=COLOURS[i % 5], markersize=7)
            ax.plot([intensity, intensity * 1.15], [rate, taken], color=COLOURS[i % 5], linewidth=0.8)
            ax.text(
                intensity * 1.18,
                taken,
                f"{name}: {share:.{1 if share < 0.02 else 0}%}",
                size=8.5,
                va="center",
                color=COLOURS[i % 5],
            )
        ax.set(xscale="log", yscale="log", xlabel="FLOP for each byte moved", ylabel="GFLOP/s")
        ax.set_title(title)
    return figure
