"""Which tile sizes a kernel gets: the tables of `configs/`, one file a GPU family, one line a configuration.

A line's fields are of two kinds. Those that the kernel's dataclass names (tile sizes, warps, stages) are what it gets;
all others are the key under which it is found: the bytes of an element, the head dim rounded up, and so on. A sequence
length is never part of a key, so no length ever compiles a kernel again.

    {"element_bytes": 2, "head_dim": 64, "heavy": false, "query_block": 128, "key_block": 64, "warps": 8, "stages": 3}

Every file is complete: a family's configuration is the one line in its own file, and nothing falls through to another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent / "configs"
FAMILIES = ("ampere", "hopper", "blackwell", "cdna", "default")

Tile = TypeVar("Tile")  # a frozen dataclass: one per kind of kernel, defined beside it

_forced: dict[str, Any] = {}


def configuration(kernel: str, kind: type[Tile], family: str, **key: int | str | bool) -> Tile:
    """The line of `family`'s file for this kernel and key, as a `kind`. `ValueError` where there is none."""
    if _forced and kernel in _forced:
        return _forced[kernel]
    return _find(kernel, kind, family, tuple(key.items()))  # type: ignore[arg-type]


@contextmanager
def using(kernel: str, tile: object) -> Iterator[None]:
    """In this block `kernel` gets `tile`, whatever the tables say: to time or to test one configuration."""
    before = dict(_forced)
    _forced[kernel] = tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def configurations(kernel: str, kind: type[Tile], family: str) -> dict[frozenset, Tile]:
    """Every configuration of a kernel, by its key: a frozenset of (name, value) pairs."""
    file = f"{family}.json"
    lines = _read(family).get(kernel)
    if lines is None:
        raise ValueError(f"kernels/configs/{file} has no table {kernel!r}; it has {', '.join(_read(family))}")
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    required = {field.name for field in fields(kind) if field.default is field.default_factory}  # type: ignore[arg-type]
    found: dict[frozenset, Tile] = {}
    for line in lines:
        if missing := required - set(line):
            raise ValueError(f"kernels/configs/{file}, {kernel}: {json.dumps(line)} lacks {', '.join(sorted(missing))}")
        key = frozenset((name, value) for name, value in line.items() if name not in names)
        if key in found:
            raise ValueError(f"kernels/configs/{file}, {kernel}: two lines for {_words(dict(key))}")
        found[key] = kind(**{name: value for name, value in line.items() if name in names})
    return found


def line(tile: object, key: dict[str, Any]) -> str:
    """A configuration as it stands in a file."""
    values = asdict(tile)  # type: ignore[call-overload]
    defaults = {field.name: field.default for field in fields(tile)}  # type: ignore[arg-type]
    return json.dumps(key | {name: value for name, value in values.items() if value is not defaults[name]})


def rewrite(family: str, tables: dict[str, list[dict[str, Any]]]) -> str:
    """A whole file's text: tables of one line a configuration."""
    parts = []
    for kernel, lines in tables.items():
        body = ",\n".join(f"    {json.dumps(entry)}" for entry in lines)
        parts.append(f'  "{kernel}": [\n{body}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


@cache
def _find(kernel: str, kind: type[Tile], family: str, key: tuple[tuple[str, Any], ...]) -> Tile:
    found = configurations(kernel, kind, family)
    try:
        return found[frozenset(key)]
    except KeyError:
        raise ValueError(
            f"kernels/configs/{family}.json, {kernel}: no line for {_words(dict(key))}; "
            f"there are {'; '.join(sorted(_words(dict(known)) for known in found))}"
        ) from None


@cache
def _read(family: str) -> dict[str, list[dict[str, Any]]]:
    if family not in FAMILIES:
        raise ValueError(f"unknown GPU family {family!r}; known: {', '.join(FAMILIES)}")
    path = FOLDER / f"{family}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"kernels/configs/{family}.json can't be read: {error}") from error


def _words(key: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(key.items())) or "every call"
