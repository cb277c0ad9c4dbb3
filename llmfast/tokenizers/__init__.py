"""Text to token ids and back: one protocol, one small file an idea."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from llmfast.tokenizers.bpe import BPETokenizer
from llmfast.tokenizers.gpt2 import gpt2_tokenizer

__all__ = ["BPETokenizer", "Tokenizer", "gpt2_tokenizer", "load_tokenizer"]


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None: ...

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, directory: str | Path) -> None: ...


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer saved beside a model, or None where there is none; `ValueError` where its files are damaged."""
    try:
        return BPETokenizer.load(directory)
    except FileNotFoundError:
        return None
