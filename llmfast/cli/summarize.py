"""`llmfast summarize`: a text made short."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

import llmfast
from llmfast.cli.common import backend_option, common_options, running_options, sampling_options
from llmfast.cli.progress import progress_bars


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-m", "--model", default="smollm2", show_default=True, help="Name, directory, .gguf file or hub name.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=120, show_default=True, help="Of it.")
@click.option("--part-tokens", type=click.IntRange(min=16), default=1500, show_default=True, help="Summarised at once.")
@sampling_options(temperature=0.0)
@running_options
@click.option("--encoding", default="utf-8", show_default=True, help="Of a text file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@common_options
def summarize(
    file: Path,
    model: str,
    backend: str,
    precision: str,
    device: str,
    encoding: str,
    stop: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """A short form of FILE, of any length: text, Markdown, HTML or PDF.

    What does not fit the model is summarised part by part, and the summaries then together.
    """
    from llmfast.retrieval.blocks import READERS, read_blocks
    from llmfast.retrieval.files import documents_below, read_file
    from llmfast.retrieval.summarizing import summary_stream

    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    if file.suffix.lower() not in READERS:
        raise ValueError(f"{file} is none of {', '.join(READERS)}")
    (source,) = documents_below(file, lambda line: None)
    text = "\n\n".join(block.text for block in read_blocks(read_file(*source).data, str(file), encoding))
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device)
    with progress_bars() as show:
        pieces = summary_stream(llm, text, progress=show, stop=list(stop) or None, **settings)
        first = next(pieces, "")
    if as_json:
        click.echo(json.dumps({"file": str(file), "summary": first + "".join(pieces)}, ensure_ascii=False))
        return
    click.echo(first, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
