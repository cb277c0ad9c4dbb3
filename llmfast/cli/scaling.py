"""What `llmfast eval scaling` does: a ladder of runs, a fit, two tables and a picture."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from llmfast.cli.common import fail
from llmfast.cli.progress import progress_bars
from llmfast.evaluation.ladder import FULL, QUICK, Interrupted, Ladder, Trained, climb, cost
from llmfast.evaluation.scaling import Fit, ScalingLaw, ScalingPoint, fit
from llmfast.evaluation.scaling_figure import draw
from llmfast.files import write_atomic
from llmfast.training.manifest import Manifest
from llmfast.training.trainer import Diverged

UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
CONSTANTS: dict[str, Callable[[ScalingLaw], float]] = {
    name: operator.attrgetter(name) for name in ("E", "A", "alpha", "B", "beta")
}


def run_scaling(
    files: Sequence[Path],
    out: Path,
    quick: bool,
    shapes: str | None,
    tokens: str | None,
    settings: Sequence[str],
    resamples: int,
    as_json: bool,
) -> None:
    ladder = QUICK if quick else FULL
    pairs = dict(_pair(text) for text in settings)
    ladder = Ladder(
        ladder.shapes if shapes is None else tuple(map(_shape, shapes.split(","))),
        ladder.tokens if tokens is None else tuple(map(_number, tokens.split(","))),
        {**ladder.settings, **pairs},
    )
    if len(set(ladder.shapes)) < 3 or len(set(ladder.tokens)) < 3:
        raise ValueError("a scaling law needs three shapes and three numbers of tokens at least")
    done = _climb(files, out, ladder)
    fitted = _fit([trained.run for trained in done], resamples)
    record = _record(done, fitted)
    write_atomic(out / "scaling.json", (json.dumps(record, indent=2) + "\n").encode())
    try:
        draw([trained.run for trained in done], fitted, out / "scaling.png")
    except ImportError as error:
        click.echo(f"note: {error}", err=True)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        _show(done, fitted, out)


def _climb(files: Sequence[Path], out: Path, ladder: Ladder) -> list[Trained]:
    console = Console(stderr=True)
    rungs = ladder.rungs()
    done: list[Trained] = []
    climbing = climb(files, out, ladder, progress_bars)
    try:
        done.append(next(climbing))  # with the preparation of the data, which has a display of its own
        _say(console, done[0], 1, len(rungs))
        with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
            task = display.add_task("training", total=sum(map(cost, rungs)))
            display.update(task, completed=cost(rungs[0]))
            for trained in climbing:
                done.append(trained)
                display.update(task, advance=cost(trained.rung))
                _say(console, trained, len(done), len(rungs))
    except Interrupted as signal:
        click.echo("stopped: what was trained is kept, and the same command goes on", err=True)
        sys.exit(128 + int(signal.args[0]))
    except Diverged as error:
        fail(error)
    available = Manifest.read(out / "data").split("train").tokens
    if (most := max(trained.run.tokens for trained in done)) > available:
        times = f"{most / available:.1f} times"
        click.echo(f"note: the text has {available:,} training tokens, which the longest runs saw {times}", err=True)
    return done


def _say(console: Console, trained: Trained, number: int, count: int) -> None:
    run = trained.run
    how = f"in {trained.seconds:.0f} s" if trained.seconds else "there already"
    console.print(
        f"{number}/{count}  {trained.rung.layers} layers × {trained.rung.width}: {run.parameters:,} parameters, "
        f"{run.tokens:,} tokens, loss {run.loss:.4f}, {how}",
        highlight=False,
        soft_wrap=True,
    )


def _fit(runs: Sequence[ScalingPoint], resamples: int) -> Fit:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("fitting")
        return fit(runs, resamples, progress=lambda done, total: display.update(task, completed=done, total=total))


def _record(done: Sequence[Trained], fitted: Fit) -> dict[str, Any]:
    law = fitted.law
    runs = [
        {"layers": t.rung.layers, "width": t.rung.width, **dataclasses.asdict(t.run), "compute": t.run.compute}
        | {"fitted_loss": law.loss(t.run.parameters, t.run.tokens)}
        for t in done
    ]
    intervals = {name: fitted.interval(quantity) if fitted.samples else None for name, quantity in CONSTANTS.items()}
    return {"law": dataclasses.asdict(law), "interval_80": intervals, "samples": len(fitted.samples), "runs": runs}


def _show(done: Sequence[Trained], fitted: Fit, out: Path) -> None:
    law, console = fitted.law, Console()
    numbers = ("parameters", "tokens", "compute", "loss", "the law's")
    table = Table("layers × width", *(Column(name, justify="right") for name in numbers))
    for trained in sorted(done, key=lambda each: (each.run.parameters, each.run.tokens)):
        run, rung = trained.run, trained.rung
        expected = law.loss(run.parameters, run.tokens)
        cells = f"{run.parameters:,}", f"{run.tokens:,}", f"{run.compute:.2g}", f"{run.loss:.4f}", f"{expected:.4f}"
        table.add_row(f"{rung.layers} × {rung.width}", *cells)
    console.print(table)
    table = Table("L = E + A / N^alpha + B / D^beta", Column("fitted", justify="right"), "80 % of the bootstrap's")
    for name, quantity in CONSTANTS.items():
        table.add_row(name, f"{quantity(law):.4g}", _range(fitted, quantity))
    table.add_section()
    most = max(trained.run.compute for trained in done)
    for compute in (most, 10 * most):
        parameters, tokens = law.optimal(compute)
        runs = [trained.run for trained in done]
        within = parameters <= max(run.parameters for run in runs) and tokens <= max(run.tokens for run in runs)
        outside = "" if within else " (outside the runs)"
        table.add_row(f"best for C = {compute:.2g}: N{outside}", f"{parameters:.3g}", _range(fitted, _at(compute, 0)))
        table.add_row("    D", f"{tokens:.3g}", _range(fitted, _at(compute, 1)))
        table.add_row("    L", f"{law.loss(parameters, tokens):.4g}", _range(fitted, _at(compute, 2)))
    console.print(table)
    written = [out / "scaling.json", *([out / "scaling.png"] if (out / "scaling.png").exists() else [])]
    click.echo(", ".join(map(str, written)))


def _at(compute: float, which: int) -> Callable[[ScalingLaw], float]:
    """Parameters, tokens or loss of the best division of `compute`."""

    def quantity(law: ScalingLaw) -> float:
        parameters, tokens = law.optimal(compute)
        return (parameters, tokens, law.loss(parameters, tokens))[which]

    return quantity


def _range(fitted: Fit, quantity: Callable[[ScalingLaw], float]) -> str:
    if not fitted.samples:
        return "unknown"
    low, high = fitted.interval(quantity)
    return f"{low:.3g} to {high:.3g}"


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()


def _shape(text: str) -> tuple[int, int]:
    """ "2x64" -> (2, 64)."""
    found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
    if found is None or not int(found[1]) or not int(found[2]):
        raise ValueError(f"--shapes takes LAYERSxWIDTH,…, such as 2x32,2x64,4x96; got {text!r}")
    return int(found[1]), int(found[2])


def _number(text: str) -> int:
    """ "1.6M" -> 1600000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)([kMG]?)\s*", text)
    if found is None:
        raise ValueError(f"--tokens takes numbers such as 100k,400k,1.6M; got {text!r}")
    return round(float(found[1]) * UNITS[found[2]])
