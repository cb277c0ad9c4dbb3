"""A model's `config.json`: its family and shape, how it is quantised, and what its card recommends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfast.files import write_atomic
from llmfast.models import ModelConfig, config_from_document
from llmfast.quantization.plan import PRECISIONS, Quantization

RECOMMENDED = "llmfast_precision"  # the precision that its card measured to be as good, and faster
QUANTIZATION = "llmfast_quantization"


def config_file(path: Path) -> Path:
    """The `config.json` of a model that is a directory, or that lies beside a weight file."""
    return (path if path.is_dir() else path.parent) / "config.json"


def read_config(file: Path) -> ModelConfig:
    """`ValueError` in one line for a family or a setting that is not computed here."""
    try:
        return config_from_document(read_document(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_quantization(file: Path, config: ModelConfig) -> Quantization | None:
    """How the weights are quantised, or None where they are floats."""
    document = read_document(file)
    if QUANTIZATION not in document:
        return None
    try:
        return Quantization.from_document(document[QUANTIZATION], config)
    except ValueError as error:
        raise ValueError(f"{file}: {QUANTIZATION} is not understood: {error}") from None


def write_config(file: Path, config: ModelConfig, dtype: str, quantization: Quantization | None = None) -> None:
    """`dtype` is torch's name for that of the weights that are floats."""
    document = config.to_document() | {"dtype": dtype}
    if quantization is not None:
        document[QUANTIZATION] = quantization.to_document()
    write_atomic(file, json.dumps(document, indent=2).encode())


def record_quality(directory: str | Path, quality: Mapping[str, Mapping[str, float]]) -> None:
    """Notes what was measured of a quantised model in its `config.json`: for each text the figures by name."""
    file = Path(directory) / "config.json"
    quantized = read_quantization(file, read_config(file))
    if quantized is None:
        raise ValueError(f"{directory} is not quantised: its quality is that of the model itself")
    document = read_document(file)
    document[QUANTIZATION] = dataclasses.replace(quantized, quality=quality).to_document()
    write_atomic(file, json.dumps(document, indent=2).encode())


def recommended_precision(file: Path) -> str | None:
    """The precision to run a model in on a CPU that its `config.json` recommends."""
    recommended = read_document(file).get(RECOMMENDED)
    if recommended not in (None, "fp32", "bf16", *PRECISIONS):
        raise ValueError(f"{file} recommends {RECOMMENDED} {recommended!r}, which is not known")
    return recommended


def end_tokens(path: Path) -> list[int]:
    """The ids that `generation_config.json` says end a text; none where there is no such file."""
    file = config_file(path).with_name("generation_config.json")
    if path.suffix == ".gguf" or not file.exists():
        return []
    ends = read_document(file).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{file}: eos_token_id should be an id or a list of ids, got {ends!r:.80}")
    return ids


def read_document(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if not file.exists():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        document.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None
    return document
