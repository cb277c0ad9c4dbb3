"""What an index needs of the place where it is kept, and what every such place shares."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

OTHERS = 100
# Words that nearly every text has (after those of Snowball's English list): a question is not about them.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about above after again against all am an and any are as at be because been before being below between
        both but by can could did do does doing down during each few for from further had has have having he her here
        hers him his how i if in into is it its just many me more most much my no nor not of off on once only or other
        our out over own same she should so some such than that the their them then there these they this those
        through to too under until up very was we were what when where which while who whom why will with would you
        your""",
    )
)


@dataclass(frozen=True)
class Document:
    """A document of an index: `path` is its key, `root` the path that it was found below, `name` what is shown."""

    path: str
    root: str
    name: str
    kind: str
    digest: str
    modified: float
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Occurrence:
    """A piece in a document: the `digest` of what is searched, and the text with its heading and place there."""

    digest: str
    text: str
    heading: str
    place: str


@dataclass(frozen=True)
class Found:
    """A piece that was found, as a document has it; `number` is its place among the document's pieces."""

    piece: int
    path: str
    name: str
    kind: str
    metadata: Mapping[str, str]
    text: str
    heading: str
    place: str
    number: int


class Store(Protocol):
    """A database of pieces with vectors and words; see `SQLiteStore`, whose methods say what each does."""

    settings: dict[str, Any]

    def close(self) -> None: ...
    def changing(self) -> AbstractContextManager[None]: ...
    def documents(self, root: str | None = None) -> dict[str, Document]: ...
    def count(self) -> int: ...
    def known(self, digests: Iterable[str]) -> set[str]: ...
    def put(
        self,
        documents: Sequence[tuple[Document, Sequence[Occurrence]]],
        contents: Mapping[str, tuple[str, Tensor]],
        removed: Sequence[str] = (),
    ) -> None: ...
    def nearest(self, vector: Tensor, count: int, where: Mapping[str, str]) -> list[tuple[int, float]]: ...
    def matching(self, query: str, count: int, where: Mapping[str, str]) -> list[tuple[int, float]]: ...
    def holders(self, query: str, pieces: Sequence[int]) -> list[tuple[int, set[int]]]: ...
    def found(self, pieces: Sequence[int], where: Mapping[str, str]) -> list[Found]: ...


def words_of(query: str) -> list[str]:
    """The words of a question that say what it is about; all of them where nothing else is left."""
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))[:64]
    return [word for word in words if word not in STOP_WORDS] or words


def weight(number: int, total: int) -> float:
    """Of a word that `number` of `total` pieces have, as in BM25: log of (N - n + ½) / (n + ½), and above 0."""
    return max(1e-6, math.log((total - number + 0.5) / (number + 0.5)))


def shares(holders: Sequence[tuple[int, set[int]]], total: int, pieces: Sequence[int]) -> dict[int, float]:
    """Which share of a question's words each piece has, where a rare word weighs more (`weight`). `holders` has for
    each word the number n of pieces that have it, and those of `pieces` that do.

    `OTHERS` pieces more than there are count: among five pieces a word that none has would weigh twice as much as
    one that tells them apart, and a share would mean another thing in a small index than in a large one."""
    weights = [weight(n, total + OTHERS) for n, _ in holders]
    whole = sum(weights)
    return {
        piece: sum(w for w, (_, have) in zip(weights, holders, strict=True) if piece in have) / whole if whole else 0.0
        for piece in pieces
    }


def conditions(where: Mapping[str, str], glob: str, metadata: str, mark: str = "?") -> tuple[str, list[str]]:
    """SQL that holds for the documents `d` that `where` allows: "name" is a pattern with * and ?, "kind" a suffix, and
    everything else is a document's metadata. `metadata` has a place for the mark of a name."""
    parts, values = ["1 = 1"], list[str]()
    for key, value in where.items():
        if key == "name":
            parts.append(f"d.name {glob} {mark}")
            values.append(value)
        elif key == "kind":
            parts.append(f"d.kind = {mark}")
            values.append(value.lower().removeprefix("."))
        else:
            parts.append(f"{metadata.format(mark)} = {mark}")
            values += [key, value]
    return " and ".join(parts), values
