"""A token for every character of the training text: the smallest vocabulary, and the longest sequences.

    "hello"  ->  h e l l o

Text of known characters round-trips. A character that training has not seen becomes `<unk>`, which decodes to U+FFFD.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import ClassVar

from llmfast.tokenizers.protocol import END_OF_TEXT
from llmfast.tokenizers.vocabulary import VocabularyTokenizer, most_frequent


class CharTokenizer(VocabularyTokenizer):
    """Characters are Unicode code points, in their order; then come `<unk>` and `<|endoftext|>`.

    >>> tokenizer = CharTokenizer.train(["hello"])
    >>> tokenizer.encode("hello"), tokenizer.decode([2, 0, 1])
    ([1, 0, 2, 2, 3], 'leh')
    """

    kind: ClassVar[str] = "char"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int | None = None) -> CharTokenizer:
        """The characters of `texts`: all of them, or with `vocab_size` the most frequent that fit."""
        if vocab_size is not None and vocab_size < 3:
            raise ValueError(f"vocab_size must be at least 3 (a character, {cls.UNKNOWN}, {END_OF_TEXT})")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        frequent = most_frequent(counts)
        kept = frequent if vocab_size is None else frequent[: vocab_size - 2]
        return cls([*sorted(kept), cls.UNKNOWN, END_OF_TEXT])

    def _encode_ordinary(self, text: str) -> list[int]:
        ids, unknown = self.vocab, self.unknown
        return [ids.get(character, unknown) for character in text]

    def _text_of(self, token: str) -> str:
        return "\ufffd" if token == self.UNKNOWN else token
