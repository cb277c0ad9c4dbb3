"""How often the right passage is found, and how well it is noticed that there is none."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.evaluation.intervals import Mean, mean_of
from llmfast.evaluation.squad import Squad
from llmfast.retrieval.index import Hit, Index
from llmfast.retrieval.pieces import sentences

RANKINGS = ("words", "vectors", "both")
CLOSER = "both, closer"  # the first of them by their sentences, too, as a question is answered
DEPTH = 30  # pieces looked at for each question
FIRST = 5
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Ranked:
    """Where the right passage stood, from 1 on, for each question; None where it was not among the first."""

    ranks: list[int | None]

    def recall(self, k: int) -> Mean:
        """How often it is among the first k."""
        return mean_of([float(rank is not None and rank <= k) for rank in self.ranks])

    def reciprocal(self, k: int = 10) -> Mean:
        """The mean of 1 / rank, 0 beyond k (MRR@k)."""
        return mean_of([1 / rank if rank is not None and rank <= k else 0.0 for rank in self.ranks])


@dataclass(frozen=True)
class Found:
    """Each ranking's ranks, and the evidence for every question: with all passages in the index, without the right one,
    and without any of its article."""

    rankings: dict[str, Ranked]
    evidence: list[float]
    without_passage: list[float]
    without_article: list[float]

    def said_absent(self, evidence: Sequence[float], answered: float = 0.9) -> tuple[float, Mean]:
        """The threshold at which this share of the questions is answered, and how often it then says that a passage
        which is not there is not there."""
        threshold = float(np.quantile(self.evidence, 1 - answered))
        return threshold, mean_of([float(value < threshold) for value in evidence])


def passages_of(squad: Squad, by_sentence: bool = False) -> tuple[list[str], list[int], list[int]]:
    """The passages to search, paragraphs or sentences; for each its article; and for each question the right one: of
    sentences the one in which the answer begins."""
    if not by_sentence:
        return squad.paragraphs, squad.articles, [question.paragraph for question in squad.questions]
    texts: list[str] = []
    articles: list[int] = []
    begin: list[list[tuple[int, int]]] = []  # of each paragraph, (character, number) of its sentences
    for paragraph, article in zip(squad.paragraphs, squad.articles, strict=True):
        begin.append([])
        for start, sentence in sentences(paragraph):
            begin[-1].append((start, len(texts)))
            texts.append(sentence)
            articles.append(article)
    right = [max(n for start, n in begin[q.paragraph] if start <= q.start) for q in squad.questions]
    return texts, articles, right


class Remembering:
    """An embedder that computes no vector twice, and those of the queries together, beforehand."""

    def __init__(self, embedder: Any, queries: Sequence[str]):
        self._embedder, self._vectors = embedder, dict[str, Tensor]()
        self.embed(queries)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed(self, texts: str | Sequence[str]) -> Tensor:
        if isinstance(texts, str):
            return self.embed([texts])[0]
        if new := [text for text in dict.fromkeys(texts) if text not in self._vectors]:
            self._vectors |= zip(new, self._embedder.embed(new), strict=True)
        return torch.stack([self._vectors[text] for text in texts]) if texts else self._embedder.embed([])


def evaluate(
    embedder: Any,
    questions: Sequence[str],
    passages: Sequence[str],
    right: Sequence[int],
    articles: Sequence[int],
    progress: Progress = lambda stage, done, total: None,
) -> Found:
    """Indexes the passages as files of a folder, as a user would, and searches for every question."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        warnings.simplefilter("ignore")
        folder = Path(temporary) / "passages"
        folder.mkdir()
        for number, passage in enumerate(passages):
            (folder / f"{number:06}.txt").write_text(passage, encoding="utf-8")
        index = Index(Path(temporary) / "index", Remembering(embedder, questions))  # type: ignore[arg-type]
        index.add(folder, progress=progress)
        rankings: dict[str, list[int | None]] = {name: [] for name in (*RANKINGS, CLOSER)}

        def rank(name: str, hits: Sequence[Hit]) -> None:
            order = list(dict.fromkeys(map(_number, hits)))
            rankings[name].append(order.index(wanted) + 1 if wanted in order else None)

        evidence: tuple[list[float], list[float], list[float]] = [], [], []
        for number, (question, wanted) in enumerate(zip(questions, right, strict=True)):
            progress("questions", number, len(questions))
            for by in RANKINGS:
                hits = index.search(question, DEPTH, by=by)
                rank(by, hits)
            rank(CLOSER, [*index.look_closer(question, hits[:FIRST]), *hits[FIRST:]])
            article = articles[wanted]
            for kept, values in zip(
                (
                    hits,
                    [hit for hit in hits if _number(hit) != wanted],
                    [hit for hit in hits if articles[_number(hit)] != article],
                ),
                evidence,
                strict=True,
            ):
                closer = index.look_closer(question, kept[:FIRST])
                values.append(max((hit.evidence for hit in closer), default=0.0))
        index.close()
    return Found({name: Ranked(ranks) for name, ranks in rankings.items()}, *evidence)


def _number(hit: Hit) -> int:
    return int(Path(hit.found.name).stem)
