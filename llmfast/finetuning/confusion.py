"""How well a classifier does: which class was taken for which, and what that says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Confusion:
    """`counts[i][j]` texts of class i were taken for class j."""

    labels: tuple[str, ...]
    counts: np.ndarray  # (labels, labels) int64

    @classmethod
    def of(cls, labels: Sequence[str], actual: Sequence[int], said: Sequence[int]) -> Confusion:
        counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
        np.add.at(counts, (np.asarray(actual, dtype=np.int64), np.asarray(said, dtype=np.int64)), 1)
        return cls(tuple(labels), counts)

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.counts) / max(1, self.counts.sum()))

    def precision(self, label: int) -> float:
        """Of those that were taken for the class, the share that is of it; 0 where none was."""
        return float(self.counts[label, label] / max(1, self.counts[:, label].sum()))

    def recall(self, label: int) -> float:
        """Of those of the class, the share that was taken for it; 0 where there is none."""
        return float(self.counts[label, label] / max(1, self.counts[label].sum()))

    @property
    def macro_f1(self) -> float:
        """The mean over the classes of the harmonic mean of precision and recall."""
        pairs = [(self.precision(i), self.recall(i)) for i in range(len(self.labels))]
        return float(np.mean([2 * p * r / (p + r) if p + r else 0.0 for p, r in pairs]))

    def to_document(self) -> dict[str, Any]:
        by_class = {
            name: {"precision": self.precision(i), "recall": self.recall(i), "texts": int(self.counts[i].sum())}
            for i, name in enumerate(self.labels)
        }
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "labels": list(self.labels),
            "confusion": self.counts.tolist(),
            "classes": by_class,
        }

    def table(self) -> str:
        """As text: a row for each class, with the counts of what its texts were taken for."""
        names = [name if len(name) <= 16 else name[:15] + "…" for name in self.labels]
        header = ["", *(f"→ {name}" for name in names), "precision", "recall"]
        rows = [
            [name, *map(str, self.counts[i].tolist()), f"{self.precision(i):.1%}", f"{self.recall(i):.1%}"]
            for i, name in enumerate(names)
        ]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in [header, *rows]
        ]
        return "\n".join(lines)
