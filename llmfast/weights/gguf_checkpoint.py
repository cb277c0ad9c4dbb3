"""A model in a GGUF file, a weight at a time: what the file stores is what runs, where a format here holds it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmfast.models import ModelConfig
from llmfast.quantization.formats import QuantizedWeight
from llmfast.quantization.plan import Quantization
from llmfast.weights import gguf_blocks
from llmfast.weights.files import dtype_name
from llmfast.weights.gguf import FLOATS, GGUFFile, GGUFTensor
from llmfast.weights.gguf_names import HEAD, ROTARY_FACTORS, config_of, row_order, tensor_name
from llmfast.weights.stream import Stream, complain

OTHERWISE = "q8_0"  # the format of matrices in blocks that no format here holds


@dataclass(frozen=True)
class StoredBlocks:
    """A weight in a GGUF file: its tensor, and which of its rows ours are, where they are in another order."""

    tensor: GGUFTensor
    shape: tuple[int, ...]
    format: str | None
    order: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def stored_as(self) -> str:
        kind = self.tensor.type
        return dtype_name(FLOATS[kind]) if kind in FLOATS else kind.lower()

    @property
    def in_rows(self) -> bool:
        return self.order is None

    def read(self, rows: slice | None = None) -> Tensor | QuantizedWeight:
        if self.order is not None:
            data = self._read(None)
            order = self.order if rows is None else self.order[rows]
            if isinstance(data, Tensor):
                return data[order]
            parts = {name: part[order] for name, part in data.parts.items()}
            return QuantizedWeight(data.precision, (len(order), data.shape[1]), parts)
        return self._read(rows)

    def _read(self, rows: slice | None) -> Tensor | QuantizedWeight:
        if self.format is None:
            return gguf_blocks.floats(self.tensor, rows)
        return gguf_blocks.quantized(self.tensor.type, self.tensor.read(rows), self.shape[1])


def stream_gguf(path: Path) -> Stream:
    """Opens the model in a GGUF file; `checkpoint.stream` does for any file.

    Its `precision` is that of most of its weights. Matrices in other blocks than those of `gguf_blocks.FORMATS` come as
    floats, and as `OTHERWISE` where they run as what the file stores.
    """
    file = GGUFFile(path)
    config = config_of(file)
    if config.blocks > len(file.tensors):  # before anything is made for each of them
        raise ValueError(f"{path} holds {len(file.tensors)} tensors, too few for {config.blocks} blocks")
    weights, formats, sizes = {}, {}, Counter[str]()
    for parameter in config.parameters():
        tensor = file.tensors.get(tensor_name(parameter))
        if tensor is None:
            continue
        form = gguf_blocks.FORMATS.get(tensor.type) if parameter.is_matrix else None
        weights[parameter.name] = StoredBlocks(tensor, parameter.shape, form, row_order(config, parameter))
        if parameter.is_matrix and tensor.type not in FLOATS:
            formats[parameter.name] = form or OTHERWISE
            sizes[formats[parameter.name]] += parameter.size
    _check(file, config, weights)
    quantization = Quantization(sizes.most_common(1)[0][0], formats) if formats else None
    return Stream(path, config, quantization, weights)


def _check(file: GGUFFile, config: ModelConfig, weights: dict[str, StoredBlocks]) -> None:
    """One error for all that is missing, surplus, of another shape, or can't be read."""
    names = {tensor_name(parameter): parameter.shape for parameter in config.parameters()}
    ignored = {ROTARY_FACTORS, *([HEAD] if config.tie_word_embeddings else [])}
    both = [(name, file.tensors[name], shape) for name, shape in names.items() if name in file.tensors]
    problems = {
        "missing": names.keys() - file.tensors.keys(),
        "surplus": file.tensors.keys() - names.keys() - ignored,
        "wrongly shaped:": [f"{name} is {t.shape}, not {shape}" for name, t, shape in both if t.shape != shape],
        "of a type that is not read:": [f"{n} is {t.type}" for n, t, _ in both if not gguf_blocks.is_readable(t.type)],
    }
    complain(file.path, "metadata", problems)
