"""Files to records: rows of a table, objects of JSON, each with the line that it stands in.

- `.csv`, `.tsv`: a header, then a row a line; in `.tsv` a quotation mark is a character like any other
- `.jsonl`: an object a line; `.json`: a list of objects, numbered from 1
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast.documents import read_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
LONGEST_ROW = 1 << 20  # characters: a longer one is a file whose lines do not end where they should
LARGEST_FILE = 1 << 30  # bytes, which are in memory as a whole


@dataclass(frozen=True)
class Record:
    """One row: its fields by name, and where it stands."""

    fields: dict[str, Any]
    place: str  # "line 7", or "record 7" of a list


def read_records(path: str | Path, encoding: str = "utf-8") -> list[Record]:
    """The rows of a file, blank lines left out. `FileNotFoundError`, or `ValueError` naming the line that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} is larger than {LARGEST_FILE >> 30} GB: divide it")
    text = read_text(path, encoding)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    read = {".csv": _table, ".tsv": _table, ".jsonl": _lines, ".json": _list}[path.suffix]
    records = list(read(path, text))
    if not records:
        raise ValueError(f"{path} has a header and no rows" if read is _table else f"{path} holds no records")
    return records


def _table(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        _check_length(path, f"line {number}", len(line))
    csv.field_size_limit(LONGEST_ROW)
    tabs = path.suffix == ".tsv"
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    try:
        header = [name.strip() for name in next(rows)]
        if len(set(header)) < len(header) or not all(header):
            raise ValueError(f"{path}: its header must name each column once, got {', '.join(header) or 'nothing'}")
        if len(header) == 1:
            raise ValueError(f"{path}: its header has one column, {header[0]!r:.80}: is it separated otherwise?")
        end = rows.line_num
        for row in rows:
            start, end = end + 1, rows.line_num
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(header):
                raise ValueError(f"{path}, line {start}: it has {len(row)} columns, and the header {len(header)}")
            yield Record(dict(zip(header, row, strict=True)), f"line {start}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        _check_length(path, f"line {number}", len(line))
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
            yield _record(path, fields, f"line {number}")


def _list(path: Path, text: str) -> Iterator[Record]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} should hold a list of records")
    for number, fields in enumerate(records, start=1):
        yield _record(path, fields, f"record {number}")


def _record(path: Path, fields: Any, place: str) -> Record:
    if not isinstance(fields, dict):
        raise ValueError(f"{path}, {place}: it should be an object, not {str(fields)!r:.40}")
    return Record(fields, place)


def _check_length(path: Path, place: str, length: int) -> None:
    if length > LONGEST_ROW:
        raise ValueError(f"{path}, {place}: it has {length:,} characters, and a row at most {LONGEST_ROW:,}")
