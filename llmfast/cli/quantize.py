"""`llmfast quantize`: a model in 8 or 4 bits."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from llmfast.cli.common import common_options
from llmfast.quantization.plan import PRECISIONS
from llmfast.weights.locate import locate_model
from llmfast.weights.quantizing import quantize_checkpoint


@click.command()
@click.argument("model")
@click.option(
    "-p",
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    required=True,
    help="int8; int4, with the embedding and the head at 8 bits; int4-all; or ggml's formats q8_0, q4_1 and q4_k.",
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
        parts = quantize_checkpoint(
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
