"""How much of a reference an answer has: the same text, or the same words in the same order (ROUGE-L: Lin, 2004).

Without a library and without stemming, so that every run can tell; `summaries.rouge` has the figures to be published.
"""

from __future__ import annotations

import regex

WORDS = regex.compile(r"[\p{L}\p{N}]+")


def exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same words: letters and digits alone count, in either case."""
    return words(answer) == words(reference)


def rouge_l(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the longest common subsequence of words, from 0 to 1.

    Words are lower-cased runs of letters and digits, without stemming; two texts without any are equal.
    """
    given, wanted = words(answer), words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = longest_common_subsequence(given, wanted)
    return 2 * common / (len(given) + len(wanted))


def words(text: str) -> list[str]:
    return WORDS.findall(text.lower())


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Its length, a row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0  # of the row above, one column to the left
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = before + 1 if word == other else max(above, row[column - 1])
            before = above
    return row[-1]
