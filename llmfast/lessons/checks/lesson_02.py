"""Lesson 2, Tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from llmfast.lessons.checking import difference


def exercise_1(pairs: Callable) -> str | None:
    words = {("a", "b", "a", "b"): 3, ("b", "a"): 2, ("a",): 9}
    found = pairs(words)
    if found is None:
        return difference(None, 0)
    counts = {pair: n for pair, n in dict(found).items() if n}
    mistakes = {
        "each word counts once: multiply by how often it occurs": {("a", "b"): 2, ("b", "a"): 2},
        "a pair is counted once in a word: it may stand there twice": {("a", "b"): 3, ("b", "a"): 5},
        "(a, b) and (b, a) are different pairs: neighbours have an order": {("a", "b"): 11},
    }
    for mistake, wrong in mistakes.items():
        if counts == wrong:
            return mistake
    return difference(Counter(counts), Counter({("a", "b"): 6, ("b", "a"): 5}))


def exercise_2(longest: Callable) -> str | None:
    vocabulary = {"un", "u", "##known", "##kn", "##own", "##k", "##n", "known", "##s"}
    for word, expected in (("unknown", ["un", "##known"]), ("unowns", ["un", "##own", "##s"]), ("unx", ["[UNK]"])):
        found = longest(word, vocabulary)
        if found == ["un", "known"] or found == ["un"]:
            return f"{word!r}: pieces after the first are looked up with ## before them"
        if found and found[:1] == ["u"]:
            return f"{word!r}: the longest piece that fits comes first, not the shortest: {found}"
        if word == "unx" and found and found != expected:
            return f"{word!r}: where a part has no piece, the whole word is one [UNK], not {found}"
        wrong = difference(found, expected, where=repr(word))
        if wrong is not None:
            return wrong
    return None


def exercise_3(bits_a_byte: Callable) -> str | None:
    text, nats, tokens = "naïve", 2.0, 3
    right = nats * tokens / math.log(2) / 6
    mistakes = {
        "ï has two bytes in UTF-8: divide by len(text.encode()), not by characters": right * 6 / 5,
        "these are nats: divide by ln 2 to get bits": right * math.log(2),
        "nats are for each token: multiply by the number of tokens": right / tokens,
        "multiply the nats by the tokens, and divide by ln 2, not multiply": right * math.log(2) ** 2,
    }
    return difference(bits_a_byte(nats, tokens, text), right, mistakes=mistakes, where="2 nats, 3 tokens, 'naïve'")
