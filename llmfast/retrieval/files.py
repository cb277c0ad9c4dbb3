"""The documents below a path: a file, those of a folder, or of a zip, each read whole, or left out with a reason."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmfast.documents import Source, files_in, find_sources
from llmfast.retrieval.blocks import MOST_BYTES, SUFFIXES

ZIPS = (".zip", ".ZIP")
LeftOut = Callable[[str], None]  # is told in one line what is left out, and why


@dataclass(frozen=True)
class File:
    """A document's bytes: `path` is its own, absolute, with the member's name after that of a zip; `name` is shown."""

    path: str
    name: str
    data: bytes
    modified: float  # seconds since 1970

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def kind(self) -> str:
        """The suffix in small letters, without the dot."""
        return Path(self.name).suffix.lower().removeprefix(".")


def root_of(path: str | Path) -> str:
    """How an index calls what it was given: the absolute path."""
    return str(Path(path).resolve())


def documents_below(path: str | Path, left_out: LeftOut) -> Iterator[tuple[str, str, Source]]:
    """The documents that a path leads to, as (absolute path, name to show, where to read it).

    `left_out` is told of each one that can't be looked into. `FileNotFoundError` for a path that leads nowhere,
    `ValueError` for a single file of a kind that is not read, and for a folder that holds none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    kinds = ", ".join(suffix for suffix in (*SUFFIXES, *ZIPS) if suffix.islower())
    if not path.is_dir() and path.suffix not in (*SUFFIXES, *ZIPS):
        raise ValueError(f"{path} is none of {kinds}")
    found = False
    for file in files_in(path, (*SUFFIXES, *ZIPS)):
        found = True
        try:
            sources = find_sources([file], suffixes=SUFFIXES) if file.suffix in ZIPS else [Source(file, None, 0)]
        except (OSError, ValueError) as error:
            left_out(_line(error))
            continue
        for source in sources:
            member = "" if source.member is None else f"/{source.member}"
            yield str(file.resolve()) + member, source.name, source
    if not found:
        raise ValueError(f"{path} holds no {kinds}")


def read_file(path: str, name: str, source: Source) -> File:
    """A document's bytes. `ValueError` in one line for one that is too large, changes meanwhile, or can't be read."""
    try:
        before = os.stat(source.path)
        size = before.st_size if source.member is None else source.size
        if size > MOST_BYTES:
            raise ValueError(f"{name} has {size / 1e6:,.0f} MB, more than the {MOST_BYTES >> 20} MB of a document")
        with source.opened() as file:
            data = file.read(MOST_BYTES + 1)
        after = os.stat(source.path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} can't be read: {error.strerror if isinstance(error, OSError) else error}") from None
    changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
    if changed or (source.member is None and len(data) != before.st_size) or len(data) > MOST_BYTES:
        raise ValueError(f"{name} changed while it was read: index it again when it is complete")
    return File(path, name, data, after.st_mtime)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
