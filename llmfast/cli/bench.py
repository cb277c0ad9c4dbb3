"""`llmfast bench`: how fast everything is here, with how much memory, beside what the machine can do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmfast.backends import BackendUnavailable, load_backend
from llmfast.backends import backends as supported
from llmfast.cli.common import common_options
from llmfast.inference.execution import PRECISIONS

MEASURED = ("ops", "prefill", "decode", "generate", "latency", "training", "tokenizer", "memory")
TARGETS = (*MEASURED, "peers", "limits", "all")


@click.command()
@click.argument("what", type=click.Choice(TARGETS), nargs=-1, required=True, metavar="WHAT...")
@click.option(
    "--backend", "names", multiple=True, help="A name, a module or a .py file; several times. Default: this device's."
)
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), help="Several times.")
@click.option("-m", "--model", help="A name, directory or file, or a shape such as gpt2 with random weights.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--quick", "scale", flag_value="quick", help="Under two minutes: small sizes, few rounds.")
@click.option("--full", "scale", flag_value="full", help="Every size, many rounds: as long as it takes.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to FILE.")
@click.option("--report", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write a page with plots.")
@common_options
def bench(
    what: tuple[str, ...],
    names: tuple[str, ...],
    precisions: tuple[str, ...],
    model: str | None,
    device: str,
    scale: str | None,
    file: Path | None,
    folder: Path | None,
) -> None:
    """Measure WHAT: ops, prefill, decode, generate, latency, training, tokenizer, memory, peers (with the extra of
    that name), limits (of the machine), or all.

    Competitors take turns, and nothing is timed that gives wrong results. Tables show each backend's speed, how many
    times PyTorch's that is, and its share of the machine's limit.

    \b
    llmfast bench ops --backend examples/my_backend.py
    llmfast bench decode --model gpt2 --precision bf16 --precision int8
    llmfast bench all --quick --report out/
    """
    from llmfast.benchmarking import records, tables  # slow to import, and --help needs none of it

    groups = MEASURED + ("peers", "limits") if "all" in what else tuple(dict.fromkeys(what))
    device = _device(device)
    places = {load_backend(name): name for name in names}
    if unusable := {"auto", "reference"} & set(places):
        raise ValueError(f"{unusable.pop()!r} can't be measured; name a backend, a module or a .py file")
    for place in (file, folder):
        if place is not None and not place.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {place.absolute().parent} to write {place.name} into")
    write = _report_writer() if folder is not None else None

    console, output = Console(stderr=True, highlight=False), Console()
    if not output.is_terminal:
        output = Console(width=tables.WIDTH)
    run = _measure(groups, "all" in what, places, precisions, model, device, scale or "usual", console)
    results = run.results
    for table in tables.tables(results):
        output.print(table)
    if run.targets is not None:
        output.print(run.targets)
    for line in tables.problems(results.records):
        output.print(f"not measured: {line}", markup=False, highlight=False)
    if results.limits:
        output.print(tables.limits_table(results.limits))
    if file is not None:
        records.save(results, file)
        console.print(f"wrote {file}", markup=False, soft_wrap=True)
    if write is not None and folder is not None:
        write(results, folder)
        console.print(f"wrote the report into {folder}", markup=False, soft_wrap=True)
    if run.interrupted:
        sys.exit(130)


@dataclass(frozen=True)
class Outcome:
    """What was measured, and what the peers' figures should come to."""

    results: Any
    targets: Table | None
    interrupted: bool


