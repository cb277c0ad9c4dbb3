"""From a model's files to its module, in PyTorch's dtypes or with its matrices in 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from llmfast.models import FAMILIES, Bert, BertConfig, LanguageModel, bottleneck, create
from llmfast.quantization import modules
from llmfast.quantization.formats import QuantizedWeight, quantize
from llmfast.quantization.plan import plan
from llmfast.weights.checkpoint import stream
from llmfast.weights.locate import locate_model
from llmfast.weights.stream import Stream

Model = TypeVar("Model", bound=LanguageModel)


def read_model(path: str | Path, dtype: torch.dtype = torch.float32, family: type[Model] = LanguageModel) -> Model:  # type: ignore[assignment]
    """The model at `path` (see `locate_model`), its quantised weights as the floats that they stand for.

    `FileNotFoundError` or `ValueError` with one line naming what is missing, surplus, wrongly shaped, or that the model
    is not of the `family`.
    """
    source = stream(locate_model(path))
    if not source.config.generates:
        raise ValueError(f"{path} is an encoder, not a {family.__name__}: llmfast.Embedder reads it")
    found = next(f for f in FAMILIES.values() if f.config_class is type(source.config))
    if not issubclass(found, family):
        raise ValueError(
            f"{path} is a {found.__name__}, not a {family.__name__}: read it by llmfast.models.from_pretrained"
        )
    return module_of(source, dtype)  # type: ignore[return-value]


def module_of(source: Stream, dtype: torch.dtype, precision: str | None = None) -> LanguageModel:
    """The module in `dtype`; with the `precision` of a quantised model its matrices are the floats which that has."""
    with torch.device("meta"):  # no time spent on initial weights that are replaced at once
        model = create(source.config)
    formats = {} if precision is None else formats_of(source, precision)
    model.load_state_dict(_floats(source.alone, dtype, formats), strict=False, assign=True)
    model.tie_head()
    return _with_bottlenecks(model, source)


def encoder_of(source: Stream, dtype: torch.dtype) -> Bert:
    """The module of an encoder in `dtype`."""
    assert isinstance(source.config, BertConfig)
    with torch.device("meta"):
        model = Bert(source.config)
    model.load_state_dict(_floats(source, dtype, {}), assign=True)
    return model.eval()


def _floats(source: Stream, dtype: torch.dtype, formats: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict in `dtype`, no longer a part of the file; what `formats` names is rounded to them before."""
    state = {}
    for name, weight in in_formats(source, formats):
        floats = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        state[name] = floats.to(dtype, memory_format=torch.contiguous_format, copy=True)
    return state


def quantized_module(
    source: Stream, precision: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LanguageModel:
    """The module with its matrices as integers: those of the file, where it was quantised in just this precision."""
    with torch.device("meta"):
        model = create(source.config)
    weights = in_formats(source.alone, formats_of(source, precision))
    return _with_bottlenecks(modules.fill(model, precision, weights, dtype, device), source)


def _with_bottlenecks(model: Model, source: Stream) -> Model:
    model.source = source.path
    if source.bottlenecks is not None:
        bottleneck.load(model, source.bottlenecks)
    return model.eval()


def in_formats(source: Stream, formats: Mapping[str, str]) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """The tensors of a model, those that `formats` names in these formats, and all others as floats."""
    for name, weight in source.tensors(formats):
        if isinstance(weight, QuantizedWeight) and weight.precision != formats.get(name):
            floats = weight.dequantize()
            yield name, quantize(floats, formats[name]) if name in formats else floats
        else:
            yield name, weight


def formats_of(source: Stream, precision: str) -> Mapping[str, str]:
    """The format of each quantised weight: the file's own, where it was quantised in just this precision."""
    return stored_formats(source, precision) or plan(source.config, precision)


def stored_formats(source: Stream, precision: str) -> Mapping[str, str] | None:
    """The formats of the weights, where the file was quantised in just this precision."""
    stored = source.quantization
    return stored.weights if stored is not None and stored.precision == precision else None
