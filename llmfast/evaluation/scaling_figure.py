"""A ladder of runs and the law fitted to them, as a picture: loss against parameters, tokens and compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmfast.evaluation.scaling import OPERATIONS, Fit, ScalingPoint
from llmfast.files import write_atomic

POINTS = 60  # of a curve


def draw(runs: Sequence[ScalingPoint], fit: Fit, path: str | Path) -> None:
    """Writes a PNG. Points are runs, lines the law; the band holds the middle 80 % of the bootstrap's laws.

    `ImportError` with the command to get matplotlib where it is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('the picture needs matplotlib: pip install "llmfast-kernels[train]"') from None
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_size, by_length, by_compute = figure.subplots(1, 3, sharey=True)
    law = fit.law
    sizes, lengths = sorted({run.parameters for run in runs}), sorted({run.tokens for run in runs})

    for axes, name, groups, key, other, law_of in (
        (by_size, "parameters", lengths, "parameters", "tokens", lambda n, d: law.loss(n, d)),
        (by_length, "training tokens", sizes, "tokens", "parameters", lambda d, n: law.loss(n, d)),
    ):
        for number, group in enumerate(groups):
            color = _shade(number, len(groups))
            points = sorted((getattr(run, key), run.loss) for run in runs if getattr(run, other) == group)
            axes.plot(*zip(*points, strict=True), "o", color=color, markersize=4, label=_short(group))
            line = _spread(sizes if key == "parameters" else lengths)
            axes.plot(line, [law_of(x, group) for x in line], color=color, linewidth=1)
        axes.legend(title=other, fontsize=8, title_fontsize=8)
        _label(axes, name)
        axes.set_xticks(sizes if key == "parameters" else lengths)
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.xaxis.set_minor_formatter("")

    for number, size in enumerate(sizes):
        points = sorted((run.compute, run.loss) for run in runs if run.parameters == size)
        by_compute.plot(*zip(*points, strict=True), "o-", color=_shade(number, len(sizes)), markersize=4, linewidth=0.6)
    line = _spread([run.compute for run in runs])
    by_compute.plot(line, [law.loss(*law.optimal(c)) for c in line], "k--", linewidth=1, label="the best division of C")
    if fit.samples:
        band = [fit.interval(_best_loss(c)) for c in line]
        by_compute.fill_between(line, *zip(*band, strict=True), color="k", alpha=0.12, linewidth=0)
    by_compute.legend(fontsize=8)
    _label(by_compute, f"C = {OPERATIONS} · parameters · tokens, operations")
    by_size.set_ylabel("validation loss, nats a token")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def _best_loss(compute: float) -> Callable[[Any], float]:
    return lambda law: law.loss(*law.optimal(compute))


def _spread(values: Sequence[float]) -> list[float]:
    """Points at equal distances of their logarithms, from the smallest value to the largest."""
    low, high = math.log(min(values)), math.log(max(values))
    return [math.exp(low + (high - low) * i / (POINTS - 1)) for i in range(POINTS)]


def _shade(number: int, count: int) -> tuple[float, float, float]:
    """From light to dark blue."""
    share = (number + 1) / count
    return 0.75 - 0.7 * share, 0.85 - 0.55 * share, 0.95 - 0.35 * share


def _label(axes: Any, name: str) -> None:
    axes.set(xlabel=name, xscale="log")
    axes.grid(alpha=0.3, which="both")


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # what three digits would round up to it
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
