"""The command line: `llmfast <verb>`. Parses, calls the package, prints.

Bad input gives one line on stderr and exit code 2.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

import llmfast
from llmfast import checkpoint
from llmfast.backends import AUTO, BackendUnavailable, cpp
from llmfast.locate import locate_model
from llmfast.quantization import PRECISIONS
from llmfast.threads import thread_count
from llmfast.tokenizers import load_tokenizer

# What the package raises for input it can't use; anything else is a bug and keeps its traceback.
BAD_INPUT = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--threads`, and one clear line for bad input."""

    @click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: what torch chooses).")
    @functools.wraps(command)
    def wrapped(*args: Any, threads: int | None, **kwargs: Any) -> None:
        warnings.showwarning = lambda message, *_, **__: click.echo(f"\nnote: {message}", err=True)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # the reader (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (*BAD_INPUT, BackendUnavailable) as error:
            fail(error)

    return wrapped


def fail(error: Exception) -> None:
    """One line, exit code 2."""
    click.echo(f"llmfast: {' '.join(str(error).split()) or type(error).__name__}", err=True)
    sys.exit(2)


def backend_option(text: str) -> str | dict[str, str]:
    """`cpp`, or one for each op: `causal_attention=cpp,layer_norm=pytorch`."""
    if "=" not in text:
        return text
    pairs = [item.partition("=") for item in text.split(",")]
    return {op.strip(): name.strip() for op, _, name in pairs}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llmfast.__version__, prog_name="llmfast")
def cli() -> None:
    """A GPT that can be read in an afternoon and runs as fast as the machine allows."""


