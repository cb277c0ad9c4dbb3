"""A trainer that begins from nothing: a model of the shape that is asked for, over prepared tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmfast.models import ModelConfig, Shape, create, shaped
from llmfast.training.configuration import TrainingConfig
from llmfast.training.dataset import BlockBatches, TokenDataset, WindowLoader
from llmfast.training.document_loader import DocumentLoader
from llmfast.training.processes import Processes
from llmfast.training.trainer import Trainer, check_shares
from llmfast.training.weights import kinds_of
from llmfast.weights.checkpoint import load as load_weights
from llmfast.weights.saving import copy_tokenizer, save

EVALUATION_TOKENS = 16384  # scored at once


def model_config(config: TrainingConfig, vocab_size: int, end_of_text: int | None) -> ModelConfig:
    """The model's configuration, as its `config.json` will have it."""
    asked = config.model
    shape = Shape(
        vocab_size=vocab_size,
        context=asked.n_positions,
        width=asked.n_embd,
        blocks=asked.n_layer,
        heads=asked.n_head,
        key_heads=asked.n_key_head or None,
        inner_dim=asked.n_inner or None,
        dropout=asked.dropout,
        attention_dropout=asked.attention_dropout,
        tie_word_embeddings=asked.tie_word_embeddings,
        end_of_text=end_of_text,
    )
    return shaped(asked.family, shape)


class ModelFiles:
    """Weights in Hugging Face's layout, with the tokenizer of the data: a checkpoint is a model that `load` takes."""

    def __init__(self, config: ModelConfig, tokenizer: Path | None):
        self.config, self.tokenizer = config, tokenizer

    def write(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        save(directory, self.config, state, tokenizer_from=self.tokenizer)

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        return load_weights(directory)[1]

    def companions(self, directory: Path) -> None:
        if self.tokenizer is not None:
            copy_tokenizer(self.tokenizer, directory)


def new_trainer(
    config: TrainingConfig,
    data: TokenDataset,
    vocab_size: int,
    end_of_text: int | None = None,
    group: Processes | None = None,
    tokenizer: Path | None = None,
) -> Trainer:
    """A trainer of a new model, of the configuration's shape and seed. `tokenizer` is where its files are, if any."""
    group = group or Processes()
    check_shares(config, group)
    T, rows, place = config.model.n_positions, config.data.batch_size, (config.run.seed, group.rank, group.world_size)
    loader: WindowLoader | DocumentLoader
    if config.data.rows == "documents":
        loader = DocumentLoader(data, T, rows * (T + 1), *place, end_of_text)
    else:
        loader = WindowLoader(data, T, rows, *place)
    torch.manual_seed(config.run.seed)  # the initial weights are made on the CPU: the same on every device
    model = create(model_config(config, vocab_size, end_of_text))
    dropout = config.model.dropout + config.model.attention_dropout > 0
    files = ModelFiles(model.config, tokenizer)
    return Trainer(config, model, loader, kinds_of(model.config), files, group, dropout=dropout)


def scored_once(trainer: Trainer, data: TokenDataset) -> BlockBatches:
    """Batches that score every token of `data` once, in the loader's blocks of at most the context."""
    loader = trainer.loader
    assert isinstance(loader, (WindowLoader, DocumentLoader))
    context = trainer.model.config.context
    padding = loader.end_of_text if isinstance(loader, DocumentLoader) else 0
    return BlockBatches(data, loader.blocks(data), max(1, EVALUATION_TOKENS // context), padding)
