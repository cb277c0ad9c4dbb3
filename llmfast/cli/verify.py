"""`llmfast verify`: is a backend right?"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

import llmfast
from llmfast.backends import OPS, BackendUnavailable, Support, load_backend
from llmfast.cli.common import common_options
from llmfast.contract import Plan, Summary, Task, Verdict, plan, run, summarise
from llmfast.contract.suite import DTYPE_NAMED

SLOW = "minutes in Triton's interpreter"


@click.command()
@click.option(
    "--backend", "names", multiple=True, help="A name, a module or a .py file; several times. Default: every backend."
)
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS), help="Only this operation; several times.")
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPE_NAMED)), help="Only this dtype; several."
)
@click.option("--device", default="auto", show_default=True, help="cpu or cuda; auto is all there are.")
@click.option("--quick", is_flag=True, help="Only the smallest cases.")
@click.option("--json", "as_json", is_flag=True, help="Print every case's outcome as JSON.")
@common_options
def verify(
    names: tuple[str, ...], ops: tuple[str, ...], dtypes: tuple[str, ...], device: str, quick: bool, as_json: bool
) -> None:
    """Hold a backend, anybody's, to the contract: results and gradients against float64.

    An error may be twice that of PyTorch's own op in the same dtype, plus a rounding of the largest value. Exit code 0
    where everything is right, 1 where something is wrong.

    \b
    llmfast verify --backend examples/my_backend.py
    llmfast verify --backend cpp --op gelu --dtype bfloat16
    """
    todo = _plan(names, ops, dtypes, device)
    tasks = [task for task in todo.tasks if task.small or not (quick or task.interpreted)]
    summaries = summarise(_run(tasks))
    wrong = any(summary.failed for summary in summaries)
    if as_json:
        click.echo(json.dumps(_report(summaries, todo.not_offered), indent=2, allow_nan=False))
    else:
        console = Console()
        places = [(s.backend, s.device) for s in summaries] + [(row.backend, row.device) for row in todo.not_offered]
        for place in dict.fromkeys(places):
            mine = [summary for summary in summaries if (summary.backend, summary.device) == place]
            missing = [row for row in todo.not_offered if (row.backend, row.device) == place]
            _show(console, " on ".join(place), mine, missing)
        if skipped := len(todo.tasks) - len(tasks):
            console.print(f"{skipped} larger cases were not run ({'--quick' if quick else SLOW})", highlight=False)
    sys.exit(1 if wrong else 0)


def _plan(names: tuple[str, ...], ops: tuple[str, ...], dtypes: tuple[str, ...], device: str) -> Plan:
    """The cases to run. Bad input is a `ValueError`, a named backend that offers none of them `BackendUnavailable`."""
    devices = {row.device for row in llmfast.backends()}
    if device not in ("auto", *devices):
        raise ValueError(f"there is no device {device!r} here; there is {', '.join(sorted(devices))}")
    chosen = [load_backend(name) for name in names]
    if wrong := {"auto", "reference"} & set(chosen):
        raise ValueError(f"{wrong.pop()!r} is no backend that can be verified; name a backend, a module or a .py file")
    todo = plan(chosen or None, ops or OPS, dtypes or None, None if device == "auto" else device)
    for name in chosen:
        if not any(task.backend == name for task in todo.tasks):
            reasons = dict.fromkeys(str(row.reason) for row in todo.not_offered if row.backend == name)
            telling = [reason for reason in reasons if "does not define" not in reason] or list(reasons)
            raise BackendUnavailable(f"backend {name!r} offers nothing to verify here: {'; '.join(telling)}")
    return todo


def _run(tasks: list[Task]) -> list[Verdict]:
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    verdicts = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        bar = display.add_task("", total=len(tasks))
        for task in tasks:
            display.update(bar, description=task.name)
            verdicts.append(run(task))
            display.advance(bar)
    return verdicts


def _show(console: Console, title: str, mine: list[Summary], missing: list[Support]) -> None:
    """The table of one backend on one device, and everything about it that a reader has to know."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    if mine:
        console.print(_table(title, mine))
        say("[dim]the worst error of any case, in units of what the tolerance rule allows: up to 1 is right[/dim]")
    reasons: dict[str, list[str]] = {}
    for row in missing:
        reasons.setdefault(str(row.reason).replace(row.op, "them"), []).append(row.op)
    for reason, which in reasons.items():
        named = list(dict.fromkeys(which))
        say(
            f"{title} does not offer {', '.join(named) if len(named) < len(OPS) else 'any operation'}: {escape(reason)}"
        )
    for summary in mine:
        _show_problems(say, summary)
    if mine:
        cases = sum(len(summary.judged) for summary in mine)
        failed = sum(len(summary.failed) for summary in mine)
        verdict = f"[red]✗ {failed} of {cases} cases are wrong" if failed else f"[green]✓ all {cases} cases are right"
        say(f"{title}: {verdict}")


def _table(title: str, mine: list[Summary]) -> Table:
    dtypes = list(dict.fromkeys(summary.dtype for summary in mine))
    table = Table("operation", "", *(Column(dtype, justify="right") for dtype in dtypes), title=title)
    for op in dict.fromkeys(summary.op for summary in mine):
        by_dtype = {summary.dtype: summary for summary in mine if summary.op == op}
        of = [by_dtype.get(dtype) for dtype in dtypes]
        table.add_row(op, "cases right", *("–" if summary is None else _passed(summary) for summary in of))
        for name in dict.fromkeys(name for summary in by_dtype.values() for name in summary.worst):
            table.add_row("", name, *("–" if summary is None else _relative(summary.worst.get(name)) for summary in of))
        table.add_section()
    return table


def _show_problems(say: Callable[[str], None], summary: Summary) -> None:
    """The worst case of one op in one dtype, and the names of the others that fail."""
    where = f"{summary.op} {summary.dtype}"
    for verdict in summary.left_out:
        say(f"left out: {where}, case {verdict.task.case.name}: {escape(str(verdict.left_out))}")
    if not summary.failed:
        return
    worst, *others = summary.failed
    for problem in worst.outcome.problems:
        say(f"[red]✗[/red] {where}, case {worst.task.case.name}: {escape(problem)}")
    if others:
        say(f"  and {len(others)} more of its cases: {', '.join(verdict.task.case.name for verdict in others)}")


def _passed(summary: Summary) -> str:
    right, of = len(summary.judged) - len(summary.failed), len(summary.judged)
    return f"{right} of {of}" if right == of else f"[red]✗ {right} of {of}[/red]"


def _relative(worst: float | None) -> str:
    if worst is None:
        return "–"
    text = f"{worst:.2f}" if worst < 100 else f"{worst:.1e}"
    return text if worst <= 1 else f"[red]✗ {'nan' if math.isinf(worst) else text}[/red]"


def _report(summaries: list[Summary], not_offered: list[Support]) -> dict[str, Any]:
    return {
        "passed": not any(summary.failed for summary in summaries),
        "llmfast": llmfast.__version__,
        "torch": torch.__version__,
        "results": [
            {key: getattr(summary, key) for key in ("backend", "device", "op", "dtype")}
            | {"cases": len(summary.judged), "failed": len(summary.failed)}
            | {"worst": {name: None if math.isinf(x) else x for name, x in summary.worst.items()}}
            | {"problems": {v.task.case.name: v.outcome.problems for v in summary.failed}}
            | {"left_out": {v.task.case.name: v.left_out for v in summary.left_out}}
            for summary in summaries
        ],
        "not_offered": [
            {key: getattr(row, key) for key in ("backend", "device", "op", "dtype", "reason")} for row in not_offered
        ],
    }
