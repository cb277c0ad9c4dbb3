"""An index in Postgres with pgvector, for many users or more than one machine: postgresql://user@host/database#name.

    about, documents, pieces, occurrences   as in `sqlite_store`, in a schema of their own: "llmfast", or "llmfast_name"
    pieces.vector                           with a graph (HNSW) over it, up to pgvector's 2,000 numbers
    pieces.words                            the stems of the text, none left out, in an inverted index

A change is one transaction, and one connection changes an index at a time. Pieces are found by their words in the order
of the summed weights of those they have (BM25's), and among equals by Postgres' own rank, which counts how often.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from torch import Tensor

from llmfast.retrieval.store import Document, Found, Occurrence, conditions, weight, words_of

FORMAT = 1
SCHEMES = ("postgresql", "postgres")
MOST_NUMBERS = 2000  # of a vector that pgvector builds a graph over
LOOKED_AT = 200  # vectors that a search in the graph keeps at hand
RARE, LARGE = 0.05, 20_000  # as in `sqlite_store`
OCCURRING = "occurrences o join documents d on d.id = o.document"
SCHEMA = """
create text search dictionary stems (template = pg_catalog.snowball, language = english);
create text search configuration words (copy = pg_catalog.english);
alter text search configuration words
    alter mapping for asciiword, word, asciihword, hword, hword_asciipart, hword_part with stems;
