"""`Index`: documents that can be searched, kept on disk, and brought up to date by what has changed.

files -> blocks -> pieces -> vectors and words, in a store
query -> the nearest vectors, and the best words by BM25 -> the evidence of each -> pieces with their places
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmfast.inference.embedding import Embedder
from llmfast.retrieval.blocks import read_blocks
from llmfast.retrieval.files import documents_below, read_file, root_of
from llmfast.retrieval.pieces import OVERLAP, TOKENS, pieces_of, statements
from llmfast.retrieval.postgres_store import PostgresStore, is_address, without_password
from llmfast.retrieval.sqlite_store import SQLiteStore
from llmfast.retrieval.store import Document, Found, Occurrence, Store, shares, words_of

PIECES_AT_ONCE = 256  # that are embedded, and then kept: what a killed `add` loses at most
CANDIDATES = 50  # of each of the two rankings
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Hit:
    """A piece that was found: `score` orders the hits of a search, `similarity` is the cosine between the vectors of
    the query and the piece, where the piece was among the nearest, `matching` its BM25 score where it has a word of the
    query, and `share` how much of the query's words it has, rare ones weighing more, from 0 to 1. `quote` is the
    sentence that has most to do with the query, once `Index.look_closer` has looked for it."""

    found: Found
    score: float
    similarity: float | None
    matching: float | None
    share: float
    quote: str = ""

    @property
    def evidence(self) -> float:
        """How much speaks for this being about the query, from 0 to 2: by meaning, and by its words."""
        return evidence(self.similarity, self.matching, self.share)

    @property
    def text(self) -> str:
        return self.found.text

    @property
    def name(self) -> str:
        """The document's, with the place of the piece in it."""
        return ", ".join(filter(None, [self.found.name, self.found.heading, self.found.place]))


