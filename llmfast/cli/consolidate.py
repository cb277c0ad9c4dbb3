"""`llmfast consolidate`: a checkpoint that several processes wrote, as one model."""

from __future__ import annotations

from pathlib import Path

import click

from llmfast.cli.common import common_options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@common_options
def consolidate(checkpoint: Path, out: Path) -> None:
    """Make CHECKPOINT (RUN/checkpoints/step-…, written with --parallel fsdp) a model that `--model` takes.

    The directory of the run itself is such a model already: of the best validation so far.
    """
    from llmfast.training.sharded import consolidate as merge

    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model already: name another directory")
    merge(checkpoint, out)
    click.echo(out)
