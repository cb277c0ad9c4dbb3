"""`llmfast merge`: an adapter folded into the weights of its model."""

from __future__ import annotations

from pathlib import Path

import click

from llmfast.cli.common import common_options
from llmfast.finetuning.merging import merge as merge_adapter
from llmfast.models import FLOATS


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-m", "--model", help="The model that it is for, where its file does not say.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option("--dtype", type=click.Choice(list(FLOATS)), default="fp32", show_default=True, help="Of the weights.")
@common_options
def merge(adapter: Path, model: str | None, out: Path, dtype: str) -> None:
    """Write the model that ADAPTER (a directory) was made for, with the adapter in its weights: an ordinary checkpoint,
    to be quantised, converted or used elsewhere. A classifier stays one."""
    merge_adapter(adapter, out, model, FLOATS[dtype])
    click.echo(f"the model with its adapter is in {out}")
