"""WordPiece, as BERT has it: words in pieces, of which all but the first are marked with `##`.

    "unaffable"  ->  un | ##aff | ##able

A word is split greedily, the longest known piece first. Blanks and punctuation only separate words, and control
characters are dropped, so that text does not round-trip: it comes back with one blank between words, and none before
closing punctuation. The ids do: encoding what they decode to gives them again, where none is `[UNK]`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import regex

from llmfast.tokenizers.protocol import END_OF_TEXT, encodable, read_json, write_files
from llmfast.tokenizers.vocabulary import VocabularyTokenizer, most_frequent, tokenizer_config
from llmfast.tokenizers.wordpiece_training import CONTINUATION, OnMerge, learn_tokens

# BERT's rules (Devlin et al., 2019). What stands alone, whatever is beside it: punctuation, all of ASCII's signs, and
# the characters of Chinese and Japanese, which have no blanks between words (those that transformers counts as such:
# it leaves out U+2B820 to U+2B91F).
CJK = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
    "\U0002f800-\U0002fa1f"
)
ALONE = rf"[!-/:-@\[-`{{-~\p{{P}}{CJK}]"
WORDS = regex.compile(rf"{ALONE}|[^\s!-/:-@\[-`{{-~\p{{P}}{CJK}]+")
STANDS_ALONE = regex.compile(ALONE)
DROPPED = regex.compile(r"[^\P{C}\t\n\r]|\ufffd")  # control characters and the like
LONGEST_WORD = 100  # characters; a longer one is `[UNK]`
REMEMBERED = 1 << 17  # words whose pieces are kept


class WordPieceTokenizer(VocabularyTokenizer):
    """`[UNK]` and `<|endoftext|>` first, then the alphabet, then the pieces in the order in which they were learned.

    `lowercase` takes off capitals and accents first, as BERT's uncased models do.

    >>> tokenizer = WordPieceTokenizer.train(["low lower lowest"] * 9, vocab_size=30)
    >>> tokenizer.decode(tokenizer.encode("Lower,  lowest"))
    '[UNK] [UNK] lowest'
    """

    kind: ClassVar[str] = "wordpiece"
    UNKNOWN: ClassVar[str] = "[UNK]"

    def __init__(self, tokens: Sequence[str], lowercase: bool = False):
        super().__init__(tokens)
        self.lowercase = lowercase
        self._longest = max(map(len, self.tokens))
        self._pieces: dict[str, list[int]] = {}  # of the words met so far

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        min_count: int | None = None,
        lowercase: bool = False,
        on_merge: OnMerge | None = None,
    ) -> WordPieceTokenizer:
        """Learns a vocabulary of `vocab_size` tokens, or fewer where nothing is left to join.

        `min_count` is the number of times that a pair must occur to be joined; see `learn_tokens`. Every character of
        `texts` is in the vocabulary, alone and as a continuation, as far as they fit: a word of known characters never
        becomes `[UNK]`.
        """
        if vocab_size < 4:
            raise ValueError(
                f"vocab_size must be at least 4 ({cls.UNKNOWN}, {END_OF_TEXT}, a character alone and as a continuation)"
            )
        words: Counter[str] = Counter()
        for text in texts:
            words.update(split_words(encodable(text), lowercase))
        characters: Counter[str] = Counter()
        for word, count in words.items():
            for character in word:
                characters[character] += count
        alphabet: list[str] = []
        for character in most_frequent(characters):
            forms = [character] if STANDS_ALONE.match(character) else [character, CONTINUATION + character]
            if len(alphabet) + len(forms) <= vocab_size - 2:
                alphabet += forms
        alphabet.sort()
        short = {word: count for word, count in words.items() if len(word) <= LONGEST_WORD}
        learned = learn_tokens(short, alphabet, vocab_size - 2 - len(alphabet), min_count, on_merge)
        return cls([cls.UNKNOWN, END_OF_TEXT, *alphabet, *learned], lowercase)

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in split_words(text, self.lowercase):
            if word not in self._pieces:
                if len(self._pieces) >= REMEMBERED:
                    self._pieces.clear()
                self._pieces[word] = self._split(word)
            ids += self._pieces[word]
        return ids

    def _split(self, word: str) -> list[int]:
        """The longest piece that the vocabulary has, again and again; `[UNK]` for all where that leads nowhere."""
        if len(word) > LONGEST_WORD:
            return [self.unknown]
        pieces: list[int] = []
        start = 0
        while start < len(word):
            prefix = CONTINUATION if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                if (piece := self.vocab.get(prefix + word[start:end])) is not None:
                    break
            else:
                return [self.unknown]
            pieces.append(piece)
            start = end
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """The words of `ids` with a blank before each but the first."""
        return super().decode(ids).removeprefix(" ")

    def _text_of(self, token: str) -> str:
        if token == END_OF_TEXT:
            return token
        if token.startswith(CONTINUATION) and token != CONTINUATION:
            return token.removeprefix(CONTINUATION)
        closing = len(token) == 1 and (token in ".,;:!?%" or unicodedata.category(token) in ("Pe", "Pf"))
        return token if closing else f" {token}"

    def save(self, directory: str | Path) -> None:
        """Writes `vocab.txt`, a token a line, and `tokenizer_config.json`, which transformers reads as BERT's."""
        more: dict[str, Any] = {"do_lower_case": self.lowercase}
        if self.end_of_text is not None:  # BERT's class insists on tokens for all of these
            more |= dict.fromkeys(("pad_token", "cls_token", "sep_token", "mask_token"), END_OF_TEXT)
        config = tokenizer_config("BertTokenizer", self.UNKNOWN, self.end_of_text is not None, **more)
        vocab = "".join(f"{token}\n" for token in self.tokens)
        write_files(directory, {"vocab.txt": vocab, "tokenizer_config.json": config}, self.chat_template)

    @classmethod
    def load(cls, directory: str | Path) -> WordPieceTokenizer:
        """Reads `vocab.txt`, and from `tokenizer_config.json` whether case counts (without it, it does)."""
        path, config = Path(directory) / "vocab.txt", Path(directory) / "tokenizer_config.json"
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer in {directory}: expected vocab.txt")
        try:
            tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            return cls(tokens, bool(read_json(config).get("do_lower_case", True)) if config.exists() else False)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not a vocabulary: {error}") from None


def split_words(text: str, lowercase: bool = False) -> Iterator[str]:
    """Words and punctuation marks, by BERT's rules."""
    text = DROPPED.sub("", text)
    if lowercase:
        text = regex.sub(r"\p{Mn}", "", unicodedata.normalize("NFD", text)).lower()
    return (match[0] for match in WORDS.finditer(text))
