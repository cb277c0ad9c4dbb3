"""Tokenizers of other people's models, run by the `tokenizers` library: what a `tokenizer.json` says is its business.

The library reads the file and encodes; here is what this project asks beyond that: text never becomes a special token
unless it may, and every id has bytes of its own, so that text can be shown while it is made.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tokenizers

from llmfast.tokenizers.byte_letters import LETTER_TO_BYTE
from llmfast.tokenizers.model_files import CONFIG, read_config, token_names
from llmfast.tokenizers.protocol import BaseTokenizer, encodable, write_files

FILE = "tokenizer.json"
MOST_BYTES = 256 << 20  # of a tokenizer.json
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class LibraryTokenizer(BaseTokenizer):
    """A `tokenizers.Tokenizer`, which is taken over, and the `tokenizer_config.json` beside it.

    `ValueError` for one whose tokens can't be turned into bytes one by one.
    """

    kind: ClassVar[str] = "library"

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None):
        self.config = dict(config or {})
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        self.special_tokens = {token.content: i for i, token in special.items()}
        self.swallows = {t.content: (t.lstrip, t.rstrip) for t in special.values() if t.lstrip or t.rstrip}
        self._added = {i: token.content for i, token in added.items()}
        names = self.token_names = token_names(self.config)
        self._end = self._id_of(names.get("eos_token"))
        self.start_of_text = self._start(names.get("bos_token"))
        self.chat_template = self.config.get("chat_template")
        # Text that spells a special token's name gives ordinary tokens; `encode` finds those that are meant.
        tokenizer.encode_special_tokens = True
        unknown = self._id_of(getattr(tokenizer.model, "unk_token", None) or names.get("unk_token"))
        self._forbidden = frozenset(special) - {unknown}
        self._steps = list(_steps(tokenizer.decoder))
        self._bytes_of_id: dict[int, bytes] = {}  # of those that were decoded

    def _id_of(self, name: str | None) -> int | None:
        return None if name is None else self._tokenizer.token_to_id(name)

    def _start(self, bos: str | None) -> int | None:
        """The token that the files put before every text."""
        says = self.config.get("add_bos_token")
        if says is None:  # then the library's own post-processor
            says = self._tokenizer.encode("").ids[:1] == [self._id_of(bos)]
        return self._id_of(bos) if says else None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows an embedding needs."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._without_special(self._tokenizer, encodable(text))

    def _encode_after_special(self, text: str) -> list[int]:
        return self._without_special(self._later, encodable(text))

    def _without_special(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        made = tokenizer.encode(text, add_special_tokens=False)
        if self._forbidden.isdisjoint(made.ids):
            return made.ids
        # A name that is one word of the vocabulary, too: its letters then stand one by one.
        ids: list[int] = []
        for i, (start, end) in zip(made.ids, made.offsets, strict=True):
            if i not in self._forbidden:
                ids.append(i)
            elif end - start < 2:
                raise ValueError(f"{text[start:end]!r} is a special token of this model, and can't be written as text")
            else:
                ids += [part for letter in text[start:end] for part in self._without_special(self._later, letter)]
        return ids

    @functools.cached_property
    def _later(self) -> tokenizers.Tokenizer:
        """For text that is not the first: one that puts a blank before the first word only puts none there."""
        state = self._tokenizer.pre_tokenizer
        if state is None or b'"first"' not in state.__getstate__():
            return self._tokenizer
        document = json.loads(self._tokenizer.to_str())
        document["pre_tokenizer"] = _never_before_the_first(document["pre_tokenizer"])
        later = tokenizers.Tokenizer.from_str(json.dumps(document))
        later.encode_special_tokens = True
        return later

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. An id outside the vocabulary is a `ValueError` naming it."""
        return b"".join([self._bytes_of_id.get(i) or self._bytes_of(i) for i in map(int, ids)])

    def _bytes_of(self, i: int) -> bytes:
        if i in self._added:
            spelled = self._added[i].encode()
        else:
            token = self._tokenizer.id_to_token(i) if 0 <= i < self.vocab_size else None
            if token is None:
                raise ValueError(f"token id {i} is not in the vocabulary of {self.vocab_size}")
            spelled = _spelled(token, self._steps)
        self._bytes_of_id[i] = spelled
        return spelled

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without the blank that encoding may have put before it."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if ("strip", " ") in self._steps else text

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        write_files(directory, {FILE: self._tokenizer.to_str(), CONFIG: json.dumps(config, indent=2)})

    @classmethod
    def load(cls, directory: str | Path) -> LibraryTokenizer:
        """Reads `tokenizer.json`; a damaged one is a `ValueError` naming it."""
        path = Path(directory) / FILE
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} is larger than a tokenizer may be ({MOST_BYTES >> 20} MB)")
        config = read_config(Path(directory))
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), config)
        except Exception as error:  # the library raises plain `Exception`
            raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from None


def _never_before_the_first(node: Any) -> Any:
    """The library's document of a pre-tokenizer, its `prepend_scheme` "never"."""
    if isinstance(node, dict):
        changed = {key: _never_before_the_first(value) for key, value in node.items()}
        return changed | ({"prepend_scheme": "never"} if "prepend_scheme" in node else {})
    return [_never_before_the_first(item) for item in node] if isinstance(node, list) else node


def _steps(decoder: Any) -> Iterator[tuple[str, str]]:
    """What a decoder of the library does to every token, as (step, its parameter)."""
    document: Any = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "Fuse"}
    for step in document["decoders"] if document["type"] == "Sequence" else [document]:
        kind = step["type"]
        if kind == "ByteLevel":
            yield "letters", ""
        elif kind == "Metaspace":
            yield "blank", step["replacement"]
            if step["prepend_scheme"] != "never":
                yield "strip", " "
        elif kind == "Replace" and "String" in step["pattern"] and step["content"] == " ":
            yield "blank", step["pattern"]["String"]
        elif kind == "ByteFallback":
            yield "bytes", ""
        elif kind == "WordPiece":
            yield "continuation", step["prefix"]
            yield "strip", " "
        elif kind == "BPEDecoder":
            yield "blank", step["suffix"]
        elif kind == "Strip" and step["content"] == " " and step["stop"] == 0:
            yield "strip", " "
        elif kind != "Fuse":
            raise ValueError(f"its decoder {kind} is not known here")


def _spelled(token: str, steps: list[tuple[str, str]]) -> bytes:
    for step, parameter in steps:
        if step == "letters":
            if all(letter in LETTER_TO_BYTE for letter in token):
                return bytes([LETTER_TO_BYTE[letter] for letter in token])
        elif step == "bytes":
            if byte := BYTE_TOKEN.fullmatch(token):
                return bytes([int(byte[1], 16)])
        elif step == "blank":
            token = token.replace(parameter, " ")
        elif step == "continuation":
            token = token[len(parameter) :] if token.startswith(parameter) else f" {token}"
    return token.encode()
