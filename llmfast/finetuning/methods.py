"""What is trained of a model, and the files that hold it.

A method says which parameters take gradients (`apply`), and how they stand in files: in a checkpoint by themselves
(`write`, `read`), and in the run's directory as something that `load` takes (`export`, and `read_export` back).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmfast.finetuning import lora
from llmfast.finetuning.configuration import MethodSettings
from llmfast.models import Bottlenecks, LanguageModel, ModelConfig, bottleneck
from llmfast.quantization.formats import QuantizedWeight
from llmfast.training import checkpoints
from llmfast.weights.adapter import SCORE, SCORE_FILE, Adapter, read_adapter, write_adapter
from llmfast.weights.bottleneck import read_bottlenecks, write_bottlenecks
from llmfast.weights.checkpoint import load as load_weights
from llmfast.weights.saving import copy_tokenizer, save
from llmfast.weights.stream import Stream

TRAINED = "trained.safetensors"


class Method(ABC):
    """`source` is the model that is tuned, `base` its name, as an adapter's file is to give it, `tokenizer_from` the
    place of its tokenizer. `kinds` are what `MasterWeights` needs to know of what is trained."""

    whole_weights: bool  # whether some of the model's own weights are trained, which float32 is then kept of

    def __init__(self, settings: MethodSettings, source: Stream, base: str, tokenizer_from: Path):
        self.settings, self.source, self.base, self.tokenizer_from = settings, source, base, tokenizer_from

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @abstractmethod
    def apply(self, model: LanguageModel) -> None:
        """Takes gradients from what is not trained, and puts in what is."""

    @abstractmethod
    def export(self, directory: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None: ...

    @abstractmethod
    def read_export(self, directory: Path) -> Mapping[str, Tensor]: ...

    def write(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        checkpoints.save_tensors(directory / TRAINED, state)

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        return checkpoints.load_tensors(directory / TRAINED)

    def companions(self, directory: Path) -> None:
        copy_tokenizer(self.tokenizer_from, directory)


class LoRA(Method):
    """Low-rank adapters, and a classifier's head where there is one; exported as peft's files."""

    whole_weights = False

    def apply(self, model: LanguageModel) -> None:
        s = self.settings
        lora.put_in(model, lora.targets(self.config, s.targets), s.rank, s.alpha, s.rslora, s.lora_dropout)

    def export(self, directory: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        s = self.settings
        rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
        pairs, score = lora.pairs_of(rounded), rounded.get(SCORE)
        adapter = Adapter(self.base, s.rank, s.alpha, pairs, s.rslora, s.lora_dropout, score)
        write_adapter(directory, adapter, self.config)

    def read_export(self, directory: Path) -> Mapping[str, Tensor]:
        adapter = read_adapter(directory, self.config)
        return lora.state_of(adapter.pairs) | ({} if adapter.score is None else {SCORE: adapter.score})


class BottleneckAdapters(Method):
    """Bottlenecks after both halves of each block, and a classifier's head where there is one."""

    whole_weights = False

    def apply(self, model: LanguageModel) -> None:
        model.requires_grad_(False)
        bottleneck.put_in(model, bottleneck.places(self.config, self.settings.targets), self.settings.bottleneck)

    def export(self, directory: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        added = {name: tensor.to(dtype) for name, tensor in state.items()}
        score = added.pop(SCORE, None)
        write_bottlenecks(directory, Bottlenecks(self.base, self.settings.bottleneck, added, score))

    def read_export(self, directory: Path) -> Mapping[str, Tensor]:
        found = read_bottlenecks(directory, self.config)
        return dict(found.state) | ({} if found.score is None else {SCORE: found.score})


class Head(LoRA):
    """Only a classifier's head: an adapter's files without an adapter."""

    def apply(self, model: LanguageModel) -> None:
        model.requires_grad_(False)


class Weights(Method):
    """Some of the model's own weights, or all; exported as a whole model."""

    whole_weights = True

    def apply(self, model: LanguageModel) -> None:
        chosen = self.chosen()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)

    def chosen(self) -> set[str]:
        """The names of what is trained."""
        return {p.name for p in self.config.parameters()}

    def export(self, directory: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        trained = {name: tensor.to(dtype) for name, tensor in state.items()}
        missing = {p.name for p in self.config.parameters()} - trained.keys()
        for name, weight in self.source if missing else ():
            if name in missing:
                floats = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
                trained[name] = floats.to(dtype)
        save(directory, self.config, trained, tokenizer_from=None)
        if SCORE in trained:
            checkpoints.save_tensors(directory / SCORE_FILE, {SCORE: trained[SCORE]})

    def read_export(self, directory: Path) -> Mapping[str, Tensor]:
        state = load_weights(directory)[1]
        head = directory / SCORE_FILE
        return state | (checkpoints.load_tensors(head) if head.exists() else {})


class LastLayers(Weights):
    """The last blocks, and the norm after them."""

    def chosen(self) -> set[str]:
        first = self.config.blocks - self.settings.layers
        if first < 0:
            raise ValueError(f"layers is {self.settings.layers}, and the model has {self.config.blocks}")
        return {
            p.name
            for p in self.config.parameters()
            if p.role == "final_norm" or (p.block is not None and p.block >= first)
        }


BY_NAME: dict[str, type[Method]] = {
    "lora": LoRA,
    "adapter": BottleneckAdapters,
    "full": Weights,
    "last-layers": LastLayers,
    "head": Head,
}
