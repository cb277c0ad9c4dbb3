"""Prepared tokens as batches: memory-mapped shards, seen as one stream, cut into shuffled windows.

A batch is a function of the data, the seed, the step and the rank, and of nothing else. The only thing that a
checkpoint has to keep is the step, and a run that is resumed, on however many processes, sees what it would have seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.training.manifest import Manifest, map_array

IGNORED = -100  # what cross-entropy leaves out


class TokenDataset:
    """The tokens of one split as one stream, in the order of the manifest. Nothing is read until it is asked for.

    `masks` says for each token whether it is a target; None where all are.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None = None,
        manifest: Manifest | None = None,
    ):
        self.manifest = manifest
        self._shards, self._masks = list(shards), None if masks is None else list(masks)
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)
        self._directory, self._split = Path(), ""

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> TokenDataset:
        """Maps the shards of "train" or "validation", and checks that they are there and of the right size.

        `FileNotFoundError` or `ValueError` in one line otherwise; `verify` compares their contents too.
        """
        directory, manifest = Path(directory), Manifest.read(directory)
        shards, masks = [], []
        for shard in manifest.split(split).shards:
            shards.append(map_array(directory / shard.file, shard.tokens, manifest.dtype))
            if shard.mask_file is not None:
                masks.append(map_array(directory / shard.mask_file, shard.tokens, "bool"))
        if masks and len(masks) < len(shards):
            raise ValueError(f"{directory}: some shards of {split} have a mask and others none: prepare the data again")
        dataset = cls(shards, masks or None, manifest)
        dataset._directory, dataset._split = directory, split
        return dataset

    @classmethod
    def from_tokens(cls, tokens: np.ndarray | Sequence[int], mask: np.ndarray | None = None) -> TokenDataset:
        """A data set in memory: `tokens` (n,) of any integer type, `mask` (n,) bool, False where one is no target."""
        array = np.asarray(tokens)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"tokens must be integers of shape (n,), got {array.dtype} {array.shape}")
        if mask is not None and (mask.shape != array.shape or mask.dtype != np.bool_):
            raise ValueError(f"mask must be bool {array.shape} like the tokens, got {mask.dtype} {mask.shape}")
        return cls([array], None if mask is None else [mask])

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def masked(self) -> bool:
        """Whether some tokens may be no targets."""
        return self._masks is not None

    def __len__(self) -> int:
        return self.num_tokens

    def window(self, start: int, length: int) -> np.ndarray:
        """The tokens from `start` on, (length,) int64; `ValueError` where they are not all there."""
        return self._read(self._shards, start, length).astype(np.int64)

    def targets(self, start: int, length: int) -> np.ndarray:
        """The same with -100 for every token that is no target."""
        tokens = self.window(start, length)
        if self._masks is not None:
            tokens[~self._read(self._masks, start, length)] = IGNORED
        return tokens

    def positions_of(self, token: int) -> np.ndarray:
        """Where `token` stands in the stream, (count,) int64. This reads all of it."""
        first = [int(end) - len(shard) for end, shard in zip(self._ends, self._shards, strict=True)]
        found = [at + np.flatnonzero(shard == token) for at, shard in zip(first, self._shards, strict=True)]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def verify(self) -> None:
        """Compares the SHA-256 of every shard of this split with the manifest. `ValueError` names a corrupt one."""
        if self.manifest is not None:
            self.manifest.verify(self._directory, (self._split,))

    def _read(self, arrays: list[np.ndarray], start: int, length: int) -> np.ndarray:
        end = start + length
        if start < 0 or length < 0 or end > self.num_tokens:
            raise ValueError(f"tokens {start} to {end} are not in a data set of {self.num_tokens}")
        index = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < end:
            first = int(self._ends[index]) - len(arrays[index])
            parts.append(arrays[index][start - first : end - first])
            start, index = int(self._ends[index]), index + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=arrays[0].dtype if arrays else np.uint16)


