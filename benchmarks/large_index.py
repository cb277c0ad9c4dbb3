"""How long a question takes in an index of 100,000 pieces on disk, beside the encoder.

    python benchmarks/large_index.py gutenberg.zip --place large.index --out retrieval-large.json

The pieces are windows of 120 words of the books in a zip, overlapping as much as it takes. Their vectors are made up,
of length 1, as an hour of an encoder's time would change no figure here; they come in by the store's own `put`. A
question is ten words in a row of one of the books. `place` is made where it is not there, and kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import statistics
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

import llmfast
from llmfast.benchmarking.facts import facts
from llmfast.retrieval.index import CANDIDATES, Index, open_store
from llmfast.retrieval.store import Document, Occurrence

WORDS, WIDTH = 120, 384
PUT_AT_ONCE = 2000
QUESTIONS = 200


class Prepared:
    """An embedder of questions whose vectors are there already."""

    name, width = "minilm", WIDTH

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def embed(self, text: str) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(WIDTH, generator=self.generator), dim=0)


def books(zipped: Path) -> dict[str, list[str]]:
    """Their words, with what stands between them, by name."""
    with zipfile.ZipFile(zipped) as archive:
        texts = {name: archive.read(name).decode("latin-1") for name in archive.namelist() if name.endswith(".txt")}
    return {name: re.findall(r"\S+", text) for name, text in texts.items()}


def windows(texts: dict[str, list[str]], count: int) -> Iterator[tuple[str, str]]:
    """(name, text) of `count` pieces."""
    places = [(name, at) for name, words in texts.items() for at in range(max(1, len(words) - WORDS))]
    for i in range(count):
        name, at = places[i * len(places) // count]
        yield name, " ".join(texts[name][at : at + WORDS])


def make(place: str, texts: dict[str, list[str]], count: int) -> float:
    """Fills an index; gives the seconds."""
    settings = {"embedder": "minilm", "width": WIDTH, "pooling": "mean", "max_tokens": 256, "tokens": 250}
    store = open_store(place, settings | {"overlap": 32})
    generator = torch.Generator().manual_seed(0)
    start, waiting = time.perf_counter(), []

    def put() -> None:
        vectors = torch.nn.functional.normalize(torch.randn(len(waiting), WIDTH, generator=generator), dim=1)
        contents, documents = {}, []
        for (number, (name, text)), vector in zip(waiting, vectors, strict=True):
            digest = hashlib.sha256(f"{number} {text}".encode()).hexdigest()
            contents[digest] = (text, vector)
            path = f"{name}/{number}"
            documents.append((Document(path, "books", path, "txt", digest, 0.0), [Occurrence(digest, text, "", "")]))
        store.put(documents, contents)
        waiting.clear()
        print(f"\r{number + 1:,} of {count:,}", end="", flush=True)

    with store.changing():
        for numbered in enumerate(windows(texts, count)):
            waiting.append(numbered)
            if len(waiting) == PUT_AT_ONCE:
                put()
        if waiting:
            put()
    print()
    store.close()
    return time.perf_counter() - start


def measure(place: str, texts: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of a search, and of all but the encoder; then of the encoder."""
    index = Index(place, Prepared())  # type: ignore[arg-type]
    encoder = llmfast.Embedder("minilm")
    generator = random.Random(2)
    questions = []
    for _ in range(QUESTIONS):
        words = texts[generator.choice(list(texts))]
        at = generator.randrange(len(words) - 10)
        questions.append(" ".join(words[at : at + 10]))
    store, parts = index.store, {"nearest": [], "words": [], "search": [], "encoder": []}  # type: ignore[var-annotated]

    def timed(what: str, call) -> None:
        start = time.perf_counter()
        call()
        parts[what].append(1000 * (time.perf_counter() - start))

    for question in questions:
        index.search(question)  # so that all is mapped
    for question in questions:
        vector = index.embedder.embed(question)
        timed("nearest", lambda vector=vector: store.nearest(vector, CANDIDATES, {}))
        store.count()
        timed("words", lambda question=question: store.matching(question, CANDIDATES, {}))
    for question in questions:
        timed("search", lambda question=question: index.search(question))
        timed("encoder", lambda question=question: encoder.embed(question))
    return {
        what: {"median": statistics.median(times), "nine_of_ten": sorted(times)[len(times) * 9 // 10]}
        for what, times in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--place", required=True, help="a folder, or postgresql://…")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    texts = books(options.books)
    try:
        open_store(options.place).close()
        made = None
    except FileNotFoundError:
        made = make(options.place, texts, options.count)
    record = {"pieces": options.count, "made_seconds": made, "milliseconds": measure(options.place, texts)}
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record | {"machine": facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