create table about (name text primary key, value text not null);
create table documents (
    id bigint generated always as identity primary key, path text unique not null, root text not null,
    name text not null, kind text not null, digest text not null, modified double precision not null,
    metadata jsonb not null
);
create table pieces (
    id bigint generated always as identity primary key, digest text unique not null, content text not null,
    vector public.vector({width}) not null,
    words tsvector generated always as (to_tsvector('{schema}.words', content)) stored
);
create table occurrences (
    document bigint not null references documents on delete cascade, number bigint not null,
    piece bigint not null references pieces, text text not null, heading text not null, place text not null,
    primary key (document, number)
);
create index on occurrences (piece);
create index on pieces using gin (words);
"""
GRAPH = "create index on pieces using hnsw (vector public.vector_ip_ops)"


def is_address(place: object) -> bool:
    return urlsplit(str(place)).scheme in SCHEMES


def without_password(address: str) -> str:
    parts = urlsplit(address)
    if parts.password is None:
        return address
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:…@{parts.netloc.rpartition('@')[2]}"))


class PostgresStore:
    """The `Store` at an address; with `settings` it is made where there is none. `SQLiteStore` says what methods do.

    `FileNotFoundError` where there is no index, `ValueError` where the database can't be reached or lacks pgvector.
    """

    def __init__(self, address: str, settings: Mapping[str, Any] | None = None):
        try:
            import psycopg
        except ImportError:
            raise ValueError('an index in Postgres needs psycopg: pip install "llmfast-kernels[postgres]"') from None
        parts = urlsplit(address)
        if not re.fullmatch(r"[a-z0-9_]{0,40}", parts.fragment):
            raise ValueError(f"an index's name has small letters, digits and _, got {parts.fragment!r}")
        self.shown = without_password(address)
        self._schema = "llmfast" + (f"_{parts.fragment}" if parts.fragment else "")
        try:
            self._database = psycopg.connect(urlunsplit(parts._replace(fragment="")), autocommit=True)
        except psycopg.Error as error:
            raise ValueError(f"{self.shown} can't be reached: {_line(error)}") from None
        try:
            if self._rows("select 1 from pg_namespace where nspname = %s", self._schema) == []:
                if settings is None:
                    raise FileNotFoundError(f"there is no index at {self.shown}")
                self._create(settings)
            self._run(f"set search_path to {self._schema}, public")
            about = dict(self._rows("select name, value from about"))
            if int(about["format"]) != FORMAT:
                raise ValueError(f"{self.shown} is an index of format {about['format']}, not {FORMAT}: index it anew")
            self.settings: dict[str, Any] = json.loads(about["settings"])
            self._run(f"set hnsw.ef_search = {LOOKED_AT}")
            self._run("set hnsw.iterative_scan = strict_order")  # as many as are asked for, filtered or not
        except psycopg.Error as error:
            self.close()
            raise ValueError(f"{self.shown} holds no index that can be used: {_line(error)}") from None
        except BaseException:
            self.close()
            raise
        self._last: tuple[tuple[str, int], dict[str, int]] | None = None  # the last query's words, in this many pieces

    def _create(self, settings: Mapping[str, Any]) -> None:
        width = int(settings["width"])
        with self._database.transaction():
            self._run("create extension if not exists vector with schema public")
            self._run(f"create schema {self._schema}")
            self._run(f"set local search_path to {self._schema}")
            self._run(SCHEMA.format(width=width, schema=self._schema))
            if width <= MOST_NUMBERS:
                self._run(GRAPH)
            for name, value in {"format": str(FORMAT), "settings": json.dumps(dict(settings))}.items():
                self._run("insert into about values (%s, %s)", name, value)

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def changing(self) -> Iterator[None]:
        key = f"llmfast {self._schema}"
        if not self._rows("select pg_try_advisory_lock(hashtext(%s))", key)[0][0]:
            raise ValueError(f"{self.shown} is being changed by another process")
        try:
            yield
        finally:
            if not self._database.closed:
                self._run("select pg_advisory_unlock(hashtext(%s))", key)

    def documents(self, root: str | None = None) -> dict[str, Document]:
        rows = self._rows(
            "select path, root, name, kind, digest, modified, metadata from documents "
            'where %s::text is null or root = %s order by name collate "C"',
            *(root, root),
        )
        return {row[0]: Document(*row) for row in rows}

    def count(self) -> int:
        return int(self._rows("select count(*) from pieces")[0][0])

    def known(self, digests: Iterable[str]) -> set[str]:
        return {digest for (digest,) in self._rows("select digest from pieces where digest = any(%s)", list(digests))}

    def put(
        self,
        documents: Sequence[tuple[Document, Sequence[Occurrence]]],
        contents: Mapping[str, tuple[str, Tensor]],
        removed: Sequence[str] = (),
    ) -> None:
        with self._database.transaction(), self._database.cursor() as cursor:
            cursor.executemany(
                "insert into pieces (digest, content, vector) values (%s, %s, %s::vector)",
                [(digest, _text(content), _numbers(vector)) for digest, (content, vector) in contents.items()],
            )
            gone = [*removed, *(document.path for document, _ in documents)]
            cursor.execute("delete from documents where path = any(%s)", (gone,))
            for document, occurrences in documents:
                row = (document.path, document.root, document.name, document.kind, document.digest, document.modified)
                cursor.execute(
                    "insert into documents (path, root, name, kind, digest, modified, metadata) "
                    "values (%s, %s, %s, %s, %s, %s, %s) returning id",
                    (*row, json.dumps(dict(document.metadata))),
                )
                made = cursor.fetchone()
                assert made is not None
                cursor.executemany(
                    "insert into occurrences select %s, %s, id, %s, %s, %s from pieces where digest = %s",
                    [
                        (made[0], number, _text(o.text), _text(o.heading), _text(o.place), o.digest)
                        for number, o in enumerate(occurrences)
                    ],
                )
            cursor.execute("delete from pieces p where not exists (select 1 from occurrences where piece = p.id)")

    def nearest(self, vector: Tensor, count: int, where: Mapping[str, str]) -> list[tuple[int, float]]:
        among, values = self._among(where)
        numbers = _numbers(vector)
        rows = self._rows(
            f"select id, -(vector <#> %s::vector) from pieces where {among} order by vector <#> %s::vector limit %s",
            *(numbers, *values, numbers, count),
        )
        return [(int(piece), float(product)) for piece, product in rows]

    def matching(self, query: str, count: int, where: Mapping[str, str]) -> list[tuple[int, float]]:
        total, numbers = self.count(), self._counts(query)
        words = {word: n for word, n in numbers.items() if total < LARGE or n <= RARE * total}
        if not words:
            return []
        among, values = self._among(where)
        has = "words @@ plainto_tsquery('words', %s)"
        score = " + ".join(f"case when {has} then %s else 0 end" for _ in words)
        weights = [part for word, n in words.items() for part in (word, weight(n, total))]
        any_of = " or ".join(has for _ in words)
        rank = " + ".join("ts_rank(words, plainto_tsquery('words', %s), 1)" for _ in words)
        rows = self._rows(
            f"select id, {score} + 0.01 * ({rank}) as score from pieces where ({any_of}) and {among} "
            "order by score desc, id limit %s",
            *(*weights, *words, *words, *values, count),
        )
        return [(int(piece), float(score)) for piece, score in rows]

    def holders(self, query: str, pieces: Sequence[int]) -> list[tuple[int, set[int]]]:
        result = []
        for word, number in self._counts(query).items():
            rows = self._rows(
                "select id from pieces where id = any(%s) and words @@ plainto_tsquery('words', %s)",
                *([int(piece) for piece in pieces], word),
            )
            result.append((number, {int(piece) for (piece,) in rows}))
        return result

    def found(self, pieces: Sequence[int], where: Mapping[str, str]) -> list[Found]:
        condition, values = self._conditions(where)
        rows = self._rows(
            "select distinct on (o.piece) o.piece, d.path, d.name, d.kind, d.metadata, o.text, o.heading, o.place, "
            f"o.number from {OCCURRING} where o.piece = any(%s) and {condition} "
            'order by o.piece, d.name collate "C", o.number',
            *([int(piece) for piece in pieces], *values),
        )
        by_piece = {row[0]: Found(*row) for row in rows}
        return [by_piece[piece] for piece in pieces if piece in by_piece]

    def _counts(self, query: str) -> dict[str, int]:
        """How many pieces have each word of `query`; in a large index counted to a fifth of all."""
        total = self.count()
        if self._last is None or self._last[0] != (query, total):
            having = "select 1 from pieces where words @@ plainto_tsquery('words', %s) limit %s"
            counting = f"select count(*) from ({having}) as these"
            most = total if total < LARGE else total // 5
            self._last = (query, total), {word: int(self._rows(counting, word, most)[0][0]) for word in words_of(query)}
        return self._last[1]

    def _among(self, where: Mapping[str, str]) -> tuple[str, list[str]]:
        if not where:
            return "true", []
        condition, values = self._conditions(where)
        return f"id in (select o.piece from {OCCURRING} where {condition})", values

    @staticmethod
    def _conditions(where: Mapping[str, str]) -> tuple[str, list[str]]:
        if "name" in where:
            literal = re.sub(r"([\\%_])", r"\\\1", where["name"])
            where = {**where, "name": literal.replace("*", "%").replace("?", "_")}
        return conditions(where, "like", "d.metadata ->> {}", "%s")

    def _rows(self, query: str, *values: Any) -> list[Any]:
        return self._database.execute(query, values or None).fetchall()

    def _run(self, query: str, *values: Any) -> None:
        self._database.execute(query, values or None)


def _numbers(vector: Tensor) -> str:
    return f"[{','.join(map(repr, vector.tolist()))}]"


def _text(text: str) -> str:
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # which Postgres has no place for


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
