"""Lesson 10, How good is it?"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmfast.lessons.checking import difference


def exercise_1(bits: Callable) -> str | None:
    right = 20 / math.log(2) / 40
    mistakes = {
        "these are nats a byte: divide by ln 2": 20 / 40,
        "these are all bits: divide by the bytes": 20 / math.log(2),
        "a nat is more than a bit: divide by ln 2, not multiply": 20 * math.log(2) / 40,
    }
    return difference(bits(20, 40), right, 1e-6, mistakes, "20 nats, 40 bytes")


def exercise_2(standard_error: Callable) -> str | None:
    wins = [True] * 6 + [False] * 2
    p = 0.75
    mistakes = {
        "this is the share itself": p,
        "this is the variance of one pair: divide by n, and take the root": p * (1 - p),
        "this is the deviation of one pair: the share of n has 1 / √n of it": math.sqrt(p * (1 - p)),
        "the root is missing": p * (1 - p) / 8,
        "this divides by n - 1; the formula above has n": math.sqrt(p * (1 - p) / 7),
    }
    return difference(standard_error(wins), math.sqrt(p * (1 - p) / 8), 1e-6, mistakes, "6 of 8")


def exercise_3(needed: Callable) -> str | None:
    mistakes = {
        "the power is 1 / β": (8 / 0.5) ** 0.5,
        "E is missing: what is left to fall is target - E": (8 / 2) ** 2,
        "the other way round: B / (target - E)": (0.5 / 8) ** 2,
    }
    wrong = difference(needed(1.5, 8, 0.5, 2.0), 256.0, 1e-6, mistakes, "E 1.5, B 8, β 0.5, target 2")
    if wrong is not None:
        return wrong
    for target in (1.5, 1.0):
        found = needed(1.5, 8, 0.5, target)
        if found != math.inf:
            return (
                f"a target of {target} lies at or below E = 1.5, which no amount of text passes: infinity, not {found}"
            )
    return None