@cli.command()
@click.argument("prompt")
@click.option("-m", "--model", default="stories", show_default=True, help="Embedded name, directory, file or hub name.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=0), default=256, show_default=True)
@click.option("-t", "--temperature", type=float, default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Only the K likeliest tokens.")
@click.option("--top-p", type=float, help="Only the likeliest tokens of total probability P.")
@click.option("--min-p", type=float, help="Only tokens P times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT; may be given several times.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="How many texts.")
@click.option("--truncate", is_flag=True, help="Keep the end of a prompt longer than the context.")
@click.option("--cache/--no-cache", default=True, help="--no-cache computes everything again for every token.")
@click.option(
    "--speculate", type=click.IntRange(0, 15), default=0, metavar="K", help="Guess up to K tokens ahead: the same text."
)
@click.option("--backend", default="auto", show_default=True, help="auto, pytorch, cpp, triton, or OP=NAME,OP=NAME.")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16, fp16, int8, int4 or int4-all.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@common_options
def generate(
    prompt: str,
    model: str,
    backend: str,
    precision: str,
    device: str,
    samples: int,
    cache: bool,
    stop: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Continue PROMPT (- reads it from stdin). The text streams to stdout, the speed goes to stderr."""
    if prompt == "-":
        prompt = sys.stdin.read()
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device)
    settings |= {"stop": list(stop), "use_cache": cache}
    if as_json:
        start = time.perf_counter()
        texts = llm.generate([prompt], num_return_sequences=samples, **settings)[0]
        seconds = time.perf_counter() - start
        record = {"model": model, "prompt": prompt, "texts": texts if samples > 1 else [texts], "seconds": seconds}
        click.echo(json.dumps(record, ensure_ascii=False))
        return
    if samples > 1:
        click.echo("\n\n---\n\n".join(llm.generate(prompt, num_return_sequences=samples, **settings)))
        return

    start = time.perf_counter()
    stream = llm.stream(prompt, **settings)
    click.echo(prompt, nl=False)
    interrupted = False
    first: float | None = None
    try:
        for piece in stream:
            first = first or time.perf_counter()
            click.echo(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    end = time.perf_counter()
    click.echo()
    sys.stdout.flush()
    rate = (
        f", {(stream.tokens - 1) / (end - first):,.0f} tokens/s" if first and stream.tokens > 1 and end > first else ""
    )
    waited = f", the first after {1000 * (first - start):.0f} ms" if first else ""
    click.echo(f"[{stream.tokens} tokens{waited}{rate}; {_how(llm)}]", err=True)
    if interrupted:
        sys.exit(130)


def _how(llm: Any) -> str:
    """Who generates, in which precision and with how many threads, in a few words."""
    if llm.native() is not None:
        return f"native ({cpp.isa()}), {llm.precision}, {thread_count()} threads"
    with llm.using_backend():
        backend = llmfast.explain("linear", llm.model.lm_head.weight, llm.model.lm_head.weight).backend
    where = f"{torch.get_num_threads()} threads" if llm.model.device.type == "cpu" else str(llm.model.device)
    return f"{backend}, {llm.precision}, {where}"


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print every op × backend × device × dtype as JSON.")
@common_options
def backends(as_json: bool) -> None:
    """Which backends there are on this machine, and why not where not."""
    rows = llmfast.backends()
    if as_json:
        keys = ("op", "backend", "device", "dtype", "available", "reason")
        click.echo(json.dumps([{key: getattr(row, key) for key in keys} for row in rows], indent=2))
        return
    console = Console()
    devices = list(dict.fromkeys(row.device for row in rows))
    table = Table("backend", *devices, "notes")
    for name in dict.fromkeys(row.backend for row in rows):
        mine = [row for row in rows if row.backend == name]
        cells = [_cell([row for row in mine if row.device == device]) for device in devices]
        reasons = dict.fromkeys(row.reason for row in mine if row.reason)
        notes = [] if any(row.available for row in mine) else list(reasons)
        if name == "cpp" and not notes:
            notes.append(f"instruction set {cpp.isa()}")
        if name == "reference":
            notes.append("float64, for tests")
        table.add_row(name, *cells, "; ".join(notes))
    console.print(table)
    for device in devices:
        order = " → ".join(AUTO.get(device, ("pytorch",)))
        console.print(f"auto on {device}: the first that can of {order}", highlight=False)


def _cell(rows: list[Any]) -> str:
    """The dtypes in which every op is there, with what is missing named."""
    dtypes: dict[str, list[Any]] = {}
    for row in rows:
        dtypes.setdefault(row.dtype, []).append(row)
    complete = [dtype for dtype, group in dtypes.items() if all(row.available for row in group)]
    partial = [
        f"{dtype}: only {', '.join(row.op for row in group if row.available)}"
        for dtype, group in dtypes.items()
        if dtype not in complete and any(row.available for row in group)
    ]
    return "\n".join([", ".join(complete), *partial]).strip() or "[dim]–[/dim]"


@cli.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True)
@common_options
def info(model: str, as_json: bool) -> None:
    """What MODEL is: its shape, size, tokenizer and card."""
    stream = checkpoint.stream(locate_model(model))
    config, tokenizer = stream.config, load_tokenizer(stream.directory)
    by_precision: dict[str, int] = {}
    for name, size in stream.sizes.items():
        precision = stream.precision_of(name)
        by_precision[precision] = by_precision.get(precision, 0) + size
    facts: dict[str, Any] = {
        "path": str(stream.path),
        "parameters": config.num_parameters,
        "precision": stream.precision or ", ".join(by_precision),
        "bytes": sum(by_precision.values()),
        "bytes by precision": by_precision,
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "context": config.n_positions,
        "vocabulary": config.vocab_size,
        "tied head": config.tie_word_embeddings,
        "tokenizer": None if tokenizer is None else f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens",
    }
    if stream.quantization is not None and stream.quantization.quality:
        facts["quality"] = stream.quantization.quality
    training = stream.directory / checkpoint.TRAINING
    if training.exists():
        try:
            facts["training"] = dict(json.loads(training.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"{training} does not hold a JSON object") from None
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        if not isinstance(value, dict):
            table.add_row(name, f"{value:,}" if type(value) is int else "none" if value is None else str(value))
    table.add_row("bytes by precision", ", ".join(f"{name} {size:,}" for name, size in by_precision.items()))
    for text, figures in facts.get("quality", {}).items():
        shown = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        table.add_row(f"quality on {text}", ", ".join(shown))
    for name, value in facts.get("training", {}).items():
        if not isinstance(value, dict):
            table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    card = stream.directory / checkpoint.CARD
    if card.exists():
        click.echo(f"card: {card}")


@cli.command()
@click.argument("model")
@click.option(
    "-p",
    "--precision",
    type=click.Choice(PRECISIONS),
    required=True,
    help="int8; int4, with the embedding and the head at 8 bits; or int4-all.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace a model that --out holds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@common_options
def quantize(model: str, precision: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Store the weights of MODEL in 8 or 4 bits."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task(f"{model} to {precision}")
        parts = checkpoint.quantize(
            locate_model(model),
            out,
            precision,
            overwrite,
            progress=lambda done, total: display.update(task, completed=done, total=total),
        )
    before, after = sum(part.bytes_before for part in parts), sum(part.bytes_after for part in parts)
    if as_json:
        rows = [
            {"kind": p.kind, "precision": p.precision, "tensors": p.tensors, "relative_error": p.relative_error}
            | {"bytes_before": p.bytes_before, "bytes_after": p.bytes_after}
            for p in parts
        ]
        record = {"path": str(out), "precision": precision, "bytes_before": before, "bytes_after": after, "parts": rows}
        click.echo(json.dumps(record, indent=2))
        return
    table = Table("weights", "stored as", *(Column(name, justify="right") for name in ("bytes", "→", "relative error")))
    for p in parts:
        error = f"{p.relative_error:.2%}" if p.squared_norm else "–"
        table.add_row(f"{p.tensors} × {p.kind}", p.precision, f"{p.bytes_before:,}", f"{p.bytes_after:,}", error)
    Console().print(table)
    click.echo(f"{before:,} → {after:,} bytes of weights, {before / after:.2f} × smaller, in {out}")


def main() -> None:
    """The entry point of the `llmfast` command."""
    cli(prog_name="llmfast")
