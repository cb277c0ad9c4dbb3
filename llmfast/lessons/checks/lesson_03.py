"""Lesson 3, Embeddings and positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(nearest: Callable) -> str | None:
    table = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.9, 0.1], [-5.0, 0.0]])
    mistakes = {
        "it finds row i itself: leave that out": 0,
        "it finds the longest vector: divide by the lengths, or products measure those": 1,
        "it finds the row that is least alike": 3,
    }
    before = table.clone()
    wrong = difference(nearest(table, 0), 2, mistakes=mistakes, where="row 0 of [[1, 0], [9, 9], [.9, .1], [-5, 0]]")
    return "it changes the table that it was given" if not torch.equal(table, before) else wrong


def exercise_2(sinusoids: Callable) -> str | None:
    T, C = 5, 8

    def table(powers: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(T)[:, None] * 10000.0**powers
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    right = table(-torch.arange(0, C, 2) / C)
    mistakes = {
        "cosines come first: sines, then cosines": torch.cat([right[:, C // 2 :], right[:, : C // 2]], dim=-1),
        "positions are counted from 1: the first is 0, where all sines are 0": torch.cat(
            [
                f((torch.arange(T) + 1)[:, None] * 10000.0 ** (-torch.arange(0, C, 2) / C))
                for f in (torch.sin, torch.cos)
            ],
            dim=-1,
        ),
        "the exponent is 2i / C for i = 0 … C/2 - 1: here it is half of that": table(-torch.arange(0, C // 2) / C),
        "the frequencies grow: the exponent is negative": table(torch.arange(0, C, 2) / C),
    }
    return difference(sinusoids(T, C), right, 1e-3, mistakes, "T 5, C 8")


def exercise_3(score: Callable) -> str | None:
    q, k, omega = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0]), 0.3

    def product(angle: float) -> torch.Tensor:
        c, s = math.cos(angle), math.sin(angle)
        return q[0] * (k[0] * c - k[1] * s) + q[1] * (k[1] * c + k[0] * s)

    for m, n in ((7, 2), (2, 7)):
        mistakes = {
            "nothing is turned": q @ k,
            "the turn goes the other way: a' = a cos - b sin, b' = b cos + a sin, for both": product((m - n) * omega),
            "only the key is turned": product(n * omega),
            "only the query is turned": product(-m * omega),
            "both turns add up: the angle of the product is that of n - m": product((m + n) * omega),
        }
        wrong = difference(score(q, k, m, n, omega), product((n - m) * omega), 1e-4, mistakes, f"m {m}, n {n}")
        if wrong is not None:
            return wrong
    return None
