"""Examples in memory, and their batches: what a model is given, and what it is to say at each of its tokens.

A batch is a function of the examples, the seed, the step and the rank. Examples of like length share one, so that
little of it is padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.training.dataset import IGNORED

POOL = 32  # batches that are sorted by length together: enough for like lengths, few enough for other neighbours
EVALUATION_TOKENS = 8192  # scored at once, padding included
# Rows are padded to a multiple of this. For every width oneDNN makes code of its own for each product, and keeps it:
# 9.5 MB for adapters beside SmolLM2, in the midst of the memory that batches free, which then can't be given back.
WIDTH = 8


@dataclass(frozen=True)
class Example:
    """`ids` (n,) int32, and what is to be predicted at each: `targets` (n,) int32, -100 where nothing counts."""

    ids: np.ndarray
    targets: np.ndarray
    place: str = ""  # where it stands in its file

    @property
    def counted(self) -> int:
        return int((self.targets != IGNORED).sum())

    def sequence(self) -> tuple[list[int], list[bool]]:
        """The tokens of an example whose targets are what follows, the last one included where it counts; and which
        of them count."""
        last = [int(self.targets[-1])] if self.targets[-1] != IGNORED else []
        tokens = [*self.ids.tolist(), *last]
        return tokens, [False, *(self.targets != IGNORED).tolist()][: len(tokens)]


def following(ids: Sequence[int], counts: Sequence[bool], place: str = "") -> Example:
    """An example whose every token is to predict the next, where that one counts."""
    tokens = np.asarray(ids, dtype=np.int32)
    targets = np.where(np.asarray(counts, dtype=bool), tokens, IGNORED).astype(np.int32)
    return Example(tokens[:-1], targets[1:], place)


def padded_width(longest: int, most: int) -> int:
    """How wide the rows are whose longest has so many tokens, where the longest of all has `most`."""
    return min(most, -(-longest // WIDTH) * WIDTH)


def padded(examples: Sequence[Example], padding: int, most: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and targets, both (rows, width) int64; on the right of a row stand `padding` and -100. They are as wide as
    the longest row, and in whole `WIDTH`s as far as `most` allows."""
    longest = max((len(example.ids) for example in examples), default=1)
    width = max(longest, padded_width(longest, most))
    ids = np.full((len(examples), width), padding, dtype=np.int64)
    targets = np.full((len(examples), width), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        targets[row, : len(example.ids)] = example.targets
    return torch.from_numpy(ids), torch.from_numpy(targets)


class ExampleLoader:
    """Shuffled examples, `batch_size` a batch over all `world_size` ranks; each is seen once an epoch."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        padding: int = 0,
    ):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.rank, self.world_size, self.padding = rank, world_size, padding
        self._lengths = np.array([len(example.ids) for example in examples])
        self.most = int(self._lengths.max(initial=1))
        self._epochs: dict[int, list[np.ndarray]] = {}

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The ids and the targets of this rank at `step` (from 0), both (rows, width) int64, as many on every rank."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chosen = self._batches(epoch)[index]
        ids, targets = self.rows(chosen[self.rank :: self.world_size])
        missing = math.ceil(len(chosen) / self.world_size) - len(chosen[self.rank :: self.world_size])
        if missing:  # as many rows for everyone
            ids = torch.cat([ids, torch.full((missing, ids.shape[1]), self.padding)])
            targets = torch.cat([targets, torch.full((missing, ids.shape[1]), IGNORED)])
        return ids, targets

    def rows(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return padded([self.examples[index] for index in chosen], self.padding, self.most)

    def tokens_per_epoch(self) -> int:
        """Of the first epoch, with those that pad rows."""
        return sum(len(batch) * padded_width(int(self._lengths[batch].max()), self.most) for batch in self._batches(0))

    def padding_share(self) -> float:
        """The share of these that pads rows."""
        return 1 - int(self._lengths.sum()) / self.tokens_per_epoch()

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """The examples of an epoch's batches, in its order."""
        if epoch not in self._epochs:
            self._epochs.clear()
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.examples))
            batches = []
            for first in range(0, len(order), POOL * self.batch_size):
                pool = order[first : first + POOL * self.batch_size]
                pool = pool[np.argsort(self._lengths[pool], kind="stable")]
                batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
            self._epochs[epoch] = [batches[i] for i in rng.permutation(len(batches))]
        return self._epochs[epoch]


class ExampleBatches(Sequence[tuple[Tensor, Tensor]]):
    """Every example once, those of like length together; batches are made when they are asked for.

    `order` holds the numbers of the examples as they come.
    """

    def __init__(self, examples: Sequence[Example], padding: int = 0, tokens: int = EVALUATION_TOKENS):
        self._examples, self._padding = examples, padding
        self._most = max((len(example.ids) for example in examples), default=1)
        self.groups: list[list[int]] = []
        for index in sorted(range(len(examples)), key=lambda i: -len(examples[i].ids)):
            width = padded_width(len(examples[self.groups[-1][0] if self.groups else index].ids), self._most)
            if not self.groups or (len(self.groups[-1]) + 1) * width > tokens:
                self.groups.append([])
            self.groups[-1].append(index)

    @property
    def order(self) -> list[int]:
        return [index for group in self.groups for index in group]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return padded([self._examples[i] for i in self.groups[index]], self._padding, self._most)
