"""Low-rank adapters in files, as peft writes and reads them (https://github.com/huggingface/peft).

ADAPTER/
  adapter_config.json          the rank, the scale, which layers, and the name of the model that it adapts
  adapter_model.safetensors    base_model.model.NAME.lora_A.weight (r, in) and .lora_B.weight (out, r)

NAME is Hugging Face's name of a linear layer, which is ours. A layer's weight becomes W + s B A, with s = alpha / r, or
alpha / √r where it is rank-stabilised. For GPT-2, whose files hold weights transposed, `fan_in_fan_out` says so.
"""

from __future__ import annotations

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
from llmfast.weights.config_file import read_document
from llmfast.weights.files import stored_in, write_tensors
from llmfast.weights.stream import complain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
MOST_RANK = 1 << 16
SCORE = "score.weight"  # the head of a classifier, (labels, C), or (labels, 2 C) where it reads two states of a text
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
    the weight that s B A is added to. `score` is the head of a classifier, where it has one."""

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


def kind_of(directory: Path) -> str:
    """The adapter's peft_type. `FileNotFoundError` where there is none."""
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(f"no adapter in {directory}: it holds no {CONFIG}")
    return str(read_document(directory / CONFIG).get("peft_type"))


def read_kind(directory: Path, kind: str) -> dict[str, Any]:
    """The configuration of an adapter of this kind; `ValueError` for one of another."""
    found = kind_of(directory)
    if found != kind:
        raise ValueError(f"{directory / CONFIG}: its peft_type is {found!r}, and only {kind} is read here")
    return read_document(directory / CONFIG)


def read_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in a directory, checked against the model that it is to be added to.

    `FileNotFoundError` or `ValueError` in one line for what is missing, does not fit, or is not computed here.
    """
    directory = Path(path)
    document = read_kind(directory, "LORA")
    rank, alpha = document.get("r"), document.get("lora_alpha")
    if not isinstance(rank, int) or not 0 < rank <= MOST_RANK:
        raise ValueError(f"{directory / CONFIG}: r must be a whole number up to {MOST_RANK}, got {rank!r:.40}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{directory / CONFIG}: lora_alpha must be a number, got {alpha!r:.40}")
    for name, neutral in NEUTRAL.items():
        if document.get(name, neutral[0]) not in neutral:
            raise ValueError(f"{directory / CONFIG} sets {name} to {document[name]!r:.80}, which is not computed here")
    weights = {name_of_layer(p): p for p in config.parameters() if p.is_matrix and p.block is not None}
    if bool(document.get("fan_in_fan_out")) != any(p.transposed for p in weights.values()):
        raise ValueError(
            f"{directory / CONFIG}: fan_in_fan_out is {document.get('fan_in_fan_out')!r}, which is not right for this "
            "model's family"
        )
    shapes = {n: {LORA_A: (rank, p.shape[1]), LORA_B: (p.shape[0], rank)} for n, p in weights.items()}
    parts, score = read_parts(directory, config, shapes)
    return Adapter(
        base=str(document.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        pairs={weights[layer].name: (of[LORA_A], of[LORA_B]) for layer, of in parts.items()},
        rank_stabilised=bool(document.get("use_rslora")),
        dropout=document["lora_dropout"] if isinstance(document.get("lora_dropout"), float) else 0.0,
        score=score,
        document=document,
    )


def read_parts(
    directory: Path, config: ModelConfig, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
    """What a file holds for some of a model's layers, float32, and a classifier's head, if it holds one.

    `shapes` gives those of all parts of every layer that may have them, by the layer's NAME and by what follows it in
    the name of the part. Names, shapes and dtypes are checked by the file's header alone. `FileNotFoundError` or
    `ValueError` in one line.
    """
    if not (directory / WEIGHTS).exists():
        raise FileNotFoundError(f"no {WEIGHTS} in {directory}")
    found = {tensor.name: tensor for tensor in stored_in(directory / WEIGHTS)}
    owners = {f"{PREFIX}{layer}{part}": layer for layer, parts in shapes.items() for part in parts}
    layers = list(dict.fromkeys(owners[name] for name in found if name in owners))
    wanted = {f"{PREFIX}{layer}{part}": shape for layer in layers for part, shape in shapes[layer].items()}
    if PREFIX + SCORE in found:
        shape = found[PREFIX + SCORE].shape
        wanted[PREFIX + SCORE] = *shape[:1], 2 * config.width if shape[1:] == (2 * config.width,) else config.width
    floats = ("float32", "bfloat16", "float16")
    problems: dict[str, Collection[str]] = {
        "missing": wanted.keys() - found.keys(),
        "not of this model:": found.keys() - wanted.keys(),
        "wrongly shaped:": [
            f"{n} is {found[n].shape}, not {shape}"
            for n, shape in wanted.items()
            if n in found and found[n].shape != shape
        ],
        "of the wrong type:": [f"{n} is {t.dtype}" for n, t in found.items() if t.dtype not in floats],
    }
    complain(directory, "model", problems)

    def floats_of(name: str) -> Tensor:
        tensor = found[name].read().to(torch.float32, copy=True)
        if not tensor.isfinite().all():
            raise ValueError(f"{directory / WEIGHTS}: {name} holds infinities or NaN")
        return tensor

    parts = {layer: {part: floats_of(f"{PREFIX}{layer}{part}") for part in shapes[layer]} for layer in layers}
    return parts, floats_of(PREFIX + SCORE) if PREFIX + SCORE in found else None


def write_parts(directory: Path, tensors: Mapping[str, Tensor], score: Tensor | None, document: Any) -> None:
    """Writes both files, each as a whole or not at all: `tensors` by the names of their layers, `document` but for what
    all kinds of adapters have in common."""
    directory.mkdir(parents=True, exist_ok=True)
    several = dict(tensors) if score is None else {**tensors, SCORE: score}
    floats = {PREFIX + name: tensor.detach().float().cpu().contiguous() for name, tensor in several.items()}
    document |= {
        "task_type": "CAUSAL_LM" if score is None else "SEQ_CLS",
        "modules_to_save": None if score is None else ["score"],
        "inference_mode": True,
    }
    write_tensors(directory / WEIGHTS, floats, {"format": "pt"})
    write_atomic(directory / CONFIG, (json.dumps(document, indent=2) + "\n").encode())


def write_adapter(directory: str | Path, adapter: Adapter, config: ModelConfig) -> None:
    """Writes both files, each as a whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        layer = name.removesuffix(".weight")
        tensors |= {layer + LORA_A: a, layer + LORA_B: b}
    document = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilised,
        "target_modules": target_modules(adapter.pairs, config),
        "fan_in_fan_out": any(p.transposed for p in config.parameters()),
        "bias": "none",
    }
    write_parts(Path(directory), tensors, adapter.score, document)


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
