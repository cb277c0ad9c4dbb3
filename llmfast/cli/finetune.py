"""`llmfast finetune`: a model that exists, taught something new."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from llmfast.cli.common import common_options, fail, resume_command
from llmfast.cli.train import pair
from llmfast.finetuning.configuration import METHODS, TASKS, FinetuningConfig
from llmfast.finetuning.preview import Preview, preview
from llmfast.finetuning.run import finetune as run_finetuning
from llmfast.training.display import duration
from llmfast.training.trainer import Diverged


@click.command()
@click.argument("model", required=False)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The directory of the run, and of its result.")
@click.option("--method", type=click.Choice(METHODS), help="What is trained; lora unless it is said otherwise.")
@click.option("--task", type=click.Choice(TASKS), help="What the file is for; found out unless it is said.")
@click.option("--epochs", type=float, help="How often each example is seen; short for --set epochs=N.")
@click.option("--also", metavar="FILE", help="A text whose perplexity shows what was forgotten.")
@click.option("--config", "settings_file", type=click.Path(path_type=Path), help="A TOML file of settings.")
@click.option("--device", help="auto, cpu, cuda, …; short for --set device=NAME.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A single setting; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out; MODEL and FILE are left out.")
@click.option(
    "--parallel", type=click.Choice(["none", "ddp"]), default="none", show_default=True, help="Under torchrun."
)
@click.option("--dry-run", is_flag=True, help="Show examples as the model sees them, memory and time; then stop.")
@click.option("--print-config", is_flag=True, help="Print every setting as TOML, with its meaning, and stop.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print how the run ended as one JSON object.")
@common_options
def finetune(
    model: str | None,
    file: Path | None,
    out: Path | None,
    settings_file: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    parallel: str,
    dry_run: bool,
    print_config: bool,
    quiet: bool,
    as_json: bool,
    **short: Any,
) -> None:
    """Teach MODEL what is in FILE: plain text; chats, instructions or prompts with completions (.jsonl, .json); or
    labelled texts (.csv, .tsv, .jsonl), to be told apart.

    `llmfast chat`, `generate` and `classify` take the directory --out as a model.
    """
    changes: dict[str, Any] = dict(pair(text) for text in settings)
    changes |= {name: value for name, value in short.items() if value is not None}
    if print_config:
        click.echo(FinetuningConfig.configure(None, settings_file, changes).to_toml())
        return
    if dry_run:
        if model is None or file is None:
            raise ValueError("name a model and a file to look at: llmfast finetune MODEL FILE --dry-run")
        show(preview(model, file, FinetuningConfig.configure(None, settings_file), changes))
        return
    if out is None:
        raise ValueError("name the directory to write: --out DIR")
    if resume and (model is not None or file is not None):
        raise ValueError("a resumed run has its model and its file: leave them out")
    config = FinetuningConfig.configure(None, settings_file) if settings_file is not None or not resume else None
    try:
        outcome = run_finetuning(
            model,
            file,
            out,
            config,
            changes=changes,
            resume=resume,
            parallel=parallel,
            quiet=quiet,
            resume_command=resume_command("finetune", out, parallel),
        )
    except Diverged as error:
        fail(error)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(outcome)))
    if outcome.interrupted is not None:
        sys.exit(128 + outcome.interrupted)


def show(found: Preview) -> None:
    """What counts in the loss stands out in green; without colours, between ⟦ and ⟧."""
    console = Console(highlight=False)
    for number, example in enumerate(found.examples):
        text = Text(f"{number + 1}. ", style="bold")
        for piece, counts in example:
            marked = piece if console.is_terminal or not counts else f"⟦{piece}⟧"
            text.append(marked, style="bold green" if counts else "not bold dim")
        if found.labels:
            text.append(f"  → {found.labels[number]}", style="bold green")
        console.print(text, soft_wrap=True)
    for line in found.lines:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"{found.padding:.1%} of what is computed pads rows (examples of like length share a batch)"))
    console.print(Text(f"memory: about {found.memory}"), soft_wrap=True)
    console.print(Text(f"time: about {duration(found.seconds)} of training, without evaluations"))
