"""The roofline (Williams, Waterman and Patterson, 2009): what an op reaches beside what bounds it.

To the right an op computes more for each byte that it moves. Under the slope memory is the limit, under the level it is
arithmetic. Marks above each other are one op: its work is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmfast.benchmarking.drawing import LABEL, MARKERS, apart, legend, series_of, subplots, title_style
from llmfast.benchmarking.limits import best
from llmfast.benchmarking.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 5.0  # FLOP a byte this many times as many begin another column of names


def roofline_figure(points: dict[str, list[Record]], runs: Sequence[dict[str, Any]], theme: dict[str, str]) -> Figure:
    """A panel for each precision of `points`. `runs` are measurements of the machine's limits."""
    columns = min(len(points), 2)
    rows = -(-len(points) // columns)
    size = (6.2 * columns, 4.4 * rows + 0.3)
    figure, axes = subplots(rows, columns, size, "Roofline: each operation at its largest size", theme)
    series = series_of(record.backend for records in points.values() for record in records)
    for ax in axes[len(points) :]:
        ax.set_visible(False)
    for ax, (precision, records) in zip(axes, points.items(), strict=False):
        ax.set(xscale="log", yscale="log", xlabel="FLOP for each byte", ylabel="GFLOP/s")
        ax.set_title(precision, **title_style(theme))
        intensities, rates = [_intensity(r) for r in records], [_rate(r) for r in records]
        levels = {name: best(runs, name) for name in dict.fromkeys(("fp32", precision))}
        top = max([*rates, *(level for level in levels.values() if level)])
        ax.set_xlim(min(intensities) / 2, max(intensities) * 50)  # with room for the names of the last column
        ax.set_ylim(min(rates) / 2, top * 2)
        _roofs(ax, levels, best(runs, "copy") or best(runs, "read"), precision, theme)
        for record in records:
            number = series[record.backend]
            style = {"marker": MARKERS[number], "markersize": 6, "linestyle": ""}
            ax.plot(_intensity(record), _rate(record), color=theme[f"series{number}"], zorder=4, **style)
        _names(ax, records, theme)
    legend(figure, series, theme, loc="upper right", ncols=len(series))
    return figure


def _roofs(
    ax: Any, levels: dict[str, float | None], bandwidth: float | None, precision: str, theme: dict[str, str]
) -> None:
    low, high = ax.get_xlim()
    style = {"color": theme["muted"], "linewidth": 1.3}
    text = {"color": theme["muted"], "fontsize": 8}
    for name, level in levels.items():
        if level is None:
            continue
        ridge = level / bandwidth if bandwidth else low
        ax.plot([max(low, ridge), high], [level, level], **style)
        said = f"{name} {level:,.0f} GFLOP/s"
        # Below its line where another one is above.
        offset, side = ((4, 3), "bottom") if level == max(filter(None, levels.values())) else ((4, -3), "top")
        ax.annotate(said, (ridge, level), offset, textcoords="offset points", va=side, **text)
    if bandwidth:
        ridge = (levels.get(precision) or ax.get_ylim()[1]) / bandwidth
        ax.plot([low, ridge], [low * bandwidth, ridge * bandwidth], **style)
        ax.text(
            low * 1.3, low * 1.3 * bandwidth * 1.4, f"memory {bandwidth:,.0f} GB/s", rotation_mode="anchor",
            rotation=math.degrees(math.atan(1.4 * bandwidth)), transform_rotates_text=True, **text,
        )  # fmt: skip


def _names(ax: Any, records: Sequence[Record], theme: dict[str, str]) -> None:
    """The name of each op, in columns to the right of ops of about the same intensity."""
    at: dict[str, list[Record]] = {}
    for record in sorted(records, key=_intensity):
        at.setdefault(record.name, []).append(record)
    columns: list[list[str]] = []
    for name, mine in at.items():
        if not columns or _intensity(mine[0]) > GAP * _intensity(at[columns[-1][-1]][0]):
            columns.append([])
        columns[-1].append(name)
    low, high = (math.log(y) for y in ax.get_ylim())
    beneath = {"facecolor": theme["paper"], "edgecolor": "none", "pad": 0.8}  # a roof may pass under a name
    for names in columns:
        right = max(_intensity(at[name][0]) for name in names) * 1.9
        heights = [math.log(math.sqrt(min(map(_rate, at[n])) * max(map(_rate, at[n])))) for n in names]
        for name, height in zip(names, apart([(h - low) / (high - low) for h in heights], LABEL / 1.6), strict=True):
            x, rates = _intensity(at[name][0]), [_rate(record) for record in at[name]]
            y = math.exp(low + height * (high - low))
            ax.plot([x, x], [min(rates), max(rates)], color=theme["muted"], linewidth=0.8, alpha=0.6)
            middle = math.sqrt(min(rates) * max(rates))
            ax.plot([x, right * 0.95], [middle, y], color=theme["muted"], linewidth=0.5, alpha=0.6)
            ax.text(
                right, y, name.replace("_", " "), va="center", fontsize=7.5, color=theme["ink"], bbox=beneath, zorder=3
            )


def _intensity(record: Record) -> float:
    return record.rates["gigaflops_per_second"] / record.rates["gigabytes_per_second"]


def _rate(record: Record) -> float:
    return record.rates["gigaflops_per_second"]
