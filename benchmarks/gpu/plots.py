"""Pictures of the records: one PNG for each kind of task, every competitor in it, won or lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmfast.benchmarking.records import Record

Value = Callable[[Record], float | None]


def draw(records: Sequence[Record], folder: Path, title: str) -> list[Path]:
    """Writes the pictures for which there are records. `ImportError` without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    good = [record for record in records if record.problem is None]
    written = []
    for way in ("forward", "backward"):
        found = [r for r in good if r.name == f"causal_attention {way}"]
        written += _lines(folder / f"attention_{way}.png", f"causal attention, {way}: {title}", found, "tokens",
                          "head_dim", "TFLOP/s", _rate("gigaflops_per_second", 1e-3))  # fmt: skip
        found = [r for r in good if r.name == f"layer_norm {way}"]
        written += _lines(folder / f"layer_norm_{way}.png", f"LayerNorm, {way}: {title}", found, "width", "rows",
                          "GB/s", _rate("gigabytes_per_second"))  # fmt: skip
    found = [r for r in good if r.group == "decode"]
    written += _bars(folder / "decode.png", f"decoding GPT-2 124M: {title}", found, "batch")
    found = [r for r in good if r.group == "memory" and "batch" not in r.sizes]
    for name in dict.fromkeys(r.name for r in found):
        file = folder / f"memory_{name.split()[0]}.png"
        mine = [r for r in found if r.name == name]
        written += _lines(file, f"most memory, {name}: {title}", mine, "tokens", "", "MiB", _megabytes)
    found = [r for r in good if r.group == "training"]
    written += _bars(folder / "training.png", f"training GPT-2 124M: {title}", found)
    return written


def _rate(name: str, factor: float = 1.0) -> Value:
    return lambda record: record.rates[name] * factor if name in record.rates else None


def _megabytes(record: Record) -> float | None:
    return None if record.bytes is None else record.bytes / 2**20


def _lines(
    file: Path, title: str, records: Sequence[Record], x: str, panel: str, unit: str, value: Value
) -> list[Path]:  # fmt: skip
    """A line for each competitor over the size `x`, a panel for each value of the size `panel`."""
    import matplotlib.pyplot as plt

    if not records:
        return []
    panels = sorted({r.sizes.get(panel, 0) for r in records})
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.2), squeeze=False, sharey=True)
    names = list(dict.fromkeys(r.backend for r in records))
    for axis, at in zip(axes[0], panels, strict=True):
        for number, name in enumerate(names):
            mine = [r for r in records if r.backend == name and r.sizes.get(panel, 0) == at]
            points = sorted((r.sizes[x], y) for r in mine if (y := value(r)) is not None)
            if points:
                ours = name.startswith("triton")
                style: dict[str, Any] = {"marker": "o" if ours else ".", "linewidth": 2.5 if ours else 1.2}
                axis.plot(*zip(*points, strict=True), label=name, color=f"C{number % 10}", **style)
        axis.set_xscale("log", base=2)
        ticks = sorted({r.sizes[x] for r in records})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set(xlabel=x, ylabel=unit, title=f"{panel} {at}".replace("_", " ") if len(panels) > 1 else "")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(bottom=0)  # of all panels, which share it
    axes[0][-1].legend(fontsize="small")
    return _saved(figure, file, title)


def _bars(file: Path, title: str, records: Sequence[Record], panel: str = "") -> list[Path]:
    """Tokens a second of each competitor, a panel for each value of the size `panel`."""
    import matplotlib.pyplot as plt

    if not records:
        return []
    panels = sorted({r.sizes.get(panel, 0) for r in records})
    names = list(dict.fromkeys(_who(r) for r in records))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.5 + 4 * len(panels), 0.35 * len(names) + 1.6), squeeze=False, sharey=True
    )
    for axis, at in zip(axes[0], panels, strict=True):
        mine = {_who(r): r.rates["tokens_per_second"] for r in records if r.sizes.get(panel, 0) == at}
        colors = ["C1" if name.startswith("triton") else "C0" for name in names]
        bars = axis.barh(names, [mine.get(name, 0.0) for name in names], color=colors)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
        axis.set(xlabel="tokens/s", title=f"{panel} {at}" if panel else "")
        axis.margins(x=0.25)
    axes[0][0].invert_yaxis()
    return _saved(figure, file, title)


def _who(record: Record) -> str:
    return f"{record.backend}, {record.precision}"


def _saved(figure: Any, file: Path, title: str) -> list[Path]:
    import matplotlib.pyplot as plt

    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return [file]
