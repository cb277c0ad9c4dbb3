"""Byte-level byte-pair encoding (Sennrich et al., 2016, on bytes as in GPT-2).

Text is split into chunks by a regular expression, a chunk is a sequence of bytes, and training joins the most
frequent pair of neighbouring tokens again and again:

    "low lower lowest"  ->  l o w | _ l o w e r | _ l o w e s t  ->  (l,o) is frequent: lo w | _ lo w e r | ...

Any text round-trips, because every byte is a token. Encoding runs in `tiktoken`; the files are GPT-2's own
`vocab.json` and `merges.txt`, which Hugging Face's tokenizers read too.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import regex
import tiktoken

from llmfast.files import write_atomic

GPT2_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"
# tiktoken's regular expressions panic at a million blanks in a row, so longer runs are encoded in parts.
LONGEST_BLANK = 500_000


def without_long_blanks(text: str) -> list[str]:
    """The text in parts, cut where a run of `LONGEST_BLANK` blanks begins and ends."""
    if len(text) < LONGEST_BLANK:
        return [text]
    cuts = [0]
    for run in regex.finditer(r"\s+", text):
        if (whole := len(run[0]) // LONGEST_BLANK) > 0:
            cuts += [run.start() + i * LONGEST_BLANK for i in range(whole + 1)]
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if start < end]


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of its first 256 token ids.

    Printable bytes stand for themselves; the other 68 are moved up to code points from 256.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHARACTER = bytes_to_unicode()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def learn_merges(
    chunks: Iterable[tuple[bytes, int]],
    num_merges: int,
    on_merge: Callable[[int, tuple[bytes, bytes], int], None] | None = None,
) -> list[tuple[bytes, bytes]]:
    """The `num_merges` most frequent pairs, in the order in which they are joined.

    `chunks` are the distinct chunks of the corpus with their counts. Each is walked once; afterwards a merge touches
    only the chunks that contain its pair. Of pairs with equal counts the one with the smaller token ids goes first.
    `on_merge(step, pair, count)` sees every merge as it happens.
    """
    ids = {bytes([byte]): i for i, byte in enumerate(BYTE_TO_CHARACTER)}
    pieces = list(ids)  # id -> the bytes it stands for
    words, counts = [], []
    for chunk, count in chunks:
        words.append([ids[bytes([byte])] for byte in chunk])
        counts.append(count)

    pair_counts: Counter[tuple[int, int]] = Counter()
    pair_words: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pair_counts[pair] += counts[index]
            pair_words[pair].add(index)
    # A heap with outdated entries: an entry counts only if its count is still the pair's.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    merges: list[tuple[bytes, bytes]] = []
    while heap and len(merges) < num_merges:
        negative_count, pair = heapq.heappop(heap)
        if pair_counts[pair] != -negative_count or negative_count == 0:
            continue
        left, right = pieces[pair[0]], pieces[pair[1]]
        if on_merge is not None:
            on_merge(len(merges), (left, right), -negative_count)
        merges.append((left, right))
        # Two different merges can spell the same bytes ("a"+"bc", "ab"+"c"); they share one token.
        token = ids.setdefault(left + right, len(pieces))
        if token == len(pieces):
            pieces.append(left + right)

        changed: set[tuple[int, int]] = set()
        for index in pair_words.pop(pair):
            word, count = words[index], counts[index]
            merged = _join(word, pair, token)
            for old in zip(word, word[1:], strict=False):
                pair_counts[old] -= count
                changed.add(old)
            for new in zip(merged, merged[1:], strict=False):
                pair_counts[new] += count
                pair_words[new].add(index)
                changed.add(new)
            words[index] = merged
        for pair in changed:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            else:
                del pair_counts[pair]
    return merges


def _join(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


class BPETokenizer:
    """A byte-level BPE tokenizer, trained here or read from GPT-2-style files.

    >>> tokenizer = BPETokenizer.train(["low lower lowest"] * 9, vocab_size=264)
    >>> tokenizer.decode(tokenizer.encode("lower ☃"))
    'lower ☃'
    """

    kind: ClassVar[str] = "bpe"

    def __init__(self, vocab: dict[bytes, int], merges: Sequence[tuple[bytes, bytes]], special_tokens: dict[str, int]):
        ids = [*vocab.values(), *special_tokens.values()]
        if any(not isinstance(i, int) or i < 0 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("token ids must be distinct integers from 0")
        self.vocab = vocab
        self.merges = list(merges)
        self.special_tokens = special_tokens
        # tiktoken wants ids in merge order. A vocabulary in another order is encoded by rank and renamed.
        ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_TO_CHARACTER)}
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
            "llmfast-bpe", pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self._special_pattern = (
            regex.compile("|".join(regex.escape(s) for s in special_tokens)) if special_tokens else None
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        on_merge: Callable[[int, tuple[bytes, bytes], int], None] | None = None,
    ) -> BPETokenizer:
        """Learns a vocabulary of `vocab_size` tokens: 256 bytes, the merges, and `<|endoftext|>` as the last.

        A small corpus may have fewer pairs to join than asked for; the vocabulary is then smaller.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (every byte and {END_OF_TEXT}), got {vocab_size}")
        pattern = regex.compile(GPT2_SPLIT_PATTERN)
        chunks: Counter[str] = Counter()
        for text in texts:
            chunks.update(pattern.findall(text))
        merges = learn_merges(((chunk.encode(), n) for chunk, n in chunks.items()), vocab_size - 257, on_merge)
        vocab = {bytes([byte]): i for i, byte in enumerate(BYTE_TO_CHARACTER)}
        for left, right in merges:
            vocab.setdefault(left + right, len(vocab))
        return cls(vocab, merges, {END_OF_TEXT: len(vocab)})

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows an embedding needs."""
        return max(self._bytes_of_id) + 1

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, or None where the vocabulary has none."""
        return self.special_tokens.get(END_OF_TEXT)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens such as `<|endoftext|>` are ordinary text unless `allow_special`."""
        if not allow_special or self._special_pattern is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(self.special_tokens[match.group()])
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

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
        """Writes `vocab.json`, `merges.txt` and `tokenizer_config.json` in GPT-2's layout."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        vocab = {_printable(token): i for token, i in self.vocab.items()} | self.special_tokens
        merges = [f"{_printable(left)} {_printable(right)}" for left, right in self.merges]
        config = {"tokenizer_class": "GPT2Tokenizer"}
        if self.end_of_text is not None:
            config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        write_atomic(directory / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
        write_atomic(directory / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
        write_atomic(directory / "tokenizer_config.json", json.dumps(config, indent=2).encode())

    @classmethod
    def load(cls, directory: str | Path) -> BPETokenizer:
        """Reads `vocab.json` and `merges.txt`, or else `tokenizer.json`; a damaged file is a `ValueError` naming it."""
        directory = Path(directory)
        path = directory / "vocab.json"
        if path.exists() and (directory / "merges.txt").exists():
            vocab = _read_json(path)
            merges = _read_merges(directory / "merges.txt")
            special = {text: i for text, i in vocab.items() if text == END_OF_TEXT}
        elif (path := directory / "tokenizer.json").exists():
            vocab, merges, special = _read_tokenizer_json(path)
        else:
            wanted = "vocab.json and merges.txt, or tokenizer.json"
            raise FileNotFoundError(f"no tokenizer in {directory}: expected {wanted}")
        try:
            return cls({_unprintable(text): i for text, i in vocab.items() if text not in special}, merges, special)
        except ValueError as error:
            raise ValueError(f"{path} is not a valid byte-level BPE vocabulary: {error}") from None


def _printable(token: bytes) -> str:
    return "".join([BYTE_TO_CHARACTER[byte] for byte in token])


def _unprintable(text: str) -> bytes:
    unknown = [character for character in text if character not in CHARACTER_TO_BYTE]
    if unknown:
        raise ValueError(f"the character {unknown[0]!r} of the token {text!r} stands for no byte")
    return bytes([CHARACTER_TO_BYTE[character] for character in text])


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return document


def _read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return [(_unprintable(left), _unprintable(right)) for left, right in pairs]
    except ValueError as error:
        raise ValueError(f"{path} is not a list of merges: {error}") from None


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[bytes, bytes]], dict[str, int]]:
    """Vocabulary, merges and special tokens of a file of Hugging Face's `tokenizers`."""
    document = _read_json(path)
    try:
        split, model = document["pre_tokenizer"] or {}, document["model"]
        as_gpt2 = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split["add_prefix_space"]
        if model["type"] != "BPE" or not as_gpt2 or document.get("normalizer"):
            raise ValueError("only BPE that splits text into bytes as GPT-2 does is read")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        merges = [(_unprintable(left), _unprintable(right)) for left, right in pairs]
        special = {token["content"]: token["id"] for token in document.get("added_tokens", []) if token["special"]}
        return dict(model["vocab"]), merges, special
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a byte-level BPE tokenizer: {error}") from None
