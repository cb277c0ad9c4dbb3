"""Tokenizers: encoding, decoding, and learning a vocabulary, beside Hugging Face's `tokenizers` and `tiktoken`.

The text is English that every Python carries, the manual's topics (`pydoc_data`), so that anybody measures the same.
Whoever shares a vocabulary with us must give the same ids, and everybody the text back.
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
from llmfast.tokenizers import BPETokenizer
from llmfast.tokenizers.splitting import GPT2_SPLIT_PATTERN

OURS, HUGGING_FACE, TIKTOKEN = "llmfast", "tokenizers", "tiktoken"
VOCABULARY = 2000  # of the tokenizer that encodes


def text_of(characters: int) -> str:
    """The beginning of the manual, as often as it takes."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    return (whole * (1 + characters // len(whole)))[:characters]


def comparisons(characters: Sequence[int], vocabularies: Sequence[int], learn_from: int) -> Iterator[Comparison]:
    """Coding texts of each length to and fro, and learning vocabularies of each size from `learn_from` characters."""
    others = [name for name in (HUGGING_FACE, TIKTOKEN) if version_of(name) is not None]
    for length in characters:
        for name in ("encode", "decode"):
            yield _comparison(f"BPE {name}", (OURS, *others), functools.partial(_start_coding, name, length), length)
    for size in vocabularies:
        learners = tuple(name for name in (OURS, *others) if name != TIKTOKEN)
        start = functools.partial(_start_learning, learn_from, size)
        yield _comparison("BPE learn", learners, start, learn_from, vocabulary=size)


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


def _start_coding(what: str, characters: int) -> Callable[[Entry], Contestant]:
    text = text_of(characters)
    ours = BPETokenizer.train([text_of(200_000)], VOCABULARY)
    ids = ours.encode(text)

    def ready(entry: Entry) -> Contestant:
        encode, decode = _coders(entry.backend, ours)
        if encode(text) != ids or decode(ids) != text:
            raise WrongResult(
                "wrong, so not timed: other ids than the same vocabulary gives elsewhere, or another text"
            )
        turn = timed(encode, lambda: text) if what == "encode" else timed(decode, lambda: ids)
        return Contestant(turn, 0.0)

    return ready


def _coders(library: str, ours: BPETokenizer) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """How a library encodes and decodes with our tokenizer's vocabulary."""
    if library == OURS:
        return ours.encode, ours.decode
    if library == TIKTOKEN:
        ranks = {token: rank for token, rank in ours.vocab.items()}
        theirs = tiktoken.Encoding("theirs", pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        return theirs.encode_ordinary, theirs.decode
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        vocab, merges = (str(Path(folder) / name) for name in ("vocab.json", "merges.txt"))
        fast = tokenizers.ByteLevelBPETokenizer.from_file(vocab, merges)
    return (lambda text: fast.encode(text).ids), fast.decode


def _start_learning(characters: int, size: int) -> Callable[[Entry], Contestant]:
    text = text_of(characters)

    def ready(entry: Entry) -> Contestant:
        learn = _learner(entry.backend, size)
        found, sample = learn(text), text[:5000]
        vocabulary, encode, decode = found
        if vocabulary != size or decode(encode(sample)) != sample:
            raise WrongResult(f"wrong, so not timed: {vocabulary} tokens, not {size}, or the text does not come back")
        return Contestant(timed(learn, lambda: text), 0.0)

    return ready


def _learner(library: str, size: int) -> Callable[[str], tuple[int, Callable[[str], Any], Callable[[Any], str]]]:
    """A function that learns from a text: how many tokens it learned, and its way to and fro."""
    if library == OURS:

        def ours(text: str) -> tuple[int, Callable[[str], Any], Callable[[Any], str]]:
            tokenizer = BPETokenizer.train([text], size)
            return tokenizer.vocab_size, tokenizer.encode, tokenizer.decode

        return ours
    import tokenizers

    def theirs(text: str) -> tuple[int, Callable[[str], Any], Callable[[Any], str]]:
        tokenizer = tokenizers.ByteLevelBPETokenizer()
        tokenizer.train_from_iterator([text], size, min_frequency=1, show_progress=False)
        return tokenizer.get_vocab_size(), lambda text: tokenizer.encode(text).ids, tokenizer.decode

    return theirs
