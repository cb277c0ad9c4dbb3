"""What a run measured: `metrics.jsonl`, a line a step, a picture of its curves, and TensorBoard's event files.

{"step": 1, "loss": 4.2, "lr": 0.00002, "gradient_norm": 2.1}
{"step": 250, "validation_loss": 2.1, "bits_per_byte": 3.03}
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmfast.files import write_atomic

METRICS, CURVES = "metrics.jsonl", "curves.png"
HOW_TO_GET_TENSORBOARD = "tensorboard is not installed: pip install tensorboard, or leave tensorboard = false"


class Metrics:
    """The measurements of the run in `directory`, up to `step`: what was written after it is taken back."""

    def __init__(self, directory: Path, step: int = 0, tensorboard: bool = False):
        self.path = directory / METRICS
        self.rows = [row for row in read(self.path) if row["step"] <= step]
        write_atomic(self.path, "".join(map(_line, self.rows)).encode())
        self._events = _event_writer(directory / "tensorboard", step) if tensorboard else None

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows, each with its "step" (how many steps were done), without what is no number."""
        new = [{name: value for name, value in row.items() if math.isfinite(value)} for row in rows]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(map(_line, new))
        self.rows += new
        if self._events is not None:
            for row in new:
                for name, value in row.items():
                    if name != "step":
                        self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def draw(self) -> Path | None:
        """The curves as a PNG beside the measurements; None where matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        steps, losses = _series(self.rows, "loss")
        axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training, each batch")
        axes.plot(steps, _smoothed(losses), color="C0", label="training, smoothed")
        evaluated, validation = _series(self.rows, "validation_loss")
        axes.plot(evaluated, validation, "o-", color="C1", markersize=4, label="validation")
        if losses:
            axes.set_ylim(top=top_of(losses, validation))
        axes.set(xlabel="step", ylabel="loss, nats")
        axes.grid(alpha=0.3)
        axes.legend()
        path = self.path.with_name(CURVES)
        write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
        return path


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of measurements, up to one that was cut off when its process was killed."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError):
            break
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def top_of(losses: Sequence[float], validation: Sequence[float]) -> float:
    """Up to where curves are shown: all evaluations, and the losses without the first fiftieth, which are far above."""
    seen = [loss for loss in (*losses[len(losses) // 50 :], *validation) if math.isfinite(loss)]
    return max(seen, default=1.0) * 1.02 + 1e-9


def _smoothed(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours, about a fortieth of all."""
    sums, reach = [0.0, *itertools.accumulate(values)], len(values) // 80
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _event_writer(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(HOW_TO_GET_TENSORBOARD) from None
    return SummaryWriter(str(directory), purge_step=step + 1)  # events after the step are taken back
