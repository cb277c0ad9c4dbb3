"""`llmfast train`: from text to a model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from llmfast.cli.common import common_options, fail, resume_command
from llmfast.cli.progress import progress_bars
from llmfast.training.configuration import PRESETS, configure
from llmfast.training.directory import no_progress
from llmfast.training.processes import PARALLEL
from llmfast.training.run import train as run_training
from llmfast.training.trainer import Diverged


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The directory of the run, and of its model.")
@click.option("--preset", metavar="NAME", help=f"What to start from: {', '.join(PRESETS)}.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file of settings.")
@click.option("--steps", type=int, help="How many optimizer steps; short for --set steps=N.")
@click.option("--device", help="auto, cpu, cuda, …; short for --set device=NAME.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A single setting; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out; FILES can be left out.")
@click.option("--parallel", type=click.Choice(PARALLEL), default="none", show_default=True, help="Under torchrun.")
@click.option("--print-config", is_flag=True, help="Print every setting as TOML, with its meaning, and stop.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print how the run ended as one JSON object.")
@common_options
def train(
    files: tuple[Path, ...],
    out: Path | None,
    preset: str | None,
    file: Path | None,
    steps: int | None,
    device: str | None,
    settings: tuple[str, ...],
    resume: bool,
    parallel: str,
    print_config: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a model on FILES: texts, or one directory that `llmfast data prepare` made.

    The model in --out is the one that predicted the validation text best; `llmfast generate --model OUT` takes it.
    """
    changes: dict[str, Any] = dict(pair(text) for text in settings)
    changes |= {name: value for name, value in (("steps", steps), ("device", device)) if value is not None}
    fresh = preset is not None or file is not None or not resume
    config = configure(preset, file) if fresh else None
    if print_config:
        click.echo(configure(preset, file, changes).to_toml())
        return
    if out is None:
        raise ValueError("name the directory to write: --out DIR")
    try:
        record = run_training(
            files,
            out,
            config,
            changes=changes,
            resume=resume,
            parallel=parallel,
            quiet=quiet,
            preparing=no_progress if quiet else progress_bars,
            resume_command=resume_command("train", out, parallel),
        )
    except Diverged as error:
        fail(error)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(record)))
    if record.interrupted is not None:
        sys.exit(128 + record.interrupted)


def pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()
