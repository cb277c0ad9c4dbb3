"""Lesson 13, Retrieval."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(top: Callable) -> str | None:
    table = torch.tensor([[9.0, 9.0], [1.0, 0.1], [0.2, 0.0], [-3.0, 0.0], [2.0, 1.0]])
    mistakes = {
        "long rows come first: divide by the lengths": [0, 4],
        "these are the nearest by distance: the cosine asks for the direction alone": [4, 1],
        "these are the least alike": [3, 0],
        "the best comes first": [1, 2],
    }
    return difference(
        top(table, torch.tensor([2.0, 0.0]), 2), [2, 1], 0, mistakes, "rows [9, 9], [1, .1], [.2, 0], [-3, 0], [2, 1]"
    )


def exercise_2(fuse: Callable) -> str | None:
    rankings = [[1, 2, 3, 4], [4, 2, 5], [3, 2]]
    right = [2, 3, 4, 1, 5]
    found = fuse(rankings)
    if isinstance(found, list) and len(found) == len(set(found)) < 5:
        return (
            "a piece that one search alone finds belongs to the result: "
            + f"{sorted(set(right) - set(found))} are missing"
        )
    if isinstance(found, list) and len(found) != len(set(found)):
        return "a piece that several searches find comes once"
    mistakes = {
        "the best comes first": right[::-1],
        "this is the first list, then what the others add: ranks are summed": [1, 2, 3, 4, 5],
    }
    wrong = difference(found, right, 0, mistakes, "[1, 2, 3, 4], [4, 2, 5] and [3, 2]")
    if wrong is not None:
        return wrong
    rankings = [[4, 1, 2, 5], [4, 5, 3, 1], [5, 3, 1]]
    mistakes = {
        "k is not used: this is what k = 60 gives": [5, 1, 4, 3, 2],
        "ranks are counted from 1": [4, 5, 1, 3, 2],
    }
    return difference(fuse(rankings, 1), [5, 4, 1, 3, 2], 0, mistakes, "[4, 1, 2, 5], [4, 5, 3, 1], [5, 3, 1], k 1")


def exercise_3(reciprocal_rank: Callable) -> str | None:
    for found, right, expected in (([7, 5, 9, 4], 9, 1 / 3), ([7, 5], 7, 1.0), ([7, 5], 8, 0.0)):
        mistakes: dict[str, object] = {}
        if expected not in (0.0, 1.0):
            mistakes = {
                "places are counted from 1": 1 / 2,
                "this is the place: 1 divided by it is asked for": 3,
                "found anywhere is not enough: 1 / place": 1.0,
            }
        wrong = difference(reciprocal_rank(found, right), expected, 1e-6, mistakes, f"{right} in {found}")
        if wrong is not None:
            return wrong
    return None
