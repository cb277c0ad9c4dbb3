"""What tokenizers whose vocabulary is a plain list of strings have in common."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llmfast.tokenizers.protocol import END_OF_TEXT, BaseTokenizer, read_json, write_files


def most_frequent(counts: Counter[str]) -> list[str]:
    """The tokens from the most frequent on, equals in their order; none with half a surrogate pair."""
    spelled = [token for token in counts if not any("\ud800" <= character <= "\udfff" for character in token)]
    return sorted(spelled, key=lambda token: (-counts[token], token))


def tokenizer_config(name: str, unknown: str, has_end: bool, **more: Any) -> str:
    """`tokenizer_config.json`, which names the class to read the vocabulary with, and the special tokens."""
    config = {"tokenizer_class": name, "unk_token": unknown} | more
    if has_end:
        config |= dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    return json.dumps(config, indent=2)


Made = TypeVar("Made", bound="VocabularyTokenizer")


class VocabularyTokenizer(BaseTokenizer):
    """`tokens[i]` is the token of id i. The token `UNKNOWN` stands for all that has none; end-of-text may be missing.

    A subclass says how text is split into tokens (`_encode_ordinary`).
    """

    kind: ClassVar[str]
    UNKNOWN: ClassVar[str] = "<unk>"

    def __init__(self, tokens: Sequence[str]):
        self.tokens = list(tokens)
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        if len(self.vocab) < len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.vocab[token] != i)
            raise ValueError(f"the vocabulary holds the token {twice!r} twice")
        if self.UNKNOWN not in self.vocab:
            raise ValueError(f"the vocabulary lacks {self.UNKNOWN}")
        self.unknown = self.vocab[self.UNKNOWN]
        self.special_tokens = {END_OF_TEXT: self.vocab[END_OF_TEXT]} if END_OF_TEXT in self.vocab else {}
        self._bytes = [self._text_of(token).encode() for token in self.tokens]

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that `ids` stand for. An id outside the vocabulary is a `ValueError` naming it."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self.tokens):
                raise ValueError(f"token id {i} is not in the vocabulary of {self.vocab_size}")
        return b"".join([self._bytes[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode()

    def _text_of(self, token: str) -> str:
        """What a token looks like in decoded text."""
        return token

    def save(self, directory: str | Path) -> None:
        """Writes `vocab.json`, the id of each token, and `tokenizer_config.json`, which names the kind."""
        vocab = json.dumps(self.vocab, ensure_ascii=False, indent=0)
        config = tokenizer_config(type(self).__name__, self.UNKNOWN, self.end_of_text is not None)
        write_files(directory, {"vocab.json": vocab, "tokenizer_config.json": config}, self.chat_template)

    @classmethod
    def load(cls: type[Made], directory: str | Path) -> Made:
        """Reads `vocab.json`; a damaged one is a `ValueError` naming it."""
        path = Path(directory) / "vocab.json"
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer in {directory}: expected vocab.json")
        vocab = read_json(path)
        tokens = sorted(vocab, key=lambda token: (not isinstance(vocab[token], int), vocab[token]))
        if [vocab[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError(f"{path} should give the tokens the ids from 0 on, each once")
        try:
            return cls(tokens)
        except ValueError as error:
            raise ValueError(f"{path} is not a vocabulary: {error}") from None
