"""Byte-level byte-pair encoding (Sennrich et al., 2016, on bytes as in GPT-2).

Text is split into chunks by a regular expression, a chunk is a sequence of bytes, and training joins the most
frequent pair of neighbouring tokens again and again:

    "low lower lowest"  ->  l o w | _ l o w e r | _ l o w e s t  ->  (l,o) is frequent: lo w | _ lo w e r | ...

Any text round-trips, because every byte is a token. Encoding runs in `tiktoken`. How merges are learned is in
`bpe_training`, how chunks are split in `splitting`, and what the files look like in `bpe_files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import tiktoken

from llmfast.tokenizers import bpe_files
from llmfast.tokenizers.bpe_files import BPEFiles
from llmfast.tokenizers.bpe_training import OnMerge, has_library, learn_merges, learn_merges_with_library
from llmfast.tokenizers.byte_letters import BYTES
from llmfast.tokenizers.protocol import END_OF_TEXT, BaseTokenizer, encodable
from llmfast.tokenizers.splitting import count_chunks, in_short_chunks, split_pattern, without_long_blanks

TRAINERS = ("auto", "python", "tokenizers")


class BPETokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer, trained here or read from GPT-2-style files.

    >>> tokenizer = BPETokenizer.train(["low lower lowest"] * 9, vocab_size=264)
    >>> tokenizer.decode(tokenizer.encode("lower ☃"))
    'lower ☃'
    """

    kind: ClassVar[str] = "bpe"

    def __init__(
        self,
        vocab: dict[bytes, int],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: dict[str, int],
        split: str = "gpt2",
    ):
        ids = [*vocab.values(), *special_tokens.values()]
        if any(not isinstance(i, int) or i < 0 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("token ids must be distinct integers from 0")
        self.vocab = vocab
        self.merges = list(merges)
        self.special_tokens = special_tokens
        self.split = split
        # tiktoken wants ids in merge order. A vocabulary in another order is encoded by rank and renamed.
        ranks = {token: rank for rank, token in enumerate(BYTES)}
        for left, right in self.merges:
            ranks.setdefault(left + right, len(ranks))
        missing = [token for token in ranks if token not in vocab]
        if missing:
            raise ValueError(f"the vocabulary lacks the token {missing[0]!r}, which its merges produce")
        self._id_of_rank = [vocab[token] for token in ranks]
        self._rename = self._id_of_rank != list(range(len(ranks)))
        self._bytes_of_id = {i: token for token, i in vocab.items()}
        self._bytes_of_id |= {i: text.encode() for text, i in special_tokens.items()}
        self._encoding = tiktoken.Encoding(
            "llmfast-bpe", pat_str=split_pattern(split), mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        on_merge: OnMerge | None = None,
        split: str = "gpt2",
        special_tokens: Sequence[str] = (),
        trainer: str = "auto",
        show_progress: bool = False,
    ) -> BPETokenizer:
        """Learns a vocabulary of `vocab_size` tokens: 256 bytes, the merges, `<|endoftext|>`, and `special_tokens`.

        A small corpus may have fewer pairs to join than asked for; the vocabulary is then smaller. `split` is "gpt2"
        or "gpt4" (see `splitting`). `texts` may be a stream: only its distinct chunks are kept.

        `trainer` is "python", to be read, "tokenizers", the library, for large corpora, or "auto": the library where
        it is installed, unless `on_merge(step, pair, count)` is to see every merge. Both learn the same merges.
        `show_progress` lets the library draw its bars.
        """
        special = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
        if "" in special:
            raise ValueError("a special token must have a name")
        least = len(BYTES) + len(special)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size must be at least {least} (every byte and {', '.join(special)}), got {vocab_size}"
            )
        if trainer not in TRAINERS:
            raise ValueError(f"trainer must be {', '.join(TRAINERS)}, got {trainer!r}")
        if trainer == "auto":
            trainer = "tokenizers" if on_merge is None and has_library() else "python"
        texts = in_short_chunks(map(encodable, texts), split)
        if trainer == "python":
            chunks = count_chunks(texts, split)
            counted = ((chunk.encode(), n) for chunk, n in chunks.items())
            merges = learn_merges(counted, vocab_size - least, on_merge)
        elif on_merge is not None:
            raise ValueError('to see every merge takes the trainer "python": the library does not tell of them')
        else:
            merges = learn_merges_with_library(texts, vocab_size - least, split, show_progress)
        vocab = {token: i for i, token in enumerate([*BYTES, *(left + right for left, right in merges)])}
        return cls(vocab, merges, {text: len(vocab) + i for i, text in enumerate(special)}, split)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows an embedding needs."""
        return max(self._bytes_of_id) + 1

    def _encode_ordinary(self, text: str) -> list[int]:
        ranks = [rank for part in without_long_blanks(text) for rank in self._encoding.encode_ordinary(part)]
        return [self._id_of_rank[rank] for rank in ranks] if self._rename else ranks

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. An id outside the vocabulary is a `ValueError` naming it."""
        try:
            return b"".join([self._bytes_of_id[int(i)] for i in ids])
        except KeyError as error:
            raise ValueError(f"token id {error.args[0]} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        """Writes `vocab.json` and `merges.txt`, or with GPT-4's split `tokenizer.json`, and `tokenizer_config.json`."""
        bpe_files.write(
            directory, BPEFiles(self.vocab, self.merges, self.special_tokens, self.split, self.chat_template)
        )

    @classmethod
    def load(cls, directory: str | Path) -> BPETokenizer:
        """Reads `vocab.json` and `merges.txt`, or else `tokenizer.json`; a damaged file is a `ValueError` naming it."""
        files, path = bpe_files.read(Path(directory))
        try:
            return cls(files.vocab, files.merges, files.special_tokens, files.split)
        except ValueError as error:
            raise ValueError(f"{path} is not a valid byte-level BPE vocabulary: {error}") from None
