"""The architectures, one file each, and what the house asks of any of them.

A file states a family twice over: its parameters and arithmetic without a tensor (a `ModelConfig`), and its forward
pass (a `LanguageModel`). What it has to do to join is one line in `FAMILIES` (`docs/add-an-architecture.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmfast.models import gpt2, llama
from llmfast.models.architecture import ENDS, MATRICES, Arithmetic, ModelConfig, Parameter, Rotary, Shape
from llmfast.models.bert import Bert, BertConfig
from llmfast.models.bottleneck import Bottlenecks
from llmfast.models.gpt2 import GPT, GPTConfig
from llmfast.models.language_model import FLOATS, LanguageModel, float_name
from llmfast.models.llama import Llama, LlamaConfig

__all__ = [
    "ENCODERS",
    "ENDS",
    "FAMILIES",
    "FLOATS",
    "GPT",
    "MATRICES",
    "PRESETS",
    "Arithmetic",
    "Bert",
    "BertConfig",
    "Bottlenecks",
    "GPTConfig",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "Parameter",
    "Rotary",
    "Shape",
    "config_from_document",
    "create",
    "float_name",
    "from_pretrained",
    "register_family",
    "shaped",
]

FAMILIES: dict[str, type[LanguageModel]] = {}  # by config.json's model_type
ENCODERS: dict[str, type[Bert]] = {"bert": Bert}  # which turn text into vectors, and generate none
PRESETS: dict[str, ModelConfig] = gpt2.PRESETS | {name: LlamaConfig(**fields) for name, fields in llama.PRESETS.items()}


def register_family(model: type[LanguageModel]) -> type[LanguageModel]:
    """Makes an architecture known under its `model_types`, to files and to `create`."""
    for name in model.config_class.model_types:
        FAMILIES[name] = model
    return model


register_family(GPT)
register_family(Llama)


def create(config: ModelConfig) -> LanguageModel:
    """An untrained model of this shape."""
    return next(family for family in FAMILIES.values() if family.config_class is type(config))(config)


def shaped(family: str, shape: Shape) -> ModelConfig:
    """A new model of a family, by its model_type. `ValueError` for one that is not known, or has no such shape."""
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family].config_class.shaped(shape, family)


def config_from_document(document: Mapping[str, Any]) -> ModelConfig:
    """What a `config.json` says of a model of any family; without a `model_type` it is GPT-2.

    `ValueError` names a family that is not known, or a setting that is missing, wrong or not computed here.
    """
    kind = document.get("model_type", "gpt2")
    known: dict[str, Any] = {**FAMILIES, **ENCODERS}
    if kind not in known:
        raise ValueError(f"it describes a {kind!r} model; the families that run are {', '.join(known)}")
    config: ModelConfig = known[kind].config_class.from_document(document)
    return config


def from_pretrained(path: str | Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Reads a checkpoint of any family; see `LanguageModel.from_pretrained`."""
    return LanguageModel.from_pretrained(path, dtype)
