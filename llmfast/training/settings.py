"""Settings in sections: dataclasses whose values are typed, checked, and changed by name.

A setting is a field of one of a configuration's sections, and unique among them: `lr`, `optimization.lr` and, in a
file, `lr` under `[optimization]` mean the same. An unknown key is an error that names the nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from typing_extensions import Self

INFINITY = float("inf")


def setting(
    default: Any,
    meaning: str,
    *,
    least: float = -INFINITY,
    most: float = INFINITY,
    above: float = -INFINITY,
    below: float = INFINITY,
    options: Sequence[str] = (),
) -> Any:
    """A field with its meaning (for `--print-config`) and its range."""
    limits = {"at least": least, "at most": most, "above": above, "below": below}
    limits = {words: limit for words, limit in limits.items() if abs(limit) != INFINITY}
    return field(default=default, metadata={"meaning": meaning, "limits": limits, "options": options})


class Setting(NamedTuple):
    """Where a setting is, and what it may be."""

    section: str
    field: dataclasses.Field[Any]
    kind: type


@dataclass(frozen=True)
class Configuration:
    """A whole run. `ValueError` in one line for a value of a wrong type or out of range.

    A subclass is a frozen dataclass of sections, each a frozen dataclass whose fields are made by `setting`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        for name, (section, each, kind) in self.settings().items():
            _check(each, kind, getattr(getattr(self, section), name))

    @classmethod
    def sections(cls) -> tuple[str, ...]:
        return tuple(each.name for each in dataclasses.fields(cls))

    @classmethod
    @functools.cache
    def settings(cls) -> dict[str, Setting]:
        """Every setting by its name, in order."""
        kinds = typing.get_type_hints(cls)
        return {
            each.name: Setting(section, each, typing.get_type_hints(kinds[section])[each.name])
            for section in cls.sections()
            for each in dataclasses.fields(kinds[section])
        }

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """The same with some settings changed: {"lr": 1e-3} or {"optimization.lr": "1e-3"}, strings are converted."""
        by_section: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            section, each, kind = self.find(key)
            by_section.setdefault(section, {})[each.name] = _converted(each, kind, value)
        sections = {name: dataclasses.replace(getattr(self, name), **some) for name, some in by_section.items()}
        return dataclasses.replace(self, **sections)

    def to_document(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """From tables by section, as in a TOML file; a `preset` beside them is what they start from."""
        config = cls.preset(document["preset"]) if "preset" in document else cls()
        return config.replace(_flattened(document))

    @classmethod
    def preset(cls, name: str) -> Self:
        if name not in cls.presets:
            raise ValueError(
                f"unknown preset {name!r}{_nearest(str(name), cls.presets)}; known: {', '.join(cls.presets)}"
            )
        return cls().replace(cls.presets[name])

    def to_toml(self) -> str:
        """A file that `--config` takes, each setting with its meaning."""
        lines = []
        for section in self.sections():
            lines.append(f"[{section}]")
            for each in dataclasses.fields(getattr(self, section)):
                value = json.dumps(getattr(getattr(self, section), each.name), ensure_ascii=False)
                value = value.replace("\x7f", "\\u007f")  # JSON's strings are TOML's but for this character
                options = f": {', '.join(each.metadata['options'])}" if each.metadata["options"] else ""
                lines.append(f"{each.name} = {value}  # {each.metadata['meaning']}{options}")
            lines.append("")
        return "\n".join(lines)

    @classmethod
    def configure(
        cls, preset: str | None = None, file: str | Path | None = None, changes: Mapping[str, Any] | None = None
    ) -> Self:
        """Defaults, then the preset, then the file, then single changes."""
        document = read_toml(file) if file is not None else {}
        if preset is not None:
            document = document | {"preset": preset}
        try:
            config = cls.from_document(document)
        except ValueError as error:
            raise ValueError(f"{file}: {error}" if file is not None else str(error)) from None
        return config.replace(changes or {})

    def differences(self, other: Configuration) -> dict[str, tuple[Any, Any]]:
        """The settings that differ, with both values, this one's first."""
        pairs = {
            name: (getattr(getattr(self, section), name), getattr(getattr(other, section), name))
            for name, (section, _, _) in self.settings().items()
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @classmethod
    def find(cls, key: str) -> Setting:
        """The setting that a key names. `ValueError` names the nearest where it names none."""
        section, _, name = key.rpartition(".")
        settings = cls.settings()
        if name in settings and section in ("", settings[name].section):
            return settings[name]
        if section and section not in cls.sections():
            known = cls.sections()
            raise ValueError(f"unknown section {section!r}{_nearest(section, known)}; known: {', '.join(known)}")
        if name in settings:
            raise ValueError(f"unknown setting {key!r}: {name} belongs to {settings[name].section}")
        within = [known for known, (home, _, _) in settings.items() if section in ("", home)]
        raise ValueError(f"unknown setting {key!r}{_nearest(name, within) or '; known: ' + ', '.join(within)}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; `ValueError` naming the file where it is none, `OSError` where it can't be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _flattened(document: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": each for name, each in value.items()}
        elif key != "preset":
            flat[key] = value
    return flat


def _converted(each: dataclasses.Field[Any], kind: type, value: Any) -> Any:
    """`value` in the field's type; text is read as the type asks, and a whole number serves as a float."""
    try:
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if kind is int and isinstance(value, str):
            return int(value)
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, KeyError):
        raise ValueError(f"{each.name} must be {_words(kind)}, got {value!r}") from None
    return value


def _check(each: dataclasses.Field[Any], kind: type, value: Any) -> None:
    right = type(value) is kind or (kind is float and type(value) is int)
    if not right or value != value:
        raise ValueError(f"{each.name} must be {_words(kind)}, got {value!r}")
    options = each.metadata["options"]
    if options and value not in options:
        raise ValueError(f"{each.name} must be {', '.join(options)}, got {value!r}{_nearest(value, options)}")
    passes = {"at least": lambda x, y: x >= y, "at most": lambda x, y: x <= y}
    passes |= {"above": lambda x, y: x > y, "below": lambda x, y: x < y}
    limits = each.metadata["limits"]
    if value in (INFINITY, -INFINITY) or not all(passes[words](value, limit) for words, limit in limits.items()):
        wanted = " and ".join(f"{words} {limit:g}" for words, limit in limits.items()) or "finite"
        raise ValueError(f"{each.name} must be {wanted}, got {value!r}")


def _words(kind: type | types.UnionType) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[typing.cast(type, kind)]
