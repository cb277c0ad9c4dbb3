"""The chunks into which byte-level BPE first splits a text; no token reaches over the end of one.

Each pattern here is read alike by `regex` (training in Python), by the `tokenizers` library (training in Rust) and by
tiktoken (encoding), but for letters and digits that are newer than the Unicode tables of one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import regex

# GPT-2 (Radford et al., 2019): words, numbers and other signs, each with the blank before it.
GPT2_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# GPT-4 (tiktoken's cl100k_base): numbers in threes, contractions in capitals too, a sign before a word goes with it,
# and line breaks stand together. tiktoken writes it with possessive quantifiers, which Oniguruma reads otherwise.
GPT4_SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"""
)
SPLIT_PATTERNS = {"gpt2": GPT2_SPLIT_PATTERN, "gpt4": GPT4_SPLIT_PATTERN}

# tiktoken's regular expressions panic at a million blanks in a row, so longer runs are encoded in parts.
LONGEST_BLANK = 500_000
LONGEST_CHUNK = 1000  # characters, in training; words, numbers and runs of signs are shorter


def split_pattern(name: str) -> str:
    if name not in SPLIT_PATTERNS:
        raise ValueError(f"split must be {' or '.join(SPLIT_PATTERNS)}, got {name!r}")
    return SPLIT_PATTERNS[name]


def count_chunks(texts: Iterable[str], split: str = "gpt2") -> Counter[str]:
    """How often each distinct chunk occurs: all that training needs to remember of a corpus."""
    pattern = regex.compile(split_pattern(split))
    chunks: Counter[str] = Counter()
    for text in texts:
        chunks.update(pattern.findall(text))
    return chunks


def in_short_chunks(texts: Iterable[str], split: str = "gpt2") -> Iterator[str]:
    """The texts in parts, cut so that no chunk is longer than `LONGEST_CHUNK`: what training learns from.

    Training takes time with the square of a chunk's length, and a megabyte of one letter is one chunk.
    """
    pattern, half = regex.compile(split_pattern(split)), LONGEST_CHUNK // 2 - 1
    suspicious = regex.compile(rf"\S{{{half}}}|\s{{{half}}}")  # every longer chunk has one of these in it
    for text in texts:
        start = 0
        for chunk in pattern.finditer(text) if suspicious.search(text) else ():
            if chunk.end() - chunk.start() > LONGEST_CHUNK:
                yield text[start : chunk.start()]
                yield from (chunk[0][i : i + LONGEST_CHUNK] for i in range(0, len(chunk[0]), LONGEST_CHUNK))
                start = chunk.end()
        yield text[start:]


def without_long_blanks(text: str) -> list[str]:
    """The text in parts, cut where a run of `LONGEST_BLANK` blanks begins and ends."""
    if len(text) < LONGEST_BLANK:
        return [text]
    cuts = [0]
    for run in regex.finditer(r"\s+", text):
        if (whole := len(run[0]) // LONGEST_BLANK) > 0:
            cuts += [run.start() + i * LONGEST_BLANK for i in range(whole + 1)]
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if start < end]
