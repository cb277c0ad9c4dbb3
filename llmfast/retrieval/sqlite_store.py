"""An index in a folder: SQLite holds documents, pieces and their words (FTS5), a file beside it their vectors.

    index.sqlite   documents, pieces (each text once), where they occur, an inverted index of their words
    vectors.N      float32 rows, the vector of piece i in row i: only ever appended to, and mapped into memory

A change is one transaction: vectors are written first, and reach the disk before the rows that name them are committed.
What a killed process has appended without committing is cut off by the next that writes. Rows of removed pieces stay
empty until they are half of the file; the rest then moves to a new file, N + 1.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast import ops
from llmfast.files import Locked, locked
from llmfast.retrieval.store import Document, Found, Occurrence, conditions, words_of
from llmfast.threads import one_thread

FORMAT = 1
OCCURRING = "occurrences o join documents d on d.id = o.document"
METADATA = """json_extract(d.metadata, '$."' || {} || '"')"""
FILE = "index.sqlite"
RARE = 0.05  # the share of pieces in which a word occurs, up to which it is looked for in a large index
LARGE = 20_000  # pieces
ROUNDING = 2.0**-7  # of a product of two vectors of length 1 in bfloat16: each of them and the product by 2^-9 at most
SCHEMA = """
create table about (name text primary key, value text not null);
create table documents (
    id integer primary key, path text unique not null, root text not null, name text not null, kind text not null,
    digest text not null, modified real not null, metadata text not null
);
create table pieces (id integer primary key, digest text unique not null, content text not null);
create table occurrences (
    document integer not null references documents, number integer not null, piece integer not null references pieces,
    text text not null, heading text not null, place text not null, primary key (document, number)
) without rowid;
create index occurrences_of_piece on occurrences (piece);
create virtual table words using fts5 (
    content, content='pieces', content_rowid='id', tokenize='porter unicode61 remove_diacritics 2'
);

