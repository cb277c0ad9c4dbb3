"""Prepared tokens as batches of documents, one a row: for texts that are shorter than the context.

Like `WindowLoader.batch`, `DocumentLoader.batch` is a function of the data, the seed, the step and the rank alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llmfast.training.dataset import TokenDataset, blocks, rows_of

POOL = 1024  # documents that are sorted by length together: enough for like lengths, few enough for other neighbours
FROM_NOTHING, FROM_ITS_START = 0.5, 0.85  # the shares of rows below which they begin in these ways


@dataclass(frozen=True)
class _Epoch:
    """The rows of an epoch in the order in which batches take them, and where each batch begins among them."""

    starts: np.ndarray  # (rows,) where in the data
    lengths: np.ndarray  # (rows,) ids, each of which has a target
    bounds: np.ndarray  # (batches + 1,)
    order: np.ndarray  # (batches,)


class DocumentLoader:
    """Shuffled documents, one a row, each to its end-of-text or as far as the context reaches, padded.

    Half of the rows start with an end-of-text, as a text out of nothing does, the others as a prompt does: with the
    document's first token, or somewhere in its first half. An epoch shows every document once. Those of like length
    share a batch, so that little is padding; a batch has about `batch_tokens` tokens over all `world_size` ranks.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        context: int,
        batch_tokens: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        end_of_text: int | None = None,
    ):
        """`end_of_text` is that of the data's manifest, unless it is given."""
        if end_of_text is None and dataset.manifest is not None:
            end_of_text = dataset.manifest.end_of_text
        if end_of_text is None:
            raise ValueError("the data have no end-of-text, so that no document can be told from the next")
        if context < 1 or seed < 0 or not 0 <= rank < world_size:
            raise ValueError(
                "context must be at least 1, seed at least 0 and rank below world_size, "
                f"got {context}, {seed}, {rank} and {world_size}"
            )
        if batch_tokens < 2 * (context + 1):
            raise ValueError(
                f"a batch must hold two of the longest rows, {2 * (context + 1)} tokens, got {batch_tokens}"
            )
        bounds = _bounds(dataset, end_of_text)
        sizes = np.diff(bounds)
        several = sizes > 1  # besides the end-of-text
        self._starts, self._sizes = bounds[:-1][several] + 1, sizes[several]
        if not len(self._starts):
            raise ValueError(f"the data hold no document, only {dataset.num_tokens} tokens")
        self.dataset, self.context, self.end_of_text, self.seed = dataset, context, end_of_text, seed
        self.rank, self.world_size = rank, world_size
        # The same for every epoch, though their rows differ, so that a step is always in the same one. No row is cut
        # by more than half, so that a batch has room for a longest row, and none is empty.
        whole = np.minimum(self._sizes + 1, context + 1).sum()
        self.steps_per_epoch = max(1, int(whole // batch_tokens))
        self._epochs: dict[int, _Epoch] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The ids and the targets of this rank at `step` (from 0), both (rows, width) int64, the same on every rank.

        `targets[i, t]` is the token that follows `ids[i, t]`, or -100 where that is no target or no token. Where the
        documents of a batch can't be shared evenly, a rank's last row is nothing but padding.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        number, index = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        batch = int(epoch.order[index])
        first, last = int(epoch.bounds[batch]), int(epoch.bounds[batch + 1])
        rows = -(-(last - first) // self.world_size)
        width = int(epoch.lengths[first:last].max())
        mine = slice(min(last, first + self.rank * rows), min(last, first + (self.rank + 1) * rows))
        starts, lengths = epoch.starts[mine].tolist(), epoch.lengths[mine].tolist()
        missing = rows - len(starts)
        return rows_of(self.dataset, starts + [0] * missing, lengths + [0] * missing, width, self.end_of_text)

    def blocks(self, dataset: TokenDataset) -> list[tuple[int, int]]:
        """The rows that score every document of `dataset` alone, from an end-of-text to its own."""
        return blocks(_bounds(dataset, self.end_of_text).tolist(), self.context)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = self._new_epoch(np.random.default_rng([self.seed, number]))
        return self._epochs[number]

    def _new_epoch(self, rng: np.random.Generator) -> _Epoch:
        count = len(self._starts)
        chance = rng.random(count)
        skipped = rng.integers((self._sizes - 1) // 2 + 1)
        skipped[chance < FROM_ITS_START] = 0
        skipped[chance < FROM_NOTHING] = -1  # the end-of-text before it is not left out
        lengths = np.minimum(self._sizes - skipped - 1, self.context)
        pools = np.empty(count, dtype=np.int64)
        pools[rng.permutation(count)] = np.arange(count) // POOL
        # Every other pool goes from long to short, so that a batch of two pools has like lengths too: with the longest
        # beside the shortest, one batch in 19 of tinystories.txt was three times as wide as its tokens.
        rows = np.lexsort((np.where(pools % 2, -lengths, lengths), pools))
        # Cut where equal shares of all tokens end: between two bounds there is at least one row's beginning.
        sizes = lengths[rows] + 1
        begins = np.cumsum(sizes) - sizes
        shares = np.arange(self.steps_per_epoch + 1) * (sizes.sum() / self.steps_per_epoch)
        bounds = np.searchsorted(begins, shares)
        starts = (self._starts + skipped)[rows]
        return _Epoch(starts, lengths[rows], bounds, rng.permutation(self.steps_per_epoch))


def _bounds(dataset: TokenDataset, end_of_text: int) -> np.ndarray:
    """The places of all end-of-texts, between which documents lie: -1 before the first, the last token's at the end,
    though that document may have been cut."""
    return np.unique([-1, *dataset.positions_of(end_of_text), dataset.num_tokens - 1])
