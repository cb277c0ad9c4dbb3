"""GPT-2's printable letter for each byte: how bytes are spelled in vocabulary files, and the order of their ids."""

from __future__ import annotations


def bytes_to_unicode() -> dict[int, str]:
    """A character for each byte, in the order of GPT-2's first 256 token ids.

    Printable bytes stand for themselves; the other 68 are moved up to code points from 256.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_LETTER = bytes_to_unicode()
LETTER_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_LETTER.items()}
BYTES = [bytes([byte]) for byte in BYTE_TO_LETTER]  # the first 256 tokens


def printable(token: bytes) -> str:
    return "".join([BYTE_TO_LETTER[byte] for byte in token])


def unprintable(text: str) -> bytes:
    unknown = [letter for letter in text if letter not in LETTER_TO_BYTE]
    if unknown:
        raise ValueError(f"the character {unknown[0]!r} of the token {text!r} stands for no byte")
    return bytes([LETTER_TO_BYTE[letter] for letter in text])