def _measure(
    groups: tuple[str, ...],
    everything: bool,
    places: dict[str, str],
    precisions: tuple[str, ...],
    model: str | None,
    device: str,
    scale_name: str,
    console: Console,
) -> Outcome:
    """All results; after Ctrl-C, those so far."""
    from llmfast.benchmarking import limits, suite
    from llmfast.benchmarking.facts import facts
    from llmfast.benchmarking.records import Record, Results

    scale = suite.SCALES[scale_name]
    measured: list[dict[str, Any]] = []
    found: list[Record] = []
    interrupted, targets = False, None
    chosen = tuple(name for name in groups if name in MEASURED)
    items = suite.plan(scale, suite.Selection(chosen, tuple(places), precisions, model, device))
    if chosen and not items:
        _explain_nothing(chosen, places, precisions, device)
    if "limits" in groups and (reason := limits.why_not()) is not None and not everything:
        raise ValueError(reason)
    try:
        with _progress(console, len(items)) as (say, step):

            def before(number: int, item: suite.Item) -> None:
                step(number, suite.group_of(item), suite.title_of(item))

            for _, rows in suite.run(items, scale.effort, measured, places, before):
                found += [row.record for row in rows]
            if "peers" in groups:
                peers, targets = _peers(model, scale_name, everything, say)
                found += peers
            if "limits" in groups or (not measured and device == "cpu"):
                say("the CPU's limits")
                suite.measure_limits(measured, "cpu")
    except KeyboardInterrupt:
        console.print("interrupted: these are the results so far")
        interrupted = True
    known = facts(packages=("tokenizers", "tiktoken"))
    if any(record.group == "peers" for record in found):
        from llmfast.benchmarking.peers import client

        known["versions"] |= client.versions()
    return Outcome(Results(known, suite.best_limits(measured), tuple(found)), targets, interrupted)


def _peers(
    name: str | None, scale_name: str, everything: bool, say: Callable[[str], None]
) -> tuple[list[Any], Table | None]:
    """Their records, and what ours should come to; among everything else, only where they are installed."""
    from llmfast.benchmarking.peers import findings, plan, session
    from llmfast.threads import thread_count

    if everything and (reason := session.why_not()) is not None:
        say(f"the peers are left out: {reason}")
        return [], None
    model = plan.MODELS.get(name or "gpt2", plan.GPT2 if everything else None)
    if model is None:
        raise ValueError(f"the peers are measured on {', '.join(plan.MODELS)}, not on {name}")
    effort = plan.QUICK if scale_name == "quick" else plan.FULL
    peers = session.Session(model, effort, thread_count(), say)
    for group in model.groups:
        peers.group(group)
    return findings.records(peers.groups), findings.targets(peers.groups)


class _progress:
    """A bar that names what runs now; without a terminal, a line for every group."""

    def __init__(self, console: Console, total: int):
        self.console, self.total, self.group = console, total, ""
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self.display = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> tuple[Callable[[str], None], Callable[[int, str, str], None]]:
        self.display.start()
        self.task = self.display.add_task("", total=self.total)
        return self.say, self.step

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def say(self, what: str) -> None:
        self.display.update(self.task, description=what, completed=self.total)
        if not self.console.is_terminal:
            self.console.print(what, markup=False, soft_wrap=True)

    def step(self, number: int, group: str, title: str) -> None:
        self.display.update(self.task, description=title, completed=number)
        if group != self.group and not self.console.is_terminal:
            self.console.print(f"{group} ({number} of {self.total} done)", markup=False)
        self.group = group


def _explain_nothing(groups: tuple[str, ...], places: dict[str, str], precisions: tuple[str, ...], device: str) -> None:
    """Nothing was asked for that can be: say why not."""
    for name in places:
        reasons = dict.fromkeys(row.reason for row in supported() if row.backend == name and row.device == device)
        if None not in reasons:
            raise BackendUnavailable(f"backend {name!r} can't run anything on {device}: {next(iter(reasons))}")
    raise ValueError(f"nothing to measure: {', '.join(groups)} has no case in {', '.join(precisions)} on {device}")


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that torch can use here")
    return device


def _report_writer() -> Any:
    """`page.write`; what it needs is found missing now rather than after measuring."""
    from llmfast.benchmarking import page, plots

    plots.require_matplotlib()
    return page.write
