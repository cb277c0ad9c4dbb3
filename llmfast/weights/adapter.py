"""Low-rank adapters in files, as peft writes and reads them (https://github.com/huggingface/peft).

ADAPTER/
  adapter_config.json          the rank, the scale, which layers, and the name of the model that it adapts
  adapter_model.safetensors    base_model.model.NAME.lora_A.weight (r, in) and .lora_B.weight (out, r)

NAME is Hugging Face's name of a linear layer, which is ours. A layer's weight becomes W + s B A, with s = alpha / r, or
alpha / √r where it is rank-stabilised. For GPT-2, whose files hold weights transposed, `fan_in_fan_out` says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.files import write_atomic
from llmfast.models import ModelConfig, Parameter
from llmfast.quantization.formats import QuantizedWeight
from llmfast.tokenizers.protocol import TOKENIZER_FILES
from llmfast.weights.config_file import read_document
from llmfast.weights.files import Stored, stored_in, write_tensors
from llmfast.weights.stream import StoredWeight, Stream, complain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_RANK = 1 << 16
SCORE = "score.weight"  # the head of a classifier, (labels, C)
SCORE_FILE = "score.safetensors"  # which holds it beside a whole model
# What would change the arithmetic, with the values under which it does not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class Adapter:
    """Two thin matrices for each of some linear layers, float32: `pairs` holds A (r, in) and B (out, r) by the name of
    the weight that s B A is added to. `score` is the head of a classifier (labels, C), where it has one."""

    base: str  # the name, or the path, of the model that it adapts
    rank: int
    alpha: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    rank_stabilised: bool = False
    dropout: float = 0.0
    score: Tensor | None = None
    document: Mapping[str, Any] = field(default_factory=dict)  # what its file says besides

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, self.rank_stabilised)

    def delta(self, name: str, rows: slice = slice(None)) -> Tensor:
        """What is added to some rows of a weight, (rows, in) float32."""
        a, b = self.pairs[name]
        return self.scale * (b[rows] @ a)


def scale_of(rank: int, alpha: float, rank_stabilised: bool) -> float:
    """What B A is multiplied by: alpha / r (Hu et al., 2021), or alpha / √r (Kalajdzievski, 2023)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter, and no model of its own."""
    return path.is_dir() and (path / CONFIG).exists() and not (path / "config.json").exists()


def base_of(path: Path) -> str:
    """The model that an adapter is for, by the name that its file gives. `ValueError` where it gives none."""
    base = read_document(path / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path / CONFIG} does not say which model it adapts: name it, and give this as its adapter")
    return base


def read_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in a directory, checked against the model that it is to be added to.

    `FileNotFoundError` or `ValueError` in one line for what is missing, does not fit, or is not computed here.
    """
    directory = Path(path)
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(f"no adapter in {directory}: it holds no {CONFIG}")
    document = read_document(directory / CONFIG)
    rank, alpha = document.get("r"), document.get("lora_alpha")
    if document.get("peft_type") != "LORA":
        raise ValueError(f"{directory / CONFIG}: its peft_type is {document.get('peft_type')!r}, and only LORA is read")
    if not isinstance(rank, int) or not 0 < rank <= MOST_RANK:
        raise ValueError(f"{directory / CONFIG}: r must be a whole number up to {MOST_RANK}, got {rank!r:.40}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{directory / CONFIG}: lora_alpha must be a number, got {alpha!r:.40}")
    for name, neutral in NEUTRAL.items():
        if document.get(name, neutral[0]) not in neutral:
            raise ValueError(f"{directory / CONFIG} sets {name} to {document[name]!r:.80}, which is not computed here")
    if not (directory / WEIGHTS).exists():
        raise FileNotFoundError(f"no {WEIGHTS} in {directory}")
    weights = {name_of_layer(p): p for p in config.parameters() if p.is_matrix and p.block is not None}
    if bool(document.get("fan_in_fan_out")) != any(p.transposed for p in weights.values()):
        raise ValueError(
            f"{directory / CONFIG}: fan_in_fan_out is {document.get('fan_in_fan_out')!r}, which is not right for this "
            "model's family"
        )
    pairs, score = _read(directory, rank, config, weights)
    return Adapter(
        base=str(document.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        pairs=pairs,
        rank_stabilised=bool(document.get("use_rslora")),
        dropout=document["lora_dropout"] if isinstance(document.get("lora_dropout"), float) else 0.0,
        score=score,
        document=document,
    )


def _read(
    directory: Path, rank: int, config: ModelConfig, weights: Mapping[str, Parameter]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor | None]:
    """The matrices by the names of the weights, after their names and shapes were checked by the header alone."""
    found = {tensor.name: tensor for tensor in stored_in(directory / WEIGHTS)}
    wanted: dict[str, tuple[int, ...]] = {}
    layers: list[str] = []
    score: Stored | None = None
    surplus: list[str] = []
    for name in found:
        layer, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if name == PREFIX + SCORE:
            score = found[name]
        elif name.startswith(PREFIX) and layer in weights and part in ("A.weight", "B.weight"):
            if layer not in layers:
                layers.append(layer)
        else:
            surplus.append(name)
    for layer in layers:
        out, within = weights[layer].shape
        wanted[f"{PREFIX}{layer}.lora_A.weight"] = rank, within
        wanted[f"{PREFIX}{layer}.lora_B.weight"] = out, rank
    floats = ("float32", "bfloat16", "float16")
    if score is not None:
        wanted[PREFIX + SCORE] = *score.shape[:1], config.width
    problems: dict[str, Collection[str]] = {
        "missing": wanted.keys() - found.keys(),
        "not of this model:": surplus,
        "wrongly shaped:": [
            f"{n} is {found[n].shape}, not {shape}"
            for n, shape in wanted.items()
            if n in found and found[n].shape != shape
        ],
        "of the wrong type:": [f"{n} is {t.dtype}" for n, t in found.items() if t.dtype not in floats],
    }
    complain(directory, "model", problems)

    def floats_of(stored: Stored) -> Tensor:
        tensor = stored.read().to(torch.float32, copy=True)
        if not tensor.isfinite().all():
            raise ValueError(f"{directory / WEIGHTS}: {stored.name} holds infinities or NaN")
        return tensor

    pairs = {}
    for layer in layers:
        a, b = (floats_of(found[f"{PREFIX}{layer}.lora_{part}.weight"]) for part in "AB")
        pairs[weights[layer].name] = a, b
    return pairs, None if score is None else floats_of(score)


def write_adapter(directory: str | Path, adapter: Adapter, config: ModelConfig) -> None:
    """Writes both files, each as a whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        layer = PREFIX + name.removesuffix(".weight")
        tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    if adapter.score is not None:
        tensors[PREFIX + SCORE] = adapter.score
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.score is None else "SEQ_CLS",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilised,
        "target_modules": target_modules(adapter.pairs, config),
        "fan_in_fan_out": any(p.transposed for p in config.parameters()),
        "bias": "none",
        "modules_to_save": None if adapter.score is None else ["score"],
        "inference_mode": True,
    }
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    write_atomic(directory / CONFIG, (json.dumps(document, indent=2) + "\n").encode())


def target_modules(names: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """What tells peft these layers from all others: the last parts of their names, and a whole name where another layer
    ends the same way (GPT-2 has a `c_proj` in attention, and one in the MLP)."""
    layers = [name_of_layer(p) for p in config.parameters() if p.is_matrix]
    chosen = {name.removesuffix(".weight") for name in names}
    ambiguous = {layer.rpartition(".")[2] for layer in layers if layer not in chosen}
    last = {layer: layer.rpartition(".")[2] for layer in chosen}
    return sorted({layer if last[layer] in ambiguous else last[layer] for layer in chosen})


def name_of_layer(parameter: Parameter) -> str:
    return parameter.name.removesuffix(".weight")


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


def adapted(source: Stream, path: Path) -> Stream:
    """The model with the adapter in a directory, whose tokenizer is taken where it has one."""
    made = folded(source, read_adapter(path, source.config))
    has_tokenizer = any((path / name).exists() for name in TOKENIZER_FILES)
    return dataclasses.replace(made, path=path) if has_tokenizer else made
