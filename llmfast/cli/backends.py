"""`llmfast backends`: what can run on this machine."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import llmfast
from llmfast.backends import AUTO, cpp
from llmfast.cli.common import common_options


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print every op × backend × device × dtype as JSON.")
@common_options
def backends(as_json: bool) -> None:
    """Which backends there are on this machine, and why not where not."""
    rows = llmfast.backends()
    if as_json:
        keys = ("op", "backend", "device", "dtype", "available", "reason")
        click.echo(json.dumps([{key: getattr(row, key) for key in keys} for row in rows], indent=2))
        return
    console = Console()
    devices = list(dict.fromkeys(row.device for row in rows))
    table = Table("backend", *devices, "notes")
    for name in dict.fromkeys(row.backend for row in rows):
        mine = [row for row in rows if row.backend == name]
        cells = [_cell([row for row in mine if row.device == device]) for device in devices]
        reasons = dict.fromkeys(row.reason for row in mine if row.reason)
        notes = [] if any(row.available for row in mine) else list(reasons)
        if name == "cpp" and not notes:
            notes.append(f"instruction set {cpp.isa()}")
        if name == "reference":
            notes.append("float64, for tests")
        table.add_row(name, *cells, escape("; ".join(notes)))  # what to install has an extra in brackets
    console.print(table)
    for device in devices:
        order = " → ".join(AUTO.get(device, ("pytorch",)))
        console.print(f"auto on {device}: the first that can of {order}", highlight=False)


def _cell(rows: list[Any]) -> str:
    """The dtypes in which every op is there, with what is missing named."""
    dtypes: dict[str, list[Any]] = {}
    for row in rows:
        dtypes.setdefault(row.dtype, []).append(row)
    complete = [dtype for dtype, group in dtypes.items() if all(row.available for row in group)]
    partial = [
        f"{dtype}: only {', '.join(row.op for row in group if row.available)}"
        for dtype, group in dtypes.items()
        if dtype not in complete and any(row.available for row in group)
    ]
    return "\n".join([", ".join(complete), *partial]).strip() or "[dim]–[/dim]"
