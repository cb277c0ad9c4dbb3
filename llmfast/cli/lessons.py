"""`llmfast lessons`: from the first n-gram to a kernel at the machine's limit, as notebooks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Column, Table

from llmfast.cli.common import common_options


@click.group(invoke_without_command=True)
@click.pass_context
def lessons(context: click.Context) -> None:
    """List the lessons; `open 1` makes a notebook and opens it, `run 1` runs one here."""
    if context.invoked_subcommand is not None:
        return
    from llmfast.lessons.catalogue import lessons as known

    table = Table(Column("", justify="right"), "lesson", "what it shows", box=None, pad_edge=False)
    for lesson in known():
        table.add_row(str(lesson.number), lesson.title, lesson.summary)
    Console().print(table)
    click.echo('\nllmfast lessons open 1    (pip install -e ".[lessons]"), or read the files in ', nl=False)
    click.echo(known()[0].path.parent.resolve())


@lessons.command("open")
@click.argument("number", type=int)
@click.option("--dir", "folder", default="llmfast-lessons", show_default=True, help="Where the notebook goes.")
@click.option("--no-browser", is_flag=True, help="Make the notebook, and open nothing.")
@common_options
def open_(number: int, folder: str, no_browser: bool) -> None:
    """Make lesson NUMBER's notebook, and open it in Jupyter. A notebook that is there already is kept."""
    from llmfast.lessons.catalogue import lesson

    chosen = lesson(number)
    try:
        import jupytext
    except ImportError:
        raise ValueError('notebooks need the extra: pip install -e ".[lessons]"') from None
    notebook = Path(folder) / f"{chosen.path.stem}.ipynb"
    notebook.parent.mkdir(parents=True, exist_ok=True)
    if not notebook.exists():
        cells = jupytext.read(chosen.path)
        cells.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        jupytext.write(cells, notebook)  # with no kernel named, Jupyter would ask for one
    click.echo(notebook)
    if not no_browser:
        if importlib.util.find_spec("jupyterlab") is None:
            raise ValueError(f'JupyterLab is not here to open {notebook}: pip install -e ".[lessons]"')
        subprocess.run([sys.executable, "-m", "jupyterlab", str(notebook)])


@lessons.command("run")
@click.argument("number", type=int)
@click.option("--quick", is_flag=True, help="Seconds instead of minutes: less training, figures that are not final.")
@click.option("--data", type=click.Path(exists=True, file_okay=False), help="Where tinyshakespeare.txt is.")
@click.option("--pictures", type=click.Path(file_okay=False, path_type=Path), help="Save the pictures there.")
@common_options
def run(number: int, quick: bool, data: str | None, pictures: Path | None) -> None:
    """Run lesson NUMBER as a script, and say what was checked."""
    from llmfast.lessons.catalogue import lesson
    from llmfast.lessons.running import run as run_lesson

    if quick:
        os.environ["LLMFAST_LESSONS"] = "quick"
    if data is not None:
        os.environ["LLMFAST_DATA"] = data
    click.echo(run_lesson(lesson(number), pictures))
