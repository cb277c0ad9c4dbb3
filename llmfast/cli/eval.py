"""`llmfast eval`: how good a model is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

import llmfast
from llmfast.cli import eval_documents
from llmfast.cli.common import backend_option, common_options
from llmfast.documents import read_text, split_documents
from llmfast.evaluation.minimal_pairs import Accuracy, grouped, minimal_pair_outcomes, read_pairs
from llmfast.evaluation.perplexity import documents_perplexity, loses_text, text_perplexity
from llmfast.tokenizers import load_tokenizer
from llmfast.tokenizers.bpe import END_OF_TEXT
from llmfast.training.manifest import MANIFEST, Manifest


@click.group()
def eval() -> None:
    """How good a model is: perplexity, minimal pairs, scaling laws, finding and answering, summaries."""


for _command in (eval_documents.retrieval, eval_documents.qa, eval_documents.summaries):
    eval.add_command(_command)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """MODEL, and how it is to run."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …"),
        click.option("-p", "--precision", default="auto", show_default=True, help="auto, fp32, bf16, fp16, int8, …"),
        click.option("--backend", default="auto", show_default=True, help="auto, pytorch, cpp, triton, or OP=NAME,…"),
        click.argument("model"),
    ):
        command = option(command)
    return command


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that draws a bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task(text, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)


@eval.command()
@model_options
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--documents", is_flag=True, help=f"Score each document alone: FILE has {END_OF_TEXT} between them.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the last N documents, a held-out split.")
@click.option("--stride", type=click.IntRange(min=1), metavar="N", help="Windows N tokens apart; default: the context.")
@click.option("--encoding", default="utf-8", show_default=True, help="Of FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@common_options
def perplexity(
    model: str,
    file: Path,
    documents: bool,
    last: int | None,
    stride: int | None,
    encoding: str,
    as_json: bool,
    backend: str,
    precision: str,
    device: str,
) -> None:
    """How well MODEL predicts the text in FILE: nats a token, perplexity, bits a byte.

    FILE is a text, or a directory of prepared data, whose validation split is scored.
    Every token is predicted once. By default the text is cut into blocks of the model's context, so that a block's
    first tokens see little; with --stride each window sees the end of the one before it, at more work.
    """
    if last is not None and not documents:
        raise ValueError("--last counts documents: it needs --documents")
    if (file / MANIFEST).exists():
        text = held_out(file)
    elif file.is_dir():
        raise ValueError(f"{file} is a directory without prepared data ({MANIFEST}): name a text file")
    else:
        text = read_text(file, encoding)
    if not text:
        raise ValueError(f"{file} is empty")
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device)
    tokenizer = llm.need_tokenizer()
    if END_OF_TEXT in text and not documents:
        click.echo(f"note: {file} holds {END_OF_TEXT}, read as text here; --documents scores what is between", err=True)
    texts = split_documents(text) if documents else [text]
    if last is not None and last > len(texts):
        raise ValueError(f"{file} holds {len(texts)} documents, fewer than --last {last}")
    texts = texts[-last:] if last is not None else texts
    with progress_bar(f"{file.name}, {llm.precision}") as progress:
        if documents:
            result = documents_perplexity(llm, texts, stride, progress)
        else:
            result = text_perplexity(llm, text, stride, progress)
    stride = llm.config.context if stride is None else stride
    facts: dict[str, Any] = {"model": model, "file": str(file), "precision": llm.precision}
    facts |= {"documents": len(texts)} if documents else {}
    facts |= {
        "context": llm.config.context,
        "stride": stride,
        "first_token": "context only" if llm.start_token is None else "predicted from end-of-text",
        "tokens": result.tokens,
        "bytes": result.bytes,
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "lossless": not any(loses_text(tokenizer, each) for each in texts),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        if name != "lossless":
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if isinstance(value, float) else value
            table.add_row(name.replace("_", " "), shown)
    Console().print(table)
    if not facts["lossless"]:
        click.echo("note: the tokenizer can't give this text back, so bits per byte flatter the model", err=True)


def held_out(path: Path) -> str:
    """What prepared data keep out of training, as text."""
    from llmfast.training.dataset import TokenDataset

    data, tokenizer = TokenDataset.open(path, "validation"), load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"{path} has lost its tokenizer")
    text = tokenizer.decode(data.window(0, data.num_tokens).tolist())
    if len(text.replace(END_OF_TEXT, "").encode()) != Manifest.read(path).split("validation").bytes:
        click.echo("note: the data's tokenizer can't give all of its text back: what it can is scored", err=True)
    return text


@eval.command()
@model_options
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--paradigms", is_flag=True, help="A line for every paradigm, not only for every phenomenon.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@common_options
def blimp(model: str, path: Path, paradigms: bool, as_json: bool, backend: str, precision: str, device: str) -> None:
    """How often MODEL finds the good sentence of a minimal pair likelier than the bad one.

    PATH is BLiMP's zip archive, a folder, or one .jsonl file: lines with sentence_good and sentence_bad.
    """
    pairs = read_pairs(path)
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device)
    with progress_bar(f"{len(pairs):,} pairs, {llm.precision}") as progress:
        outcomes = minimal_pair_outcomes(llm, pairs, progress)
    by_phenomenon = grouped(outcomes, [pair.phenomenon for pair in pairs])
    by_paradigm = grouped(outcomes, [f"{pair.phenomenon}/{pair.paradigm}" for pair in pairs])
    overall = Accuracy(outcomes)
    if as_json:
        figures = {
            name: {key: asdict_of(accuracy) for key, accuracy in group.items()}
            for name, group in (("phenomena", by_phenomenon), ("paradigms", by_paradigm))
        }
        record = {"model": model, "path": str(path), "precision": llm.precision, "overall": asdict_of(overall)}
        click.echo(json.dumps(record | figures, indent=2))
        return
    table = Table("phenomenon", *(Column(name, justify="right") for name in ("pairs", "accuracy", "± standard error")))
    for name, accuracy in (by_paradigm if paradigms else by_phenomenon).items():
        table.add_row(name, f"{accuracy.pairs:,}", f"{accuracy.value:.1%}", f"{accuracy.standard_error:.1%}")
    table.add_section()
    table.add_row("all", f"{overall.pairs:,}", f"{overall.value:.2%}", f"{overall.standard_error:.2%}")
    Console().print(table)


def asdict_of(accuracy: Accuracy) -> dict[str, float | None]:
    error = accuracy.standard_error
    return {"pairs": accuracy.pairs, "accuracy": accuracy.value, "standard_error": None if isnan(error) else error}


@eval.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option("--quick", is_flag=True, help="A ladder of two to three minutes on two cores, on characters.")
@click.option("--shapes", metavar="LxW,…", help="Layers × width of the models, such as 2x32,2x64,4x96.")
@click.option("--tokens", metavar="N,…", help="Numbers of training tokens, such as 100k,400k,1.6M.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of `train` for all runs.")
@click.option("--resamples", type=click.IntRange(min=0), default=100, show_default=True, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@common_options
def scaling(
    files: tuple[Path, ...],
    out: Path,
    quick: bool,
    shapes: str | None,
    tokens: str | None,
    settings: tuple[str, ...],
    resamples: int,
    as_json: bool,
) -> None:
    """Train a ladder of small models on FILES, and fit how their loss falls with parameters, tokens and compute.

    Writes scaling.json and scaling.png into --out. Stopped, the same command goes on.
    """
    from llmfast.cli.scaling import run_scaling

    run_scaling(files, out, quick, shapes, tokens, settings, resamples, as_json)