@dataclass
class Report:
    """What `Index.add` did: numbers of documents, and a line for each one that was left out."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    pieces: int = 0  # that were embedded
    left_out: list[str] = field(default_factory=list)


class Index:
    """The documents at `place`: a folder, which is made, or a database, "postgresql://…".

    `embedder` (a name, or an `Embedder`) and the `tokens` and `overlap` of pieces are chosen when an index is made;
    `ValueError` where one that is there was made with others.

    >>> index = Index("manuals.index")  # doctest: +SKIP
    >>> index.add("manuals")  # doctest: +SKIP
    >>> index.search("How do I reset it?")[0].name  # doctest: +SKIP
    'manuals/router.md, Reset, line 12'
    """

    def __init__(
        self,
        place: str | Path,
        embedder: str | Path | Embedder | None = None,
        tokens: int | None = None,
        overlap: int | None = None,
    ):
        self.place = without_password(str(place))
        try:
            self.store = open_store(place)
        except FileNotFoundError:
            named = "minilm" if embedder is None else embedder
            given = Embedder(named) if isinstance(named, (str, Path)) else named
            self._embedder: Embedder | None = given
            size = TOKENS if tokens is None else tokens
            settings: dict[str, Any] = {"embedder": given.name, "width": given.width, "pooling": given.pooling.kind}
            settings |= {"max_tokens": given.max_tokens, "tokens": size}
            settings |= {"overlap": min(OVERLAP, size // 4) if overlap is None else overlap}
            if not 8 <= size <= given.max_tokens or not 0 <= settings["overlap"] <= size // 2:
                raise ValueError(
                    f"pieces must have 8 to {given.max_tokens} tokens, which {given.name} looks at, and overlap by "
                    f"half at most, got {size} and {settings['overlap']}"
                ) from None
            self.store = open_store(place, settings)
            return
        self._embedder = None if embedder is None or isinstance(embedder, (str, Path)) else embedder
        asked: dict[str, Any] = {"embedder": embedder if self._embedder is None else self._embedder.name}
        asked |= {"tokens": tokens, "overlap": overlap}
        for name, value in asked.items():
            if value is not None and str(value) != str(self.store.settings[name]):
                raise ValueError(
                    f"{self.place} was made with {name} {self.store.settings[name]}, not {value}: make another index"
                )

    @classmethod
    def open(cls, place: str | Path, embedder: Embedder | None = None) -> Index:
        """The index at `place`. `FileNotFoundError` where there is none."""
        open_store(place).close()
        return cls(place, embedder)

    def __repr__(self) -> str:
        return f"Index({self.place!r}, {len(self.documents)} documents, {len(self)} pieces)"

    def __len__(self) -> int:
        return self.store.count()

    def close(self) -> None:
        self.store.close()

    @property
    def documents(self) -> dict[str, Document]:
        return self.store.documents()

    @property
    def embedder(self) -> Embedder:
        """The model of the vectors, read when it is first needed."""
        if self._embedder is None:
            said: Any = self.store.settings
            self._embedder = Embedder(said["embedder"], said["pooling"], said["max_tokens"])
            if self._embedder.width != said["width"]:
                raise ValueError(f"{said['embedder']} is no longer the model that {self.place} was made with")
        return self._embedder

    def add(
        self,
        *paths: str | Path,
        metadata: Mapping[str, str] | None = None,
        encoding: str = "utf-8",
        progress: Progress = lambda stage, done, total: None,
        left_out: Callable[[str], None] = lambda line: None,
    ) -> Report:
        """Takes in the documents below `paths`, and what has changed there since: files that differ replace what was
        there, files that are gone go. Text that occurs twice is kept once.

        `metadata` goes with every document, for the filters of `search`. `left_out` is told of each file that can't be
        read, in a line with the reason; what the index has of it stays. Killed, it has what was complete by then, and
        the same call goes on. `FileNotFoundError` for a path that leads nowhere, `ValueError` where none holds a
        document.
        """
        for path in paths:
            if not Path(path).exists():
                raise FileNotFoundError(f"no file or folder {path}")
        report, about = Report(), dict(metadata or {})

        def leave_out(line: str) -> None:
            report.left_out.append(line)
            left_out(line)

        with self.store.changing():
            pending = _Pending(self, report)
            for path in paths:
                root = root_of(path)
                before, every = self.store.documents(root), self.store.documents()
                try:
                    sources = list(documents_below(path, leave_out))
                except ValueError as error:
                    leave_out(str(error))
                    sources = []
                for number, (key, name, source) in enumerate(sources):
                    progress(str(path), number, len(sources))
                    try:
                        file = read_file(key, name, source)
                        document = Document(key, root, name, file.kind, file.digest, file.modified, about)
                        known = every.get(key)
                        if known is not None and (known.digest, dict(known.metadata)) == (file.digest, about):
                            report.unchanged += 1
                            continue
                        blocks = read_blocks(file.data, name, encoding)
                    except ValueError as error:
                        leave_out(" ".join(str(error).split()))
                        continue
                    pieces = list(pieces_of(blocks, self._count, *self._size))
                    pending.take(document, pieces, new=known is None)
                gone = [key for key in before if key not in {key for key, *_ in sources}]
                pending.finish(gone)
                report.removed += len(gone)
                progress(str(path), len(sources), len(sources))
            if not self.store.documents():
                raise ValueError("; ".join(report.left_out[:3]) or "there is nothing to index")
        return report

    def remove(self, *paths: str | Path) -> int:
        """Takes documents out of the index, those below a path that was added or single ones; gives their number."""
        with self.store.changing():
            gone = []
            for path in paths:
                root = root_of(path)
                found = [d.path for d in self.documents.values() if root == d.root or _below(d.path, root)]
                if not found:
                    raise ValueError(f"{self.place} holds nothing of {path}")
                gone += found
            self.store.put([], {}, gone)
        return len(gone)

    def search(self, query: str, count: int = 5, where: Mapping[str, str] | None = None, by: str = "both") -> list[Hit]:
        """The pieces that have most to do with `query`, at most `count`, the best first.

        `where` keeps to documents by "name" (a pattern with * and ?), "kind" (a suffix), or a key of their metadata.
        `by` is "both", or only "vectors", or "words".
        """
        if by not in ("both", "vectors", "words"):
            raise ValueError(f"by must be both, vectors or words, got {by!r}")
        if not query.strip():
            raise ValueError("the query is empty")
        candidates, where = max(CANDIDATES, count), dict(where or {})
        near: dict[int, float] = {}
        words: dict[int, float] = {}
        if by != "words":
            near = dict(self.store.nearest(self._vector(query), candidates, where))
        if by != "vectors":
            words = dict(self.store.matching(query, candidates, where))
        candidates_found = list(near | words)
        share = shares(self.store.holders(query, candidates_found), len(self), candidates_found)
        hits = {piece: (near.get(piece), words.get(piece), share[piece]) for piece in candidates_found}
        scores = near if by == "vectors" else words if by == "words" else {p: evidence(*hits[p]) for p in hits}
        best = sorted(scores, key=lambda piece: -scores[piece])[:count]
        return [Hit(found, scores[found.piece], *hits[found.piece]) for found in self.store.found(best, where)]

    def look_closer(self, query: str, hits: Sequence[Hit]) -> list[Hit]:
        """The same hits, each as near to `query` as its nearest sentence where that is nearer than all of it, the best
        first, and each with its `quote`.

        A piece about many things is near to none of them. On XQuAD the right paragraph is then first of five for 95.6 %
        of the questions instead of 95.5 %, and of those that have none 88 % are told instead of 85 %. It takes as long
        as the embedder takes for the sentences.
        """
        parts = [statements(hit.text) for hit in hits]
        every = [sentence for part in parts for sentence in part]
        if not every:
            return list(hits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a very long sentence the beginning counts
            near = dict(zip(every, (self.embedder.embed(every) @ self._vector(query)).tolist(), strict=True))
        words = set(words_of(query))

        def telling(sentence: str) -> float:
            return near[sentence] + len(words & set(words_of(sentence))) / max(1, len(words))

        closer = []
        for hit, part in zip(hits, parts, strict=True):
            nearest = max([hit.similarity or 0.0, *(near[sentence] for sentence in part)])
            score = evidence(nearest, hit.matching, hit.share)
            closer.append(replace(hit, score=score, similarity=nearest, quote=max(part, key=telling, default="")))
        return sorted(closer, key=lambda hit: -hit.score)

    def _vector(self, query: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a long question the beginning counts
            return self.embedder.embed(query)

    def _count(self, text: str) -> int:
        return len(self.embedder.tokenizer.encode(text))

    @property
    def _size(self) -> tuple[int, int]:
        return self.store.settings["tokens"], self.store.settings["overlap"]


def evidence(similarity: float | None, matching: float | None, share: float) -> float:
    """What orders the hits of both rankings, and says whether anything was found: by meaning, and by words.

    On XQuAD the right paragraph is first for 95.5 % of the questions, 93.3 % by BM25 and 88.7 % by vectors alone, and
    92.9 % by reciprocal rank fusion, which does not know by how much a piece is ahead.
    """
    return max(0.0, similarity or 0.0) + share


def open_store(place: str | Path, settings: Mapping[str, Any] | None = None) -> Store:
    """The store at a place: with `settings` it is made where there is none."""
    if is_address(place):
        return PostgresStore(str(place), settings)
    return SQLiteStore(place, settings)


class _Pending:
    """Documents whose pieces wait to be embedded together."""

    def __init__(self, index: Index, report: Report):
        self.index, self.report = index, report
        self.documents: list[tuple[Document, list[Occurrence]]] = []
        self.contents: dict[str, str] = {}

    def take(self, document: Document, pieces: Iterable[Any], new: bool) -> None:
        occurrences = [Occurrence(piece.digest, piece.text, piece.heading, piece.place) for piece in pieces]
        self.contents |= {piece.digest: piece.content for piece in pieces}
        self.documents.append((document, occurrences))
        self.report.added += new
        self.report.changed += not new
        if len(self.contents) >= PIECES_AT_ONCE:
            self.finish([])

    def finish(self, gone: list[str]) -> None:
        if self.documents or gone:
            known = self.index.store.known(self.contents)
            new = {digest: content for digest, content in self.contents.items() if digest not in known}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a piece under long headings may be a little longer than its vector
                vectors = self.index.embedder.embed(list(new.values()))
            contents = {digest: (new[digest], vector) for digest, vector in zip(new, vectors, strict=True)}
            self.index.store.put(self.documents, contents, gone)
            self.report.pieces += len(new)
        self.documents, self.contents = [], {}


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/\\") + "/")
