"""A model's weights in Hugging Face's layout, a tensor at a time, under the names that its configuration states.

Files differ from a state dict in three ways: some families store linear layers transposed, names may lack the family's
prefix, and a tied head is left out. Quantised weights are this project's own: `config.json` lists them under
"llmfast_quantization", and NAME.weight holds the integers, NAME.weight_scale their scale, and so on for the parts that
`llmfast.quantization.encodings` gives the format, whose matrices are (out, in).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmfast.models import ModelConfig
from llmfast.quantization.formats import QuantizedWeight, layout
from llmfast.weights.adapter import base_of, is_adapter
from llmfast.weights.config_file import config_file, read_config, read_quantization
from llmfast.weights.files import FLOATS, Stored, dtype_name, stored_in, weight_files
from llmfast.weights.folding import adapted
from llmfast.weights.gguf_checkpoint import stream_gguf
from llmfast.weights.locate import locate_model
from llmfast.weights.stream import StoredWeight, Stream, complain

HEAD = "lm_head.weight"
MOST_ADAPTERS = 8  # one on top of the other
# Causal masks and frequencies that old checkpoints carry, and that are made anew.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def stream(path: str | Path, depth: int = 0) -> Stream:
    """Opens the model in a directory or a single file, to be read a tensor at a time.

    A directory holds `config.json` and `model.safetensors` (or several with an index), or `pytorch_model.bin`; a
    single file's configuration is `config.json` beside it, but for a `.gguf` file, which says everything itself. A
    directory with an adapter and no model (see `adapter`) is the model that it names, with the adapter in it. Every
    name, shape and dtype has been checked when this returns, from the headers alone. `FileNotFoundError` or
    `ValueError` in one line otherwise.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}")
    if path.suffix == ".gguf":
        return stream_gguf(path)
    if is_adapter(path):
        return _with_base(path, depth)
    file = config_file(path)
    config = read_config(file)
    files = weight_files(path) if path.is_dir() else [path]
    tensors = [tensor for file in files for tensor in stored_in(file)]
    if config.blocks > len(tensors):  # before anything is made for each of them
        raise ValueError(
            f"{path} does not fit its config.json: {len(tensors)} tensors are too few for {config.blocks} blocks"
        )
    quantized = read_quantization(file, config)
    formats = {} if quantized is None else quantized.weights
    return Stream(path, config, quantized, *fitting(tensors, config, formats, path), file)


def _with_base(path: Path, depth: int) -> Stream:
    """The model that the adapter in a directory names, which may again be one with an adapter."""
    if depth > MOST_ADAPTERS:
        raise ValueError(f"{path} is an adapter of an adapter, and so on: more than {MOST_ADAPTERS} deep")
    base = base_of(path)
    try:
        place = locate_model(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} adapts the model {base!r}: {error}") from None
    return adapted(stream(place, depth + 1), path)


def load(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the weights under the state dict's names, quantised ones as float32; see `stream`."""
    source = stream(path)
    tensors = {
        name: weight.dequantize()
        if isinstance(weight, QuantizedWeight)
        else weight.clone(memory_format=torch.contiguous_format)  # no longer a part of the file
        for name, weight in source
    }
    if source.config.tie_word_embeddings:
        tensors[HEAD] = tensors[source.config.head_name]
    return source.config, tensors


@dataclass(frozen=True)
class StoredParts:
    """A quantised weight of `shape` (N, K) in a file: a tensor for each part of its format."""

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, Stored]
    in_rows: bool = True

    @property
    def stored_as(self) -> str:
        return self.format

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self, rows: slice | None = None) -> QuantizedWeight:
        parts = {name: part.read(rows) for name, part in self.parts.items()}
        return QuantizedWeight(self.format, (len(parts["values"]), self.shape[1]), parts)


def part_name(name: str, part: str) -> str:
    """The name under which a part of a quantised weight is stored: its values under the weight's own."""
    return name if part == "values" else f"{name}_{part}"


def fitting(
    tensors: list[Stored], config: ModelConfig, formats: Mapping[str, str], path: Path
) -> tuple[dict[str, StoredWeight], Stored | None]:
    """The weights by this model's names, and the copy of a tied head; all that does not fit is listed in one error."""
    found: dict[str, Stored] = {}
    twice = []
    transposed = {parameter.name for parameter in config.parameters() if parameter.transposed}
    for tensor in tensors:
        name = tensor.name
        if name.endswith(BUFFERS):
            continue
        if not name.startswith((config.prefix, HEAD)):
            name = config.prefix + name
        if config.unused and name.startswith(config.unused):
            continue
        if name in transposed and name not in formats and len(tensor.shape) == 2:
            tensor = dataclasses.replace(tensor, shape=tensor.shape[::-1], transposed=True)
        if name in found:
            twice.append(name)
        found[name] = tensor
    tied_head = found.pop(HEAD, None) if config.tie_word_embeddings else None

    expected = _expected(config, formats)
    both = [(name, found[name], *expected[name]) for name in expected if name in found]
    problems = {
        "missing": expected.keys() - found.keys(),
        "surplus": found.keys() - expected.keys(),
        "stored twice:": twice,
        "wrongly shaped:": [f"{n} is {t.shape}, not {shape}" for n, t, shape, _ in both if t.shape != shape],
        "of the wrong type:": [f"{n} is {t.dtype}, not {' or '.join(d)}" for n, t, _, d in both if t.dtype not in d],
    }
    complain(path, "config.json", problems)
    weights: dict[str, StoredWeight] = {}
    for parameter in config.parameters():
        name = parameter.name
        if name in formats:
            parts = {part: found[part_name(name, part)] for part in layout(formats[name], parameter.shape)}
            weights[name] = StoredParts(formats[name], parameter.shape, parts)
        else:
            weights[name] = found[name]
    return weights, tied_head


def _expected(config: ModelConfig, formats: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """The shape of every tensor that a file should hold, and the dtypes that it may have."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, shape in ((parameter.name, parameter.shape) for parameter in config.parameters()):
        expected[name] = shape, FLOATS
        if name in formats:
            for part, (part_shape, dtype) in layout(formats[name], shape).items():
                expected[part_name(name, part)] = part_shape, (dtype_name(dtype),)
    return expected
