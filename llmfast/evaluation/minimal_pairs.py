"""Minimal pairs: does a model find the grammatical sentence likelier than its ungrammatical twin?

    The girls were happy.    log p = -25.1, likelier: right   (the embedded model)
    The girls was happy.     log p = -28.4

The format, and the measure (the log-probability of whole sentences), are those of BLiMP (Warstadt et al., 2020,
arXiv:1912.00582): 67 paradigms of 1,000 pairs each. A model that knows nothing is right half the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import fmean

from llmfast.documents import Source, find_sources
from llmfast.inference.llm import LLM
from llmfast.inference.scoring import Progress, Window, half_overlapping, windows


@dataclass(frozen=True)
class MinimalPair:
    good: str
    bad: str
    paradigm: str = "pairs"  # BLiMP's UID, such as "wh_island"
    phenomenon: str = "pairs"  # what paradigms have in common: BLiMP's linguistics_term, such as "island_effects"


@dataclass(frozen=True)
class Accuracy:
    """The share of pairs whose good sentence is likelier; of a pair that is equally likely, half."""

    outcomes: Sequence[float]  # of each pair: 1, 0 or ½

    @property
    def pairs(self) -> int:
        return len(self.outcomes)

    @property
    def value(self) -> float:
        return fmean(self.outcomes)

    @property
    def standard_error(self) -> float:
        """Of the value, for pairs drawn at random; nan for a single pair."""
        if self.pairs < 2:
            return math.nan
        variance = sum((outcome - self.value) ** 2 for outcome in self.outcomes) / (self.pairs - 1)
        return math.sqrt(variance / self.pairs)


def read_pairs(path: str | Path) -> list[MinimalPair]:
    """The pairs of a `.jsonl` file, of all such files in a folder, or of those in a zip archive.

    A line is a JSON object with `sentence_good` and `sentence_bad`, and in BLiMP `UID` and `linguistics_term`.
    `OSError` or `ValueError` names the file and the line that can't be read.
    """
    sources = find_sources([path], suffixes=(".jsonl", ".zip"))
    pairs = [pair for source in sources for pair in _pairs_of(source)]
    if not pairs:
        raise ValueError(f"{path} holds no minimal pairs: expected .jsonl files")
    return pairs


def minimal_pair_outcomes(llm: LLM, pairs: Sequence[MinimalPair], progress: Progress | None = None) -> list[float]:
    """For every pair 1 where the model finds the good sentence likelier, 0 where the bad one, ½ where neither.

    A sentence's log-probability is the sum over its tokens, the first one given end-of-text, where the model has that
    (else it is context only). A sentence longer than the context is scored as `LLM.score` does.
    """
    start, context, tokenizer = llm.start_token, llm.config.context, llm.need_tokenizer()
    prefix = () if start is None else (start,)
    encoded = [tuple((*prefix, *tokenizer.encode(text)) for text in (pair.good, pair.bad)) for pair in pairs]
    # Sentences of the same tokens are scored once, so that they are exactly as likely.
    totals = dict.fromkeys((sentence for pair in encoded for sentence in pair), 0.0)
    pieces: list[Window] = []
    owners = []
    for sentence in totals:
        made = windows(sentence, context, half_overlapping(context))
        pieces += made
        owners += [sentence] * len(made)
    for index, prediction in llm.predictions(pieces, progress=progress):
        totals[owners[index]] += float(prediction.log_probabilities.double().sum())
    return [0.5 + 0.5 * _sign(totals[good] - totals[bad]) for good, bad in encoded]


def grouped(outcomes: Iterable[float], keys: Iterable[str]) -> dict[str, Accuracy]:
    """The accuracy of every key's pairs, keys in alphabetical order."""
    groups: dict[str, list[float]] = {}
    for outcome, key in zip(outcomes, keys, strict=True):
        groups.setdefault(key, []).append(outcome)
    return {key: Accuracy(groups[key]) for key in sorted(groups)}


def _sign(x: float) -> float:
    return float(x > 0) - float(x < 0)


def _pairs_of(source: Source) -> Iterator[MinimalPair]:
    for number, record in source.records():
        try:
            good, bad = record["sentence_good"], record["sentence_bad"]
            if not (isinstance(good, str) and isinstance(bad, str) and good and bad):
                raise TypeError
        except (KeyError, TypeError):
            wanted = "a JSON object with the texts sentence_good and sentence_bad"
            raise ValueError(f"{source.name}, line {number}: expected {wanted}") from None
        paradigm = str(record.get("UID", PurePath(source.name).stem))
        yield MinimalPair(good, bad, paradigm, str(record.get("linguistics_term", paradigm)))
