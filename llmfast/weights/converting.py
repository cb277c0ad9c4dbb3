"""From a model in any kind of file to one in another kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmfast.quantization.formats import QuantizedWeight
from llmfast.tokenizers import load_tokenizer
from llmfast.tokenizers.gguf_writing import metadata_of
from llmfast.weights.checkpoint import stream
from llmfast.weights.gguf import GGUFFile
from llmfast.weights.gguf_writing import TYPES, kept_values, write_gguf
from llmfast.weights.quantizing import holds_model
from llmfast.weights.saving import save
from llmfast.weights.stream import Stream

FILES = ("gguf", "safetensors")
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16}


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    type: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str | None:
    """Writes the model in `source`, with its tokenizer, to the file `target` (`to` "gguf"), or into the directory
    `target` in Hugging Face's layout (`to` "safetensors").

    `type` is one of `gguf_writing.TYPES`, for safetensors "f32" or "bf16"; by default bfloat16 of a model whose
    matrices are, and float32 of any other, which changes no number. Returns why llama.cpp can't have the tokenizer, or
    None where it does. `ValueError` or `FileNotFoundError` for a source that can't be read, a target that is the source
    or, unless `overwrite`, is there already, and arithmetic that llama.cpp does not have.
    """
    model, target = stream(source), Path(target)
    if to not in FILES:
        raise ValueError(f"a model is converted to {' or '.join(FILES)}, not to {to!r}")
    if type is None:
        type = "bf16" if model.precision_of(model.config.head_name) == "bfloat16" else "f32"
    if type not in TYPES:
        raise ValueError(f"type must be {', '.join(TYPES)}, got {type!r}")
    if target.resolve() in (model.path.resolve(), model.directory.resolve()):
        raise ValueError(f"{target} is the model to convert: name another place")
    if to == "safetensors":
        _to_safetensors(model, target, type, overwrite, progress)
        return None
    if target.is_dir():
        raise ValueError(f"{target} is a directory: name a file, such as {target / 'model.gguf'}")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already: name another file, or pass overwrite=True")
    if model.config_file is None:
        write_gguf(target, model, type, kept_values(GGUFFile(model.path)), progress)
        return None
    tokenizer = load_tokenizer(model.path)
    values, reason = metadata_of(tokenizer, model.config.vocab_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(target, model, type, values, progress)
    return reason


def _to_safetensors(
    model: Stream, target: Path, type: str, overwrite: bool, progress: Callable[[int, int], None]
) -> None:
    if type not in FLOATS:
        raise ValueError(f"safetensors are written as f32 or bf16, not {type}: llmfast quantize makes smaller ones")
    if target.is_file():
        raise ValueError(f"{target} is a file: name a directory for the model")
    if holds_model(target) and not overwrite:
        raise ValueError(f"{target} holds a model already: name another directory, or pass overwrite=True")
    state: dict[str, Tensor | QuantizedWeight] = {}
    done, sizes = 0, model.sizes
    for name, weight in model:
        floats = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        state[name] = floats.to(FLOATS[type], copy=True)
        done += sizes[name]
        progress(done, sum(sizes.values()))
    save(target, model.config, state, tokenizer_from=model.path)
