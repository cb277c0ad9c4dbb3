"""How well a model predicts a text: nats a token, perplexity, and bits a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.model import GPT


@dataclass(frozen=True)
class Perplexity:
    """The total surprise of a text, and the counts to state it by."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as nats a token is not."""
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def document_perplexity(
    model: GPT, documents: Sequence[tuple[Sequence[int], int]], end_of_text: int, tokens_per_batch: int = 8192
) -> Perplexity:
    """Scores each document alone: a list of (token ids, length in bytes).

    A document is predicted from its start, after one end-of-text token, and its own end-of-text is predicted too (its
    nats count, its bytes do not). Documents longer than the context are scored in blocks that share no context.
    """
    context = model.config.n_positions
    blocks = []
    for ids, _ in documents:
        sequence = [end_of_text, *ids, end_of_text]
        blocks += [sequence[i : i + context + 1] for i in range(0, len(sequence) - 1, context)]
    blocks.sort(key=len)  # equal lengths together, so that little is padding
    nats, tokens, batch = 0.0, 0, list[list[int]]()
    for index, block in enumerate(blocks):
        batch.append(block)
        if len(batch) * len(block) >= tokens_per_batch or index == len(blocks) - 1:
            loss, count = _batch_nats(model, batch)
            nats, tokens, batch = nats + loss, tokens + count, []
    return Perplexity(nats, tokens, sum(length for _, length in documents))


def _batch_nats(model: GPT, blocks: list[list[int]]) -> tuple[float, int]:
    width = max(len(block) for block in blocks) - 1
    ids = torch.zeros(len(blocks), width, dtype=torch.int64)
    targets = torch.full((len(blocks), width), -100)
    for row, block in enumerate(blocks):
        ids[row, : len(block) - 1] = torch.tensor(block[:-1])
        targets[row, : len(block) - 1] = torch.tensor(block[1:])
    count = int((targets != -100).sum())
    mean: Tensor = model.loss(ids.to(model.device), targets.to(model.device))
    return float(mean) * count, count
