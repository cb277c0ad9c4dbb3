"""`llmfast data`: files of text to prepared data, and what such data are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

from llmfast.cli.common import common_options
from llmfast.cli.progress import progress_bars
from llmfast.tokenizers import DEFAULT_VOCAB_SIZES, TRAINABLE
from llmfast.training.manifest import Manifest
from llmfast.training.prepare import prepare as prepare_data


@click.group()
def data() -> None:
    """Prepare files of text for training: documents, divided, as shards of tokens."""


@data.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option(
    "--tokenizer",
    default="bpe",
    show_default=True,
    help=f"{', '.join(TRAINABLE)}: trained on FILES; gpt2, stories, or a directory with one.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    help=f"Of a tokenizer trained here [default: {', '.join(f'{k} {n}' for k, n in DEFAULT_VOCAB_SIZES.items())}].",
)
@click.option("--validation", type=float, default=0.1, show_default=True, help="The share kept out of training.")
@click.option(
    "--validation-documents", type=click.IntRange(min=0), default=0, metavar="N", help="Keep the last N out instead."
)
@click.option("--encoding", default="utf-8", show_default=True, help="Of text files.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that encode [default: one for each CPU].")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses what is kept out.")
@click.option("--overwrite", is_flag=True, help="Replace prepared data that --out holds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@common_options
def prepare(files: tuple[Path, ...], out: Path, as_json: bool, **settings: Any) -> None:
    """Encode FILES (text, .jsonl, .zip, or folders of them) into the directory --out.

    A text file holds one document, or several with <|endoftext|> between them; a line of .jsonl is a document, {"text":
    …} or {"prompt": …, "completion": …}, whose prompt is not learned.
    """
    with progress_bars() as progress:
        manifest = prepare_data(files, out, progress=progress, **settings)
    _show(out, manifest, as_json)


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest.")
@common_options
def info(directory: Path, as_json: bool) -> None:
    """What the prepared data in DIRECTORY are."""
    _show(directory, Manifest.read(directory), as_json)


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@common_options
def verify(directory: Path) -> None:
    """Read every shard of DIRECTORY and compare its SHA-256 with the manifest."""
    manifest = Manifest.read(directory)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    total = sum((directory / file).stat().st_size for s in shards for file in s.files() if (directory / file).exists())
    done = 0
    with progress_bars() as progress:

        def count(read: int) -> None:
            nonlocal done
            done += read
            progress("reading", done, total)

        files = manifest.verify(directory, progress=count)
    click.echo(f"{files} files, {total:,} bytes: all as the manifest says")


def _show(directory: Path, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"path": str(directory)} | dataclasses.asdict(manifest), indent=2))
        return
    table = Table("", *(Column(name, justify="right") for name in ("documents", "bytes", "tokens", "bytes a token")))
    for name, split in manifest.splits.items():
        ratio = f"{split.bytes / split.tokens:.2f}" if split.tokens else "–"
        table.add_row(name, f"{split.documents:,}", f"{split.bytes:,}", f"{split.tokens:,}", ratio)
    Console().print(table)
    click.echo(f"tokenizer {manifest.tokenizer}, {manifest.vocab_size:,} tokens, stored as {manifest.dtype}")
    click.echo(f"kept out of training: {_kept_out(manifest)}")


def _kept_out(manifest: Manifest) -> str:
    return "documents chosen by their hash" if manifest.split_by == "document" else manifest.split_by
