"""What the rest of the package needs of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import regex

from llmfast.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
# Every file that a tokenizer, of whatever kind, may keep beside its model.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. The classes here also have a classmethod `train(texts, vocab_size, …)`, and `load`.

    A special token is one that no text spells by accident: `encode` makes it only with `allow_special`, where the text
    holds its name.
    """

    kind: ClassVar[str]  # "char", "word", …: what `load_tokenizer` and the command line call it
    special_tokens: dict[str, int]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows an embedding needs."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, or None where the vocabulary has none."""
        ...

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8, token by token: what a list of ids gives is what its ids give one after another.

        Text can so be shown while it is made. A token may hold a part of a character. `ValueError` names an id that
        is not in the vocabulary.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, directory: str | Path) -> None: ...


def write_files(directory: str | Path, files: Mapping[str, str]) -> None:
    """Writes the files of a tokenizer, by their names, and removes those of another that stood there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(directory / name, content.encode())
    for name in set(TOKENIZER_FILES) - files.keys():
        (directory / name).unlink(missing_ok=True)


def split_at_special(text: str, special_tokens: Mapping[str, int]) -> Iterator[str | int]:
    """The text between special tokens, and their ids, in order; of two that begin at one place the longer."""
    if not special_tokens:
        yield text
        return
    longest_first = sorted(special_tokens, key=len, reverse=True)
    start = 0
    for match in regex.finditer("|".join(map(regex.escape, longest_first)), text):
        yield text[start : match.start()]
        yield special_tokens[match.group()]
        start = match.end()
    yield text[start:]


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which Python's strings can hold and UTF-8 can't."""
    if regex.search("[\ud800-\udfff]", text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; `ValueError` names one that doesn't."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return document
