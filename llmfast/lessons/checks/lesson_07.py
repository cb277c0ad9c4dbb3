"""Lesson 7, GPT-2."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(parameters: Callable) -> str | None:
    V, P, C, L = 100, 16, 8, 3
    matrices, biases, norms = 12 * C * C, 9 * C, 4 * C
    right = V * C + P * C + L * (matrices + biases + norms) + 2 * C
    mistakes = {
        "the last norm is missing: 2 C": right - 2 * C,
        "the biases are missing: 3 C + C + 4 C + C in each block": right - L * biases,
        "a norm has a weight and a bias: 4 C for the two of a block": right - L * norms // 2,
        "the norms of the blocks are missing: two in each, of 2 C": right - L * norms,
        "the head is the token table: it is not counted twice": right + V * C,
        "the positions are missing: P · C": right - P * C,
        "this is one block: there are L": V * C + P * C + matrices + biases + norms + 2 * C,
    }
    return difference(parameters(V, P, C, L), right, 0, mistakes, "V 100, P 16, C 8, L 3")


def exercise_2(cache_bytes: Callable) -> str | None:
    right = 2 * 30 * 3 * 64 * 100 * 4
    mistakes = {
        "keys and values: twice as much": right / 2,
        "these are numbers: each has e bytes": right / 4,
        "this is one layer": right / 30,
        "the scores are not kept: it grows with the tokens, not with their square": right * 100,
    }
    return difference(cache_bytes(30, 3, 64, 100, 4), right, 0, mistakes, "L 30, key_heads 3, D 64, tokens 100, e 4")


def exercise_3(head_logits: Callable) -> str | None:
    generator = torch.Generator().manual_seed(7)
    x, table, last = (
        torch.randn(3, 5, 4, generator=generator),
        torch.randn(6, 4, generator=generator),
        torch.tensor([5, 2, 1]),
    )
    rows = torch.arange(3)
    right = x[rows, last - 1] @ table.T
    mistakes = {
        "this is position 'last': of n tokens the last is number n - 1": x[rows, last.clamp(max=4)] @ table.T,
        "these are the logits of the padded end: sequences end at `last`": x[:, -1] @ table.T,
        "these are logits at every position (B, T, V): only the last of each is asked for": x @ table.T,
        "this is the hidden state: multiply with the table": x[rows, last - 1],
        "each sequence has its own last token: index with torch.arange(B) and last - 1": x[:, last - 1] @ table.T,
    }
    return difference(head_logits(x, table, last), right, 1e-4, mistakes, "B 3, T 5, last [5, 2, 1]")
