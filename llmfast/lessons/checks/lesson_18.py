"""Lesson 18, One token."""

from __future__ import annotations

from collections.abc import Callable

from llmfast.lessons.checking import difference


def exercise_1(tokens_a_second: Callable) -> str | None:
    weights, cache, batch, bandwidth = 1e9, 1e8, 4, 50
    right = batch * bandwidth * 1e9 / (weights + batch * cache)
    mistakes = {
        "this is one text: a step gives a token to each of the batch": right / batch,
        "each text has a cache of its own: batch times its bytes": batch * bandwidth * 1e9 / (weights + cache),
        "the weights are read once for all texts, not once for each": bandwidth * 1e9 / (weights + cache),
        "the caches are not counted": batch * bandwidth * 1e9 / weights,
        "bandwidth is in GB/s: 10⁹ bytes a second": right / 1e9,
        "these are seconds a step: batch divided by them is asked for": (weights + batch * cache) / bandwidth / 1e9,
    }
    return difference(
        tokens_a_second(weights, cache, batch, bandwidth), right, 1e-6, mistakes, "1 GB, 0.1 GB each, batch 4, 50 GB/s"
    )


def exercise_2(speedup: Callable) -> str | None:
    a, k, cost = 0.5, 3, 1.25
    given = 1 + a + a**2 + a**3
    mistakes = {
        "the model's own token is missing: even if all guesses are wrong, a step gives one": (given - 1) / cost,
        "a guess counts only if all before it are right: a + a² + …, not k · a": (1 + k * a) / cost,
        "the cost of reading more is missing": given,
        "the cost makes it slower: divide by it": given * cost,
        "one guess too many: powers of a up to k": (given + a**4) / cost,
        "one guess too few: powers of a up to k": (given - a**3) / cost,
    }
    return difference(speedup(a, k, cost), given / cost, 1e-6, mistakes, "a 0.5, k 3, cost 1.25")


def exercise_3(largest_batch: Callable) -> str | None:
    for memory, weights, cache, right in ((1000, 300, 200, 3), (1000, 300, 100, 7), (100, 300, 50, 0)):
        mistakes: dict[str, object] = {}
        if right == 3:
            mistakes = {
                "the weights take memory too": 5,
                "half a text does not fit: round down": 3.5,
                "this is rounded up: the last does not fit": 4,
                "the weights are there once, not for each text": 2,
            }
        found = largest_batch(memory, weights, cache)
        if right == 0 and found is not None and found < 0:
            return "there can't be less than no text: where the weights alone don't fit, it is 0"
        where = f"memory {memory}, weights {weights}, cache {cache}"
        wrong = difference(found, right, 1e-9, mistakes, where)
        if wrong is not None:
            return wrong
    return None
