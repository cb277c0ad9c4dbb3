"""Tokenizers: encoding, decoding, and learning a vocabulary, beside Hugging Face's `tokenizers` and `tiktoken`.

The text is English that every Python carries, the manual's topics (`pydoc_data`), so that anybody measures the same.
A tokenizer with our vocabulary must give our ids, and each must find the ids of a text again in what it decodes to.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tiktoken

from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work, WrongResult
from llmfast.benchmarking.facts import version_of
from llmfast.benchmarking.startup_cases import ANY
from llmfast.benchmarking.timing import timed
from llmfast.tokenizers import TRAINABLE, BPETokenizer, Tokenizer, WordPieceTokenizer, train_tokenizer
from llmfast.tokenizers.splitting import GPT2_SPLIT_PATTERN

OURS, PYTHON, HUGGING_FACE, TIKTOKEN = "llmfast", "llmfast in Python", "tokenizers", "tiktoken"
PEERS = {"bpe": (HUGGING_FACE, TIKTOKEN), "wordpiece": (HUGGING_FACE,)}
SIZED = {"bpe": 2000, "wordpiece": 2000}  # tokens of a vocabulary that encodes; the other kinds keep all they met
REMEMBERS = {"wordpiece": "the pieces of words met before are remembered"}

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


@functools.cache
def text_of(characters: int) -> str:
    """The beginning of the manual, as often as it takes."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    return (whole * (1 + characters // len(whole)))[:characters]


def comparisons(characters: Sequence[int], vocabularies: Sequence[int], learn_from: int) -> Iterator[Comparison]:
    """Coding texts of each length to and fro, and learning vocabularies of each size from `learn_from` characters."""
    for length in characters:
        for kind in TRAINABLE:
            entries = (OURS, *(peer for peer in PEERS.get(kind, ()) if version_of(peer) is not None))
            for what in ("encode", "decode"):
                start = functools.partial(_start_coding, kind, what, length)
                yield _comparison(f"{kind} {what}", entries, start, length)
    for size in vocabularies:
        entries = (OURS, PYTHON, *([HUGGING_FACE] if version_of(HUGGING_FACE) is not None else []))
        start = functools.partial(_start_learning, learn_from, size)
        yield _comparison("bpe learn", entries, start, learn_from, vocabulary=size)


def _comparison(
    name: str, backends: tuple[str, ...], start: Callable[[], Any], characters: int, **sizes: int
) -> Comparison:
    size = len(text_of(characters).encode())
    return Comparison(
        group="tokenizer",
        name=name,
        device="cpu",
        entries=tuple(Entry(backend, ANY) for backend in backends),
        start=start,
        work=lambda entry: Work(text=size),
        sizes={"bytes": size} | sizes,
        baselines=(HUGGING_FACE, TIKTOKEN),
    )


def _start_coding(kind: str, what: str, characters: int) -> Callable[[Entry], Contestant]:
    text, ours = text_of(characters), _tokenizer(kind, characters)
    ids = ours.encode(text)

    def ready(entry: Entry) -> Contestant:
        encode, decode = _coders(entry.backend, ours)
        if encode(text) != ids or encode(decode(ids)) != ids:
            raise WrongResult(
                "wrong, so not timed: other ids than the same vocabulary gives elsewhere, or another text"
            )
        turn = timed(encode, lambda: text) if what == "encode" else timed(decode, lambda: ids)
        return Contestant(turn, 0.0, REMEMBERS.get(kind) if what == "encode" else None)

    return ready


@functools.lru_cache(maxsize=1)
def _tokenizer(kind: str, characters: int) -> Tokenizer:
    """One that knows the text, for encoding and then for decoding it."""
    return train_tokenizer(kind, [text_of(characters)], SIZED.get(kind))


def _coders(library: str, ours: Tokenizer) -> tuple[Encode, Decode]:
    """How a library encodes and decodes with our tokenizer's vocabulary."""
    if library == OURS:
        return ours.encode, ours.decode
    if library == TIKTOKEN:
        assert isinstance(ours, BPETokenizer)
        theirs = tiktoken.Encoding(
            "theirs", pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=dict(ours.vocab), special_tokens={}
        )
        return theirs.encode_ordinary, theirs.decode
    import tokenizers

    if isinstance(ours, BPETokenizer):
        with tempfile.TemporaryDirectory() as folder:
            ours.save(folder)
            vocab, merges = (str(Path(folder) / name) for name in ("vocab.json", "merges.txt"))
            fast: Any = tokenizers.ByteLevelBPETokenizer.from_file(vocab, merges)
    else:
        assert isinstance(ours, WordPieceTokenizer)
        pieces = {token: i for i, token in enumerate(ours.tokens)}
        fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=pieces, unk_token=ours.UNKNOWN))
        fast.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
        fast.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        fast.decoder = tokenizers.decoders.WordPiece()
    return (lambda text: fast.encode(text).ids), fast.decode


def _start_learning(characters: int, size: int) -> Callable[[Entry], Contestant]:
    text = text_of(characters)
    sample = text[:5000]

    def ready(entry: Entry) -> Contestant:
        learn = functools.partial(_learn, entry.backend, size)
        vocabulary, encode, decode = learn(text)
        if vocabulary != size or decode(encode(sample)) != sample:
            raise WrongResult(f"wrong, so not timed: {vocabulary} tokens, not {size}, or the text does not come back")
        return Contestant(timed(learn, lambda: text), 0.0)

    return ready


def _learn(library: str, size: int, text: str) -> tuple[int, Encode, Decode]:
    """How many tokens a library has learned from a text, and its way to and fro."""
    if library in (OURS, PYTHON):
        ours = BPETokenizer.train([text], size, trainer="python" if library == PYTHON else "auto")
        return ours.vocab_size, ours.encode, ours.decode
    import tokenizers

    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([text], size, min_frequency=1, show_progress=False)
    return theirs.get_vocab_size(), lambda text: theirs.encode(text).ids, theirs.decode
