"""`llmfast info`: what a model is."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from llmfast.cli.common import common_options
from llmfast.tokenizers import load_tokenizer
from llmfast.weights.checkpoint import stream as open_checkpoint
from llmfast.weights.locate import locate_model
from llmfast.weights.quantizing import CARD, TRAINING


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True)
@common_options
def info(model: str, as_json: bool) -> None:
    """What MODEL is: its shape, size, tokenizer and card."""
    stream = open_checkpoint(locate_model(model))
    config, tokenizer = stream.config, load_tokenizer(stream.path)
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
        "layers": config.blocks,
        "width": config.width,
        "heads": config.heads,
        "key heads": config.key_heads,
        "context": config.context,
        "vocabulary": config.vocab_size,
        "tied head": config.tie_word_embeddings,
        "tokenizer": None if tokenizer is None else f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens",
    }
    if stream.quantization is not None and stream.quantization.quality:
        facts["quality"] = stream.quantization.quality
    training, card = stream.directory / TRAINING, stream.directory / CARD
    in_a_directory = stream.config_file is not None  # what lies beside a GGUF file may be anything
    if in_a_directory and training.exists():
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
    if in_a_directory and card.exists():
        click.echo(f"card: {card}")
