"""Blocks to pieces: what is found, and shown to a model, as one; of about as many tokens as its vector looks at.

Paragraphs under the same headings go together while they fit. A paragraph that is too long is divided between its
sentences, a sentence between its words, and the end of a piece is repeated at the beginning of the next.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from llmfast.retrieval.blocks import Block

TOKENS = 250  # of a piece with its headings: a vector of minilm looks at 256, two of them its own
FEW = 3  # words: fewer are too few to say something by themselves
OVERLAP = 32  # tokens of the end of a piece that begin the next one again
SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+|\n+")


@dataclass(frozen=True)
class Piece:
    """`text` as it stands in the document, under its headings, from `place` on."""

    text: str
    headings: tuple[str, ...]
    place: str

    @property
    def heading(self) -> str:
        return " › ".join(self.headings)

    @property
    def content(self) -> str:
        """What is embedded and searched: the text under its headings."""
        return f"{self.heading}\n{self.text}" if self.headings else self.text

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()


def pieces_of(
    blocks: Iterable[Block], count: Callable[[str], int], tokens: int = TOKENS, overlap: int = OVERLAP
) -> Iterator[Piece]:
    """The pieces of a document, of `tokens` at most, its headings among them where they take less than half; `count`
    says how many tokens a text takes."""
    if not 0 <= overlap < tokens:
        raise ValueError(f"overlap must be less than the {tokens} tokens of a piece, got {overlap}")
    whole = tokens
    held: list[tuple[str, str, int]] = []  # of the piece that is being filled: (what divides, text, tokens)
    repeated = 0  # how many of them were in the last piece, too
    headings: tuple[str, ...] = ()
    place = ""

    def finished() -> Piece:
        return Piece("".join(before + text for before, text, _ in held).strip(), headings, place)

    for block in blocks:
        if held and block.headings != headings:
            if repeated < len(held):
                yield finished()
            held, repeated = [], 0
        above = count(" › ".join(block.headings)) if block.headings else 0
        tokens = max(whole // 2, whole - above)
        before = "\n\n" if held else ""
        for unit, size in _units(block.text, count, tokens):
            while len(held) > repeated and sum(n for *_, n in held) + size > tokens:
                yield finished()
                held = _end_of(held, min(overlap, tokens - size))
                repeated = len(held)
                place = block.place
            while held and repeated and sum(n for *_, n in held) + size > tokens:
                held, repeated = held[1:], repeated - 1  # what is new comes before what is repeated
            if not held:
                headings, place = block.headings, block.place
            held.append((before if held else "", unit, size))
            before = " "
    if len(held) > repeated:
        yield finished()


def sentences(text: str) -> list[tuple[int, str]]:
    """The sentences of a text, each with the character where it begins; where lines are left blank, one ends."""
    found, start = [], 0
    for match in re.finditer(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9À-Þ])|\n\s*\n|$", text):
        if text[start : match.end()].strip():
            found.append((start, text[start : match.end()].strip()))
        start = match.end()
    return found


def statements(text: str) -> list[str]:
    """The sentences of a text, those of fewer than `FEW` words (a title, a label) together with what follows them."""
    found: list[str] = []
    begun = ""
    for _, sentence in sentences(text):
        begun = f"{begun} {sentence}".lstrip()
        if len(begun.split()) >= FEW:
            found.append(begun)
            begun = ""
    if begun:
        found[-1:] = [" ".join([*found[-1:], begun])]
    return found


def _end_of(units: list[tuple[str, str, int]], most: int) -> list[tuple[str, str, int]]:
    """The last units that have no more than `most` tokens together."""
    kept: list[tuple[str, str, int]] = []
    for unit in reversed(units):
        most -= unit[2]
        if most < 0:
            break
        kept.insert(0, unit)
    return kept


def _units(text: str, count: Callable[[str], int], most: int) -> Iterator[tuple[str, int]]:
    """A paragraph where it fits, else its sentences, and of those that are too long the words, with their tokens."""
    if (size := count(text)) <= most:
        yield text, size
        return
    sentences = [sentence.strip() for sentence in SENTENCE_END.split(text)]
    for sentence in filter(None, sentences):
        if (size := count(sentence)) <= most:
            yield sentence, size
            continue
        yield from _words(sentence, count, most)


def _words(sentence: str, count: Callable[[str], int], most: int) -> Iterator[tuple[str, int]]:
    """Runs of words, and of a word that is too long runs of its characters, of about half a piece each."""
    line: list[str] = []
    size = 0
    for word in sentence.split():
        parts = [(word, count(word))]
        if parts[0][1] > most:
            step = max(1, most // 4)  # a character takes no more than four tokens
            parts = [(word[at : at + step], count(word[at : at + step])) for at in range(0, len(word), step)]
        for part, tokens in parts:
            if line and size + tokens > most // 2:
                yield " ".join(line), size
                line, size = [], 0
            line.append(part)
            size += tokens
    if line:
        yield " ".join(line), size
