"""A model with an adapter from a file: a low-rank one goes into its weights as they are read, another beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmfast.models import Bottlenecks, ModelConfig
from llmfast.quantization.formats import QuantizedWeight
from llmfast.tokenizers.protocol import TOKENIZER_FILES
from llmfast.weights.adapter import Adapter, kind_of, read_adapter
from llmfast.weights.bottleneck import BOTTLENECK, read_bottlenecks
from llmfast.weights.stream import StoredWeight, Stream


@dataclass(frozen=True)
class Folded:
    """A stored weight as floats, with what an adapter adds to it, if anything."""

    stored: StoredWeight
    adapter: Adapter
    name: str

    format = None

    @property
    def in_rows(self) -> bool:
        return self.stored.in_rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def stored_as(self) -> str:
        return self.stored.stored_as

    def read(self, rows: slice | None = None) -> Tensor:
        """In float32: rounded only once, to what the model is to be."""
        weight = self.stored.read(rows)
        floats = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
        if self.name not in self.adapter.pairs:
            return floats
        return floats + self.adapter.delta(self.name, rows or slice(None))


def folded(source: Stream, adapter: Adapter) -> Stream:
    """The model with an adapter in its weights: all of them floats, whatever the file holds."""
    weights = {
        name: Folded(weight, adapter, name) if name in adapter.pairs or weight.format is not None else weight
        for name, weight in source.weights.items()
    }
    return dataclasses.replace(source, weights=weights, quantization=None)


def read_any(path: Path, config: ModelConfig) -> Adapter | Bottlenecks:
    """The adapter in a directory, of either kind; `FileNotFoundError` or `ValueError` in one line."""
    return read_bottlenecks(path, config) if kind_of(path) == BOTTLENECK else read_adapter(path, config)


def adapted(source: Stream, path: Path) -> Stream:
    """The model with the adapter in a directory, whose tokenizer is taken where it has one. `ValueError` where it has
    bottlenecks already."""
    adapter = read_any(path, source.config)
    if source.bottlenecks is not None:
        raise ValueError(f"{path} adapts a model that has bottlenecks: what it adds must be beside the model alone")
    if isinstance(adapter, Bottlenecks):
        made = dataclasses.replace(source, bottlenecks=adapter)
    else:
        made = folded(source, adapter)
    has_tokenizer = any((path / name).exists() for name in TOKENIZER_FILES)
    return dataclasses.replace(made, path=path) if has_tokenizer else made