"""


class SQLiteStore:
    """`create` makes the folder, whose index then has the `settings`; else one that is there is opened.

    `FileNotFoundError` or `ValueError` names a folder that holds no index, or another version's. Searching is for many
    at once, changing for one process at a time.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        file = self.folder / FILE
        if not file.exists():
            if settings is None:
                raise FileNotFoundError(f"there is no index at {folder}")
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ValueError(f"{folder} is there already, and is no index")
            self.folder.mkdir(parents=True, exist_ok=True)
            _create(file, settings)
        self._database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("foreign_keys = on", "cache_size = -65536", "mmap_size = 1073741824"):
                self._database.execute(f"pragma {pragma}")
            about = dict(self._database.execute("select name, value from about"))
            self.settings: dict[str, Any] = json.loads(about["settings"])
            if int(about["format"]) != FORMAT:
                raise ValueError(f"{folder} is an index of format {about['format']}, not {FORMAT}: index it anew")
        except (sqlite3.DatabaseError, KeyError) as error:
            raise ValueError(f"{file} is damaged or no index: {error}") from None
        self._width = int(self.settings["width"])
        self._counted: tuple[tuple[int, int], int] | None = None  # the state of the database, and its pieces
        self._last: tuple[tuple[str, int], dict[str, np.ndarray]] | None = None  # the last query, in this many pieces
        self._rows: tuple[int, Tensor] | None = None  # the generation of the vectors' file, and its rows
        # Of a large index: what it was made from, the rows in bfloat16, and the length of the longest.
        self._rounded: tuple[tuple[int, Tensor] | None, Tensor, float] | None = None

    def close(self) -> None:
        self._rows = self._rounded = None
        self._database.close()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While the index is changed. `ValueError` where another process does so."""
        try:
            with locked(self.folder / "lock"):
                self._tidy()
                yield
        except Locked as other:
            raise ValueError(f"{self.folder} is being changed by {other}") from None

    def documents(self, root: str | None = None) -> dict[str, Document]:
        """Those that were given by the path `root`, or all, by their paths."""
        rows = self._database.execute(
            "select path, root, name, kind, digest, modified, metadata from documents where ?1 is null or root = ?1 "
            "order by name",
            (root,),
        )
        return {
            path: Document(path, root, name, kind, digest, modified, json.loads(metadata))
            for path, root, name, kind, digest, modified, metadata in rows
        }

    def count(self) -> int:
        """How many pieces there are."""
        (version,) = self._database.execute("pragma data_version").fetchone()  # what others change changes it
        at = version, self._database.total_changes
        if self._counted is None or self._counted[0] != at:
            self._counted = at, int(self._database.execute("select count(*) from pieces").fetchone()[0])
        return self._counted[1]

    def known(self, digests: Iterable[str]) -> set[str]:
        """Of these pieces those that are there."""
        digests = list(digests)
        found: set[str] = set()
        for at in range(0, len(digests), 500):
            some = digests[at : at + 500]
            marks = ", ".join("?" * len(some))
            found |= {
                d for (d,) in self._database.execute(f"select digest from pieces where digest in ({marks})", some)
            }
        return found

    def put(
        self,
        documents: Sequence[tuple[Document, Sequence[Occurrence]]],
        contents: Mapping[str, tuple[str, Tensor]],
        removed: Sequence[str] = (),
    ) -> None:
        """Adds documents with their pieces, or puts them in the place of those with the same paths, and takes away the
        `removed` paths, all at once. `contents` gives the pieces that are not `known`: their text and vector."""
        with self._transaction() as database:
            first = self._next_row()
            new = {digest: first + n for n, digest in enumerate(contents)}
            self._append(first, [vector for _, vector in contents.values()])
            for digest, (content, _) in contents.items():
                database.execute("insert into pieces values (?, ?, ?)", (new[digest], digest, content))
                database.execute("insert into words (rowid, content) values (?, ?)", (new[digest], content))
            for document, occurrences in documents:
                self._forget(document.path)
                row = (document.path, document.root, document.name, document.kind, document.digest, document.modified)
                made = database.execute(
                    "insert into documents (path, root, name, kind, digest, modified, metadata) "
                    "values (?, ?, ?, ?, ?, ?, ?)",
                    (*row, json.dumps(document.metadata)),
                )
                database.executemany(
                    "insert into occurrences select ?, ?, id, ?, ?, ? from pieces where digest = ?",
                    [
                        (made.lastrowid, number, o.text, o.heading, o.place, o.digest)
                        for number, o in enumerate(occurrences)
                    ],
                )
            for path in removed:
                self._forget(path)
            self._drop_unused()

    def nearest(self, vector: Tensor, count: int, where: Mapping[str, str]) -> list[tuple[int, float]]:
        """The pieces whose vectors have the largest products with this one, (id, product) from the largest on."""
        rows = self._vectors()
        among = self._allowed(where) if where or self.count() < len(rows) else None
        if len(rows) >= LARGE:
            best = self._nearest_by_rounded(rows, vector, count, among)
            if best is not None:
                return best
        return _largest(rows @ vector, count, among)

    def _nearest_by_rounded(
        self, rows: Tensor, vector: Tensor, count: int, among: Tensor | None
    ) -> list[tuple[int, float]] | None:
        """The same from the rows in bfloat16, which lie in memory and are half as much to read: exact products of the
        first few choose among them. None where another one could be among the nearest."""
        if self._rounded is None or self._rounded[0] is not self._rows or len(self._rounded[1]) != len(rows):
            self._rounded = self._rows, rows.bfloat16(), float(rows.norm(dim=1).max())
        products = ops.linear(vector.bfloat16()[None], self._rounded[1])[0].float()
        with one_thread():  # a few rows: threads would wait for one another far longer
            tried = _largest(products, 4 * count, among)
            numbers = torch.tensor([piece for piece, _ in tried])
            best = _largest(rows[numbers] @ vector, count, None)
        error = ROUNDING * float(vector.norm()) * self._rounded[2]
        if len(tried) == 4 * count and best[-1][1] < tried[-1][1] + error:
            return None
        return [(int(numbers[i]), product) for i, product in best]

    def matching(self, query: str, count: int, where: Mapping[str, str]) -> list[tuple[int, float]]:
        """The pieces with the words of `query` by BM25, (id, score) from the largest on."""
        words = self._rare(query)
        if not words:
            return []
        condition, values = conditions(where, "glob", METADATA)
        among = "" if not where else f"and rowid in (select o.piece from {OCCURRING} where {condition})"
        rows = self._database.execute(
            f"select rowid, -rank from words where words match ? {among} order by rank limit ?",
            (" OR ".join(f'"{word}"' for word in words), *values, count),
        )
        return [(int(piece), float(score)) for piece, score in rows]

    def found(self, pieces: Sequence[int], where: Mapping[str, str]) -> list[Found]:
        """These pieces, each as the first of the documents has it that `where` allows."""
        condition, values = conditions(where, "glob", METADATA)
        results = []
        for piece in pieces:
            row = self._database.execute(
                f"select d.path, d.name, d.kind, d.metadata, o.text, o.heading, o.place, o.number from {OCCURRING} "
                f"where o.piece = ? and {condition} order by d.name, o.number limit 1",
                (piece, *values),
            ).fetchone()
            if row is not None:
                path, name, kind, metadata, *rest = row
                results.append(Found(piece, path, name, kind, json.loads(metadata), *rest))
        return results

    def holders(self, query: str, pieces: Sequence[int]) -> list[tuple[int, set[int]]]:
        """For each word of `query`, in a large index without those of over a fifth: how many pieces have it, and which
        of these."""
        wanted = np.asarray(pieces, dtype=np.int64)
        every = self._having(query).values()
        return [(len(have), set(wanted[np.isin(wanted, have, assume_unique=True)].tolist())) for have in every]

    # --- the words ------------------------------------------------------------------------------------------------

    def _rare(self, query: str) -> list[str]:
        """The words to look for; in a large index only those that tell pieces apart: FTS5 scores every piece that has
        any of them, at 100,000 pieces half a second for a word that all have."""
        total = self.count()
        return [word for word, have in self._having(query).items() if total < LARGE or len(have) <= RARE * total]

    def _having(self, query: str) -> dict[str, np.ndarray]:
        """For each word of `query` the pieces that have it, (n,) int64; in a large index without the words of over a
        fifth."""
        total = self.count()
        if self._last is None or self._last[0] != (query, total):
            most = total if total < LARGE else total // 5
            # As one text, which becomes numbers outside Python: a set of them would take three times as long as the
            # search for them, the rows by themselves ten times.
            having = "select group_concat(rowid) from (select rowid from words where words match ? limit ?)"
            found = {}
            for word in words_of(query):
                (numbers,) = self._database.execute(having, (f'"{word}"', most + 1)).fetchone()
                have = np.fromstring(numbers or "", dtype=np.int64, sep=",")
                if len(have) <= most:
                    found[word] = have
            self._last = (query, total), found
        return self._last[1]

    # --- the vectors ----------------------------------------------------------------------------------------------

    def _generation(self) -> int:
        return int(self._database.execute("select value from about where name = 'generation'").fetchone()[0])

    def _file(self, generation: int) -> Path:
        return self.folder / f"vectors.{generation}"

    def _next_row(self) -> int:
        return int(self._database.execute("select coalesce(max(id) + 1, 0) from pieces").fetchone()[0])

    def _vectors(self) -> Tensor:
        """All rows, mapped: read where they are looked at."""
        generation, rows = self._generation(), self._next_row()
        if self._rows is None or self._rows[0] != generation or len(self._rows[1]) < rows:
            file = self._file(generation)
            if rows and file.stat().st_size < rows * self._width * 4:
                raise ValueError(f"{file} is damaged: it is too short for {rows} vectors")
            mapped = (
                torch.from_file(str(file), shared=False, size=rows * self._width, dtype=torch.float32)
                if rows
                else torch.empty(0)
            )
            self._rows = generation, mapped.view(rows, self._width)
        return self._rows[1][:rows]

    def _append(self, first: int, vectors: Sequence[Tensor]) -> None:
        if not vectors:
            return
        data = torch.stack(list(vectors)).float().contiguous().numpy().tobytes()
        file = self._file(self._generation())
        with open(file, "r+b" if file.exists() else "w+b") as target:
            target.seek(first * self._width * 4)
            target.write(data)
            target.truncate()
            target.flush()
            os.fsync(target.fileno())

    def _tidy(self) -> None:
        """Moves what is left to a new file where more than half of the rows are empty; removes files of no use."""
        generation, rows = self._generation(), self._next_row()
        if rows > 1000 and self.count() < rows / 2:
            kept = [i for (i,) in self._database.execute("select id from pieces order by id")]
            vectors = self._vectors()[kept]
            with self._transaction() as database:
                self._file(generation + 1).unlink(missing_ok=True)
                database.execute("update about set value = ? where name = 'generation'", (generation + 1,))
                self._append(0, list(vectors))
                database.execute("pragma defer_foreign_keys = on")
                for row, old in enumerate(kept):  # a row moves down, to a place that is free by then
                    database.execute("update pieces set id = ? where id = ?", (row, old))
                    database.execute("update occurrences set piece = ? where piece = ?", (row, old))
                database.execute("insert into words (words) values ('rebuild')")
            self._rows, generation = None, generation + 1
        for file in self.folder.glob("vectors.*"):
            if file.name != f"vectors.{generation}":
                file.unlink()

    # --- the rows -------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._database.execute("begin immediate")
        try:
            yield self._database
        except BaseException:
            self._database.execute("rollback")
            raise
        self._database.execute("commit")

    def _forget(self, path: str) -> None:
        self._database.execute(
            "delete from occurrences where document in (select id from documents where path = ?)", (path,)
        )
        self._database.execute("delete from documents where path = ?", (path,))

    def _drop_unused(self) -> None:
        unused = self._database.execute(
            "select id, content from pieces where id not in (select piece from occurrences)"
        ).fetchall()
        self._database.executemany("insert into words (words, rowid, content) values ('delete', ?, ?)", unused)
        self._database.executemany("delete from pieces where id = ?", [(piece,) for piece, _ in unused])

    def _allowed(self, where: Mapping[str, str]) -> Tensor:
        condition, values = conditions(where, "glob", METADATA)
        if where:
            rows = self._database.execute(f"select distinct o.piece from {OCCURRING} where {condition}", values)
        else:
            rows = self._database.execute("select id from pieces")
        return torch.tensor([piece for (piece,) in rows], dtype=torch.int64)


def _largest(products: Tensor, count: int, among: Tensor | None) -> list[tuple[int, float]]:
    """The `count` largest of the products, of those numbered `among` where it is given: (number, product)."""
    if among is not None:
        allowed = torch.full_like(products, -torch.inf)
        allowed[among] = products[among]
        products, count = allowed, min(count, len(among))
    best = products.topk(min(count, len(products)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _create(file: Path, settings: Mapping[str, Any]) -> None:
    """A whole database or none."""
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.unlink(missing_ok=True)
    database = sqlite3.connect(temporary)
    with database:
        database.executescript(SCHEMA)
        facts = {"format": FORMAT, "generation": 0, "settings": json.dumps(dict(settings))}
        database.executemany("insert into about values (?, ?)", [(name, str(value)) for name, value in facts.items()])
    database.close()
    with open(temporary, "rb+") as made:
        os.fsync(made.fileno())
    connection = sqlite3.connect(temporary)
    connection.execute("pragma journal_mode = wal")  # readers go on while an index is changed
    connection.close()
    os.replace(temporary, file)
