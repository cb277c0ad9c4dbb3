"""Writing a model: `config.json`, `model.safetensors` and the tokenizer's files, each as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmfast.files import write_atomic
from llmfast.models import ModelConfig
from llmfast.quantization.formats import QuantizedWeight
from llmfast.quantization.plan import Quantization
from llmfast.tokenizers import load_tokenizer
from llmfast.tokenizers.protocol import TOKENIZER_FILES
from llmfast.weights.checkpoint import part_name
from llmfast.weights.config_file import write_config
from llmfast.weights.files import dtype_name, write_tensors


def save(
    path: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor | QuantizedWeight],
    tokenizer_from: Path | None = None,
    precision: str | None = None,
    **metadata: Any,
) -> None:
    """Writes `config.json` and `model.safetensors` into the directory `path`, and copies the tokenizer's files.

    Weights of `state` may be quantised; `precision` then says by which plan they were chosen, and stands with them.
    """
    parameters = [(parameter, state[parameter.name]) for parameter in config.parameters()]
    formats = {p.name: weight.precision for p, weight in parameters if isinstance(weight, QuantizedWeight)}
    if bool(formats) != (precision is not None):
        raise ValueError(f"precision is {precision!r}, and {len(formats)} of the weights are quantised")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for p, weight in parameters:
        if isinstance(weight, QuantizedWeight):
            tensors |= {part_name(p.name, part): tensor for part, tensor in weight.parts.items()}
        else:
            tensors[p.name] = weight.t() if p.transposed else weight
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt"} | {key: str(value) for key, value in metadata.items()}
    write_tensors(directory / "model.safetensors", tensors, header)
    dtype = next(dtype_name(weight.dtype) for _, weight in parameters if isinstance(weight, Tensor))
    quantization = None if precision is None else Quantization(precision, formats)
    write_config(directory / "config.json", config, dtype, quantization)
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the tokenizer's files from a model's directory, or from beside its file; a GGUF file's are written."""
    if source.suffix == ".gguf":
        tokenizer = load_tokenizer(source)
        if tokenizer is not None:
            tokenizer.save(directory)
        return
    source = source if source.is_dir() else source.parent
    if source.resolve() != directory.resolve():
        for file in TOKENIZER_FILES:
            if (source / file).exists():
                write_atomic(directory / file, (source / file).read_bytes())
