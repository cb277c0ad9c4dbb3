"""SentencePiece's byte-pair encoding (Kudo and Richardson, 2018), as the Llama 2 family uses it.

A text is its characters, a blank spelled `▁`; of all neighbours that together are a piece, those with the best score
are joined, the first of equals, until none are left. A character that is no piece becomes its bytes:

    "Hello ☃"  ->  ▁ H e l l o ▁ ☃  ->  ▁Hello ▁ <0xE2> <0x98> <0x83>
"""

from __future__ import annotations

import functools
import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import regex

from llmfast.tokenizers import sentencepiece_file
from llmfast.tokenizers.model_files import CONFIG, read_config, token_names
from llmfast.tokenizers.protocol import BaseTokenizer, encodable, write_files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, as files number them
BLANK = "▁"
BYTE_NAMES = {f"<0x{byte:02X}>": byte for byte in range(256)}


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class SentencePieceTokenizer(BaseTokenizer):
    """`pieces[i]` is the token of id i. `config` is the `tokenizer_config.json` of transformers.

    With `space_prefix` a text is encoded as if it began with a blank, at its start and after special tokens.
    `ValueError` for pieces that are named twice, or do not encode every text.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, pieces: Sequence[Piece], space_prefix: bool = True, config: Mapping[str, Any] | None = None):
        self.pieces, self.space_prefix, self.config = list(pieces), space_prefix, dict(config or {})
        ids = {piece.text: i for i, piece in enumerate(self.pieces)}
        if len(ids) < len(self.pieces):
            twice = next(piece.text for i, piece in enumerate(self.pieces) if ids[piece.text] != i)
            raise ValueError(f"the vocabulary holds the token {twice!r} twice")
        if any(not math.isfinite(piece.score) or piece.kind not in range(1, 7) for piece in self.pieces):
            raise ValueError("a token's score is not finite, or its type none of 1 to 6")
        self.special_tokens = {p.text: i for i, p in enumerate(self.pieces) if p.kind in (CONTROL, UNKNOWN) and p.text}
        self._ids = {p.text: i for i, p in enumerate(self.pieces) if p.kind in (NORMAL, USER_DEFINED, UNUSED)}
        self._bytes = {
            BYTE_NAMES[p.text]: i for i, p in enumerate(self.pieces) if p.kind == BYTE and p.text in BYTE_NAMES
        }
        self._unknown = next((i for i, p in enumerate(self.pieces) if p.kind == UNKNOWN), None)
        if len(self._bytes) < 256 and self._unknown is None:
            raise ValueError("the vocabulary has neither a token for every byte nor one for unknown characters")
        names = self.token_names = token_names(self.config)
        self._end = ids.get(names.get("eos_token", ""))
        self.start_of_text = ids.get(names.get("bos_token", "")) if self.config.get("add_bos_token", True) else None
        self.chat_template = self.config.get("chat_template")

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def _user_defined(self) -> regex.Pattern[str]:
        """The pieces that stand for themselves wherever a text spells them, longest first."""
        named = sorted((p.text for p in self.pieces if p.kind == USER_DEFINED and p.text), key=len, reverse=True)
        return regex.compile(f"({'|'.join(map(regex.escape, named)) or '(?!)'})")

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._user_defined.split(encodable(text))):
            if number % 2:
                ids.append(self._ids[part])
            elif part:
                for symbol in self._joined((" " + part if self.space_prefix else part).replace(" ", BLANK)):
                    ids += self._ids_of(symbol)
        return ids

    def _joined(self, text: str) -> list[str]:
        """The pieces and single characters that are left when no two neighbours make a piece."""
        symbols = list(text)
        following, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        waiting: list[tuple[float, int, str]] = []  # pairs that make a piece: -score, place of the left one, the piece

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                piece = symbols[left] + symbols[right]
                if (i := self._ids.get(piece)) is not None:
                    heapq.heappush(waiting, (-self.pieces[i].score, left, piece))

        for right in range(1, len(symbols)):
            consider(right - 1, right)
        while waiting:
            _, left, piece = heapq.heappop(waiting)
            right = following[left]
            if not symbols[left] or right >= len(symbols) or symbols[left] + symbols[right] != piece:
                continue  # one of the two has been joined with another meanwhile
            symbols[left], symbols[right] = piece, ""
            following[left] = following[right]
            if following[left] < len(symbols):
                before[following[left]] = left
            consider(before[left], left)
            consider(left, following[left])
        return [symbol for symbol in symbols if symbol]

    def _ids_of(self, symbol: str) -> list[int]:
        if (i := self._ids.get(symbol)) is not None:
            return [i]
        encoded = symbol.encode()
        if all(byte in self._bytes for byte in encoded):
            return [self._bytes[byte] for byte in encoded]
        assert self._unknown is not None  # or there is a token for every byte
        return [self._unknown]

    @functools.cached_property
    def _spelled(self) -> list[bytes]:
        spelled = [p.text if p.text in self.special_tokens else p.text.replace(BLANK, " ") for p in self.pieces]
        single = {i: bytes([byte]) for byte, i in self._bytes.items()}
        return [single.get(i, text.encode()) for i, text in enumerate(spelled)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. An id outside the vocabulary is a `ValueError` naming it."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self.pieces):
                raise ValueError(f"token id {i} is not in the vocabulary of {self.vocab_size}")
        return b"".join([self._spelled[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without the blank that encoding has put before it."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.space_prefix else text

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.model`, SentencePiece's file, and `tokenizer_config.json`."""
        config = {"tokenizer_class": "LlamaTokenizer"} | self.config
        contents: dict[str, str | bytes] = {
            sentencepiece_file.NAME: sentencepiece_file.packed(self.pieces, self.space_prefix),
            CONFIG: json.dumps(config, indent=2),
        }
        write_files(directory, contents)

    @classmethod
    def load(cls, directory: str | Path) -> SentencePieceTokenizer:
        """Reads `tokenizer.model`; a damaged one is a `ValueError` naming it."""
        directory = Path(directory)
        path, config = directory / sentencepiece_file.NAME, read_config(directory)
        try:
            stored = sentencepiece_file.read(path)
            pieces = [Piece(*piece) for piece in stored.pieces]
            names = {role: pieces[i].text for role, i in stored.named.items() if 0 <= i < len(pieces)}
            return cls([*pieces, *_added(directory, config, pieces)], stored.space_prefix, names | config)
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer that can be used: {error}") from None


def _added(directory: Path, config: Mapping[str, Any], pieces: Sequence[Piece]) -> list[Piece]:
    """The tokens that `tokenizer_config.json` adds behind the pieces of the file."""
    listed = config.get("added_tokens_decoder", {})
    try:
        added = {int(i): (token["content"], bool(token.get("special"))) for i, token in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"added_tokens_decoder is not understood: {error!r}") from None
    behind = {i: token for i, token in added.items() if i >= len(pieces)}
    if sorted(behind) != list(range(len(pieces), len(pieces) + len(behind))):
        raise ValueError("the ids of added tokens should go on where the vocabulary ends")
    return [
        Piece(content, 0.0, CONTROL if special else USER_DEFINED) for _, (content, special) in sorted(behind.items())
    ]
