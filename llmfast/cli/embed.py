"""`llmfast embed`: texts to vectors."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmfast.cli.common import backend_option, common_options
from llmfast.cli.progress import progress_bars
from llmfast.documents import read_text

SHOWN = 6  # numbers of a vector that a table has room for


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-m", "--model", default="minilm", show_default=True, help="An encoder, or any language model.")
@click.option("--whole", is_flag=True, help="FILE is one text, not one a line.")
@click.option("--pooling", help="mean, first or last of the tokens' vectors; by default what the model's files say.")
@click.option("-p", "--precision", default="fp32", show_default=True, help="fp32, bf16; on a GPU fp16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option("--backend", default="auto", show_default=True, help="auto, pytorch, cpp, triton, or OP=NAME,…")
@click.option("--encoding", default="utf-8", show_default=True, help="Of FILE.")
@click.option("--json", "as_json", is_flag=True, help='Print {"text": …, "vector": […]} a line.')
@common_options
def embed(
    file: Path,
    model: str,
    whole: bool,
    pooling: str | None,
    precision: str,
    device: str,
    backend: str,
    encoding: str,
    as_json: bool,
) -> None:
    """The vectors of the texts in FILE, one a line (blank lines are left out).

    Texts that mean the same have vectors near to one another: their product is the cosine between them.
    """
    from llmfast.inference.embedding import Embedder

    text = read_text(file, encoding)
    texts = [text] if whole else [line for line in text.split("\n") if line.strip()]
    if not text.strip():
        raise ValueError(f"{file} holds no text")
    embedder = Embedder(model, pooling, precision=precision, device=device, backend=backend_option(backend))
    with progress_bars() as show:
        vectors = embedder.embed(texts, lambda done, total: show("texts", done, total))
    for each, vector in zip(texts, vectors.tolist(), strict=True):
        if as_json:
            click.echo(json.dumps({"text": each, "vector": vector}, ensure_ascii=False))
        else:
            begins = " ".join(f"{number:7.4f}" for number in vector[:SHOWN])
            click.echo(f"{begins} … ({len(vector)})  {' '.join(each.split())[:60]}")
