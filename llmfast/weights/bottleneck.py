"""Bottleneck adapters in files, laid out as peft lays out low-rank ones, under a type of their own (peft has none).

ADAPTER/
  adapter_config.json          "peft_type": "BOTTLENECK", the size m, and the name of the model that they are for
  adapter_model.safetensors    base_model.model.NAME.adapter.down.weight (m, C), .down.bias, .up.weight (C, m), .up.bias
"""

from __future__ import annotations

from pathlib import Path

from llmfast.models import Bottlenecks, ModelConfig, bottleneck
from llmfast.weights.adapter import CONFIG, MOST_RANK, name_of_layer, read_kind, read_parts, write_parts

BOTTLENECK = "BOTTLENECK"
ACTIVATION = "gelu"


def read_bottlenecks(path: str | Path, config: ModelConfig) -> Bottlenecks:
    """Those in a directory, checked against the model that they are for.

    `FileNotFoundError` or `ValueError` in one line for what is missing, does not fit, or is not computed here.
    """
    directory = Path(path)
    document = read_kind(directory, BOTTLENECK)
    size, activation = document.get("bottleneck_size"), document.get("non_linearity")
    if type(size) is not int or not 0 < size <= MOST_RANK:
        raise ValueError(f"{directory / CONFIG}: bottleneck_size must be up to {MOST_RANK}, got {size!r:.40}")
    if activation != ACTIVATION:
        raise ValueError(
            f"{directory / CONFIG}: non_linearity is {activation!r:.40}, and only {ACTIVATION} is computed"
        )
    shapes = {name_of_layer(p): bottleneck.shapes(p, size) for p in bottleneck.places(config)}
    parts, score = read_parts(directory, config, shapes)
    state = {layer + part: tensor for layer, of in parts.items() for part, tensor in of.items()}
    return Bottlenecks(str(document.get("base_model_name_or_path") or ""), size, state, score)


def write_bottlenecks(directory: str | Path, bottlenecks: Bottlenecks) -> None:
    """Writes both files, each as a whole or not at all."""
    document = {
        "peft_type": BOTTLENECK,
        "base_model_name_or_path": bottlenecks.base,
        "bottleneck_size": bottlenecks.size,
        "non_linearity": ACTIVATION,
    }
    write_parts(Path(directory), bottlenecks.state, bottlenecks.score, document)
