"""`tokenizer.model`: SentencePiece's own file, a message of protocol buffers (`sentencepiece_model.proto`).

ModelProto        1: pieces, each 1: text, 2: score, 3: kind      2: trainer      3: normalizer
trainer           3: model type (2 is BPE)     40 to 43: the ids of <unk>, <s>, </s> and padding
normalizer        2: a table of characters     3: begins with a blank     4: joins blanks     5: spells them ▁
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "tokenizer.model"
MOST_BYTES = 64 << 20
BPE = 2
NAMED_IDS = {40: ("unk_token", 0), 41: ("bos_token", 1), 42: ("eos_token", 2), 43: ("pad_token", -1)}


@dataclass(frozen=True)
class Stored:
    pieces: list[tuple[str, float, int]]  # text, score, kind
    space_prefix: bool
    named: dict[str, int]  # the ids of special tokens, by what transformers calls them


def read(path: Path) -> Stored:
    """`ValueError` says what is wrong with the file, or what it asks for that is not computed here."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than a vocabulary may be ({MOST_BYTES >> 20} MB)")
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((bytes(piece[1]).decode(), score, piece.get(3, 1)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (KeyError, TypeError, IndexError, struct.error, UnicodeDecodeError):
        raise ValueError("it is damaged, or not SentencePiece's") from None
    if not pieces:
        raise ValueError("it holds no pieces")
    if trainer.get(3, 1) != BPE:
        raise ValueError("its model is not byte-pair encoding, the only one that is computed here")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        raise ValueError("it normalises text, which is not computed here")
    named = {name: _signed(trainer.get(number, default)) for number, (name, default) in NAMED_IDS.items()}
    return Stored(pieces, bool(normalizer.get(3, 1)), named)


def packed(pieces: Sequence[tuple[str, float, int]], space_prefix: bool) -> bytes:
    """The file that holds these pieces; `read` gives them back, and SentencePiece encodes by them."""
    parts = [
        _field(1, _field(1, text.encode()) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in pieces
    ]
    whether_bytes = _number(35, int(any(kind == 6 for _, _, kind in pieces)))
    parts.append(_field(2, _number(3, BPE) + whether_bytes))
    parts.append(_field(3, _field(1, b"identity") + _number(3, int(space_prefix)) + _number(4, 0) + _number(5, 1)))
    return b"".join(parts)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: an int, or the bytes of anything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            length, at = _varint(data, at)
        elif tag & 7 in (1, 5):
            length = 8 if tag & 7 == 1 else 4
        else:
            raise IndexError
        if length > len(data) - at:
            raise IndexError
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise IndexError


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _packed_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _tag(number: int, wire: int) -> bytes:
    return _packed_varint(number << 3 | wire)


def _number(number: int, value: int) -> bytes:
    return _tag(number, 0) + _packed_varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, 2) + _packed_varint(len(content)) + content
