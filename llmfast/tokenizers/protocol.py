"""What the rest of the package needs of a tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import regex

from llmfast.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
# Special tokens that end a text, or a turn of a chat, whatever else a model's files say of its ends.
END_NAMES = (
    END_OF_TEXT,
    *("<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|eot|>", "<|end_of_turn|>"),
    *("<end_of_turn>", "</s>", "<EOT>", "<|end_of_role|>", "<|return|>", "<|call|>"),
)
TEMPLATE = "chat_template.jinja"
# Unicode's White_Space; `str.isspace` also counts the four separators of ASCII, which no tokenizer's library does.
BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")
Spans = Sequence[tuple[int, int]]  # parts of a text, from a character to before another, in order
# Every file that a tokenizer, of whatever kind, may keep beside its model.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer.model",
    TEMPLATE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. The classes here also have a classmethod `train(texts, vocab_size, …)`, and `load`.

    A special token is one that no text spells by accident: `encode` makes it only with `allow_special`, where the text
    holds its name; a list of spans allows it to names that are a whole span.
    """

    kind: ClassVar[str]  # "char", "word", …: what `load_tokenizer` and the command line call it
    special_tokens: dict[str, int]
    start_of_text: int | None  # what a model expects before every text; `encode` leaves it to the caller
    chat_template: str | None  # how a chat is written for the model: a template in Jinja's language

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows an embedding needs."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, or None where the vocabulary has none."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """The ids after which a text, or a turn of a chat, is complete."""
        ...

    def encode(self, text: str, allow_special: bool | Spans = False) -> list[int]: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8, token by token: what a list of ids gives is what its ids give one after another.

        Text can so be shown while it is made. A token may hold a part of a character. `ValueError` names an id that
        is not in the vocabulary.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, directory: str | Path) -> None: ...


class BaseTokenizer:
    """What all tokenizers share: where special tokens are, and what ends a text.

    A subclass has `special_tokens`, and encodes text without them by `_encode_ordinary`.
    """

    special_tokens: dict[str, int]
    start_of_text: int | None = None
    chat_template: str | None = None
    token_names: Mapping[str, str] = {}  # of special tokens, by what transformers calls them: "bos_token", …
    swallows: Mapping[str, tuple[bool, bool]] = {}  # special tokens that take the blanks before, or after, along
    _end: int | None = None  # what ends a text by the model's files

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, or else of the token that ends a text by the model's files, or None."""
        return self.special_tokens.get(END_OF_TEXT, self._end)

    @property
    def end_tokens(self) -> frozenset[int]:
        """End-of-text, the model's own, and the special tokens whose names say that they end something."""
        ends = {self.special_tokens[name] for name in END_NAMES if name in self.special_tokens}
        return frozenset(ends | {end for end in (self.end_of_text, self._end) if end is not None})

    def encode(self, text: str, allow_special: bool | Spans = False) -> list[int]:
        """Token ids of `text`. The name of a special token is ordinary text unless `allow_special`: everywhere, or
        where it is one of these spans."""
        if allow_special is False:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for number, part in enumerate(self._split_at_special(text, allow_special)):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._encode_ordinary(part) if number == 0 else self._encode_after_special(part)
        return ids

    def _split_at_special(self, text: str, spans: bool | Spans) -> Iterator[str | int]:
        """Text, and between two of its parts the id of a special token; of two that begin at one place the longer."""
        found = self.special_spans(text) if spans is True else spans or ()
        at = 0
        for start, end in found:
            name = text[start:end]
            if name not in self.special_tokens:
                raise ValueError(f"the span ({start}, {end}) is no special token, but {name!r}")
            before, after = self.swallows.get(name, (False, False))
            part = text[at:start]
            yield part.rstrip(BLANKS) if before else part
            yield self.special_tokens[name]
            at = _after_blanks(text, end) if after else end
        yield text[at:]

    @functools.cached_property
    def _special_names(self) -> regex.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")

    def special_spans(self, text: str) -> list[tuple[int, int]]:
        """Where `text` spells special tokens."""
        return [match.span() for match in self._special_names.finditer(text)]

    def _encode_ordinary(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_after_special(self, text: str) -> list[int]:
        return self._encode_ordinary(text)


def _after_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in BLANKS:
        at += 1
    return at


def write_files(directory: str | Path, files: Mapping[str, str | bytes], chat_template: str | None = None) -> None:
    """Writes the files of a tokenizer, by their names, and removes those of another that stood there."""
    directory = Path(directory)
    files = dict(files) if chat_template is None else {**files, TEMPLATE: chat_template}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(directory / name, content if isinstance(content, bytes) else content.encode())
    for name in set(TOKENIZER_FILES) - files.keys():
        (directory / name).unlink(missing_ok=True)


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
