"""A token for every word and punctuation mark, each with the blank before it.

    "The cat, the hat."  ->  The | _cat | , | _the | _hat | .

Text of known tokens round-trips, blanks included; a word that is known only after a blank comes back with one. A word
that training has not seen, or has seen too seldom, becomes `<unk>`: that is what the schemes that split words avoid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import ClassVar

import regex

from llmfast.tokenizers.protocol import END_OF_TEXT
from llmfast.tokenizers.vocabulary import VocabularyTokenizer, most_frequent

# A word with its inner apostrophes ("don't"), a run of digits, any other character; blanks that precede none of these.
SPLIT = regex.compile(r" ?\p{L}[\p{L}\p{M}]*(?:['’]\p{L}[\p{L}\p{M}]*)*| ?\p{N}+| ?[^\s\p{L}\p{N}]|\s")


class WordTokenizer(VocabularyTokenizer):
    """The most frequent words first, then `<unk>` and `<|endoftext|>`.

    >>> tokenizer = WordTokenizer.train(["The cat, the hat."])
    >>> tokenizer.decode(tokenizer.encode("The hat, the dog."))
    'The hat, the <unk>.'
    """

    kind: ClassVar[str] = "word"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int | None = None) -> WordTokenizer:
        """The words of `texts`: all of them, or with `vocab_size` the most frequent that fit."""
        if vocab_size is not None and vocab_size < 4:
            raise ValueError(f"vocab_size must be at least 4 (a word, the blank, {cls.UNKNOWN}, {END_OF_TEXT})")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(SPLIT.findall(text))
        del counts[" "]  # it is always there
        frequent = most_frequent(counts)
        kept = frequent if vocab_size is None else frequent[: vocab_size - 3]
        return cls([*kept, " ", cls.UNKNOWN, END_OF_TEXT])

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in SPLIT.findall(text):
            if (known := self.vocab.get(word, self.vocab.get(f" {word}"))) is not None:
                ids.append(known)
            elif word[0] == " " and " " in self.vocab:
                # The blank is known though the word is not, or not after a blank ("The" at the start of a line).
                ids += [self.vocab[" "], self.vocab.get(word[1:], self.unknown)]
            else:
                ids.append(self.unknown)
        return ids
