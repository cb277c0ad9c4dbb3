"""`llmfast convert`: a model in another kind of file."""

from __future__ import annotations

from pathlib import Path

import click

from llmfast.cli.common import common_options
from llmfast.cli.progress import progress_bars
from llmfast.weights.converting import FILES
from llmfast.weights.converting import convert as convert_model
from llmfast.weights.gguf_writing import TYPES
from llmfast.weights.locate import locate_model


@click.command()
@click.argument("model")
@click.option("--to", type=click.Choice(FILES), required=True, help="A file for llama.cpp, or Hugging Face's layout.")
@click.option("--type", "kind", type=click.Choice(list(TYPES)), help="Of the matrices (default: nothing is rounded).")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The file or directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace what --out holds.")
@common_options
def convert(model: str, to: str, kind: str | None, out: Path, overwrite: bool) -> None:
    """Write MODEL as a GGUF file, or as a directory of safetensors, its tokenizer included."""
    with progress_bars() as show:
        without_tokenizer = convert_model(
            locate_model(model), out, to, kind, overwrite, lambda done, total: show(f"{model} to {to}", done, total)
        )
    if without_tokenizer:
        click.echo(f"note: {without_tokenizer}", err=True)
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.glob("*.safetensors")))
    click.echo(f"{out}, {size:,} bytes")