def rows_of(
    dataset: TokenDataset, starts: Sequence[int], lengths: Sequence[int], width: int, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Ids and targets, both (rows, width) int64: `lengths[i]` tokens from `starts[i]` on, and what follows each.

    Beyond a row's length stand `padding` and -100. A start of -1 is before the first token, where `padding` stands too.
    """
    ids = np.full((len(starts), width), padding)
    targets = np.full((len(starts), width), IGNORED)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        before = int(start < 0)
        ids[row, before:length] = dataset.window(start + before, length - before)
        targets[row, :length] = dataset.targets(start + 1, length)
    return torch.from_numpy(ids), torch.from_numpy(targets)


def blocks(bounds: Sequence[int], context: int) -> list[tuple[int, int]]:
    """The start and the length of the rows that score every token between bounds once, as `rows_of` takes them.

    `bounds` are ascending; no block reaches over one. They share nothing.
    """
    return [
        (start, min(context, end - start))
        for first, end in itertools.pairwise(bounds)
        for start in range(first, end, context)
    ]


class BlockBatches(Sequence[tuple[Tensor, Tensor]]):
    """`blocks` as batches of `rows` rows, those of like length together; they are made when they are asked for."""

    def __init__(self, dataset: TokenDataset, blocks: Sequence[tuple[int, int]], rows: int, padding: int = 0):
        self._dataset, self._rows, self._padding = dataset, rows, padding
        self._blocks = sorted(blocks, key=lambda block: -block[1])

    def __len__(self) -> int:
        return -(-len(self._blocks) // self._rows)

    def __getitem__(self, index: Any) -> Any:
        """The ids and the targets of a batch, as `rows_of` gives them."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        chosen = self._blocks[index * self._rows : (index + 1) * self._rows]
        starts, lengths = zip(*chosen, strict=True)
        return rows_of(self._dataset, starts, lengths, lengths[0], self._padding)


class WindowLoader:
    """Shuffled windows of a token stream.

    `batch_size` is the number of sequences of one optimizer step over all `world_size` ranks; rank r gets the rows
    from r · batch_size / world_size on. An epoch starts at an offset of its own, cuts the stream into windows that
    share no target, and shows each once, in an order of its own. Batches run over the end of an epoch into the next.
    """

    def __init__(
        self, dataset: TokenDataset, context: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        if context < 1 or batch_size < 1 or world_size < 1 or seed < 0:
            raise ValueError(
                "context, batch_size and world_size must be at least 1 and seed at least 0, "
                f"got {context}, {batch_size}, {world_size}, {seed}"
            )
        if dataset.num_tokens < context + 1:
            raise ValueError(
                f"the data has {dataset.num_tokens} tokens; one window of context {context} takes {context + 1}: "
                "give more text, or a shorter context"
            )
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"a batch of {batch_size} sequences can't be shared by {world_size} ranks, of which this is {rank}: "
                "world_size must divide batch_size, and rank be below it"
            )
        self.dataset, self.context, self.batch_size, self.seed = dataset, context, batch_size, seed
        self.rank, self.world_size = rank, world_size
        # Windows of T + 1 tokens, of which neighbours share one. An epoch has one less than fit, so that its offset
        # is free to move by at least T - 1 tokens: no position is always at a window's edge, or never seen.
        self.windows_per_epoch = max(1, dataset.num_tokens // context - 1)
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps that show every window at least once."""
        return -(-self.windows_per_epoch // self.batch_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The ids and the targets of this rank at `step` (from 0), both (batch_size / world_size, context) int64.

        `targets[i, t]` is the token that follows `ids[i, t]`, or -100 where that is no target.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        rows, T = self.batch_size // self.world_size, self.context
        first = step * self.batch_size + self.rank * rows
        places = (divmod(row, self.windows_per_epoch) for row in range(first, first + rows))
        return rows_of(self.dataset, [int(self._starts(epoch)[i]) for epoch, i in places], [T] * rows, T)

    def blocks(self, dataset: TokenDataset) -> list[tuple[int, int]]:
        """The rows that score every token of `dataset` but the first, as one stream."""
        return blocks([0, dataset.num_tokens - 1], self.context)

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in its order: (windows_per_epoch,) int64."""
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, epoch])
            span = self.windows_per_epoch * self.context
            offset = int(rng.integers(self.dataset.num_tokens - span))
            if len(self._epochs) > 1:  # a batch can need two
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = offset + self.context * rng.permutation(self.windows_per_epoch)
        return self._epochs[epoch]
