"""Lesson 1, Counting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from llmfast.lessons.checking import difference


def exercise_1(laplace: Callable) -> str | None:
    counts = Counter("aaab")
    for c, expected in (("a", 4 / 7), ("b", 2 / 7), ("c", 1 / 7)):
        mistakes = {
            "this is the count's share without smoothing: 1 is added to every count": counts[c] / 4,
            "1 is added to the count, but the sum has to grow by `size`, or all shares sum to more than 1": (
                (counts[c] + 1) / 4
            ),
            "the sum grows by one for every character of the alphabet (`size`), not only for those that were seen": (
                (counts[c] + 1) / (4 + len(counts))
            ),
        }
        wrong = difference(
            laplace(counts, c, 3), expected, mistakes=mistakes, where=f"{c!r} after 'aaab', 3 characters"
        )
        if wrong is not None:
            return wrong
    return None


def exercise_2(perplexity: Callable) -> str | None:
    given = [0.5, 0.25, 0.125]
    nats = -sum(map(math.log, given))
    mistakes = {
        "this is e to the sum: take the mean over the characters": math.exp(nats),
        "this is the mean in nats; perplexity is e to its power": nats / 3,
        "the sign is wrong: the logarithm of a probability is negative": math.exp(-nats / 3),
        "this is 2 to the mean in nats: the base must be that of the logarithm": 2 ** (nats / 3),
        "this is 1 over the mean probability: the mean is of the logarithms": 3 / sum(given),
    }
    return difference(perplexity(given), 4.0, mistakes=mistakes, where=str(given))


def exercise_3(sparsity: Callable) -> str | None:
    table = {"a": Counter("bbc"), "b": Counter("a")}
    mistakes = {
        "this is the share that was counted: the question is for the rest": 3 / 8,
        "a character seen twice fills one place, not two: use len(counts), not its total": 1 - 4 / 8,
        "this is a number of pairs, not a share": 5,
        "the places are len(table) · size": 1 - 3 / 16,
    }
    return difference(sparsity(table, 4), 5 / 8, mistakes=mistakes, where="3 pairs of 2 contexts and 4 characters")
