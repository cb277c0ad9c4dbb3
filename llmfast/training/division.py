"""Which documents are for training and which for validation."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmfast.documents import Part, Source


@dataclass
class Corpus:
    """What a pass over all documents finds out; 16 bytes are kept of each."""

    hashes: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))  # UTF-8 bytes, prompts included
    bytes: int = 0  # UTF-8, prompts included
    characters: int = 0  # prompts left out
    has_prompts: bool = False


def scan(sources: Sequence[Source], seed: int, progress: Callable[[int], None] = lambda read: None) -> Corpus:
    """Reads every document and hashes it with `seed`. `progress` is told how many bytes each of them had."""
    corpus, salt = Corpus(), seed.to_bytes(16, "little")
    digest, size = hashlib.blake2b(digest_size=8, key=salt), 0
    for source in sources:
        for part in source.parts():
            prompt, text = part.prompt.encode(), part.text.encode()
            digest.update(prompt)
            digest.update(text)
            size += len(prompt) + len(text)
            corpus.characters += len(part.text)
            corpus.has_prompts |= bool(prompt)
            progress(len(prompt) + len(text))
            if part.ends:
                corpus.hashes.append(int.from_bytes(digest.digest(), "little"))
                corpus.sizes.append(size)
                corpus.bytes += size
                digest, size = hashlib.blake2b(digest_size=8, key=salt), 0
    if not corpus.hashes:
        raise ValueError(f"{', '.join(source.name for source in sources[:3])}: there is no text in what was given")
    return corpus


class Division:
    """Every document is in "train" or "validation"; of a lone one the end is for validation.

    With `last`, the last so many documents are for validation. Otherwise documents go there in the order of their
    hashes, equal ones together, until they have about the share `validation` of all bytes. One that is larger than this
    share stays in training. `ValueError` where nothing would be left to train on.
    """

    def __init__(self, corpus: Corpus, validation: float, last: int = 0):
        count = len(corpus.hashes)
        self.documents = {"train": count}
        self.description = "none was kept out"
        self._kept_out = np.zeros(count, dtype=bool)
        self._cut: int | None = None  # how many characters of a lone document are for training
        if last > 0:
            if last >= count:
                raise ValueError(f"there are {count} documents: keeping the last {last} out leaves none to train on")
            self._kept_out[-last:] = True
            self.documents = {"train": count - last, "validation": last}
            self.description = f"the last {last} documents"
            return
        if validation == 0:
            return
        if count == 1:
            self._cut = min(int(corpus.characters * (1 - validation)), corpus.characters - 1)
            if self._cut == 0:
                raise ValueError(f"the only document has {corpus.characters} characters: too few to keep any out")
            self.documents = {"train": 1, "validation": 1}
            self.description = f"the last {validation:.0%} of the only document"
            return
        self._kept_out = _keep_out(np.array(corpus.hashes), np.array(corpus.sizes), validation)
        kept_out = int(self._kept_out.sum())
        self.documents = {"train": count - kept_out, "validation": kept_out}
        self.description = "document"

    def parts(self, sources: Sequence[Source]) -> Iterator[tuple[str, Part]]:
        """Every part of every document with the name of its side."""
        index = position = 0
        for source in sources:
            for part in source.parts():
                if index == len(self._kept_out):
                    raise ValueError(f"{source.name} has changed while it was being read")
                if self._cut is None:
                    yield "validation" if self._kept_out[index] else "train", part
                else:
                    # Training never sees the end of the document, so neither side is said to have one.
                    before = max(0, self._cut - position)
                    position += len(part.text)
                    if part.text[:before]:
                        yield "train", Part(part.text[:before], part.prompt, ends=False)
                    if part.text[before:]:
                        yield "validation", Part(part.text[before:], ends=False)
                index += part.ends

    def training_texts(self, sources: Sequence[Source]) -> Iterator[str]:
        """What a tokenizer may learn from; a prompt stands alone, as it is encoded."""
        for side, part in self.parts(sources):
            if side == "train":
                if part.prompt:
                    yield part.prompt
                yield part.text


def _keep_out(hashes: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """Which documents are for validation, (documents,) bool: at least one, and not all."""
    distinct, first, counts = np.unique(hashes, return_index=True, return_counts=True)  # in the order of the hashes
    if len(distinct) == 1:
        raise ValueError(f"all {len(hashes)} documents are the same, so that none can be kept out: pass validation 0")
    bytes_of_each = sizes[first] * counts
    fitting = np.flatnonzero(bytes_of_each <= share * sizes.sum())
    taken = fitting[np.cumsum(bytes_of_each[fitting]) <= share * sizes.sum()]
    if len(taken) == 0:  # the smallest, where every one is larger than the share
        taken = np.array([np.argmin(bytes_of_each)])
    if len(taken) == len(distinct):
        taken = taken[:-1]
    return np.isin(hashes, distinct[taken])
