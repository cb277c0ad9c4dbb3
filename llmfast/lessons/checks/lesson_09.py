"""Lesson 9, Sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(keep_k: Callable) -> str | None:
    logits, k = torch.tensor([-3.0, 1.0, -1.0, 2.0, -2.0]), 3
    keep = torch.tensor([False, True, True, True, False])
    infinite = -torch.inf
    mistakes = {
        "the others are 0: that is a logit like any other, and larger than many; −∞ is none": logits * keep,
        "the k smallest are kept": logits.masked_fill(torch.tensor([False, True, False, True, False]), infinite),
        "one too few: the k-th largest stays": logits.masked_fill(logits <= -1.0, infinite),
        "these are only the k logits: keep the shape (V,)": logits.topk(k).values,
        "nothing is taken out": logits,
    }
    return difference(
        keep_k(logits.clone(), k), logits.masked_fill(~keep, infinite), 0, mistakes, "[-3, 1, -1, 2, -2], k 3"
    )


def exercise_2(nucleus: Callable) -> str | None:
    probabilities = torch.tensor([0.125, 0.5, 0.25, 0.0625, 0.0625])
    for p, right in ((0.7, [1, 2]), (0.75, [1, 2]), (0.8, [1, 2, 0])):
        found = nucleus(probabilities.clone(), p)
        listed = found.tolist() if isinstance(found, torch.Tensor) else found
        if isinstance(listed, list):
            if listed == right[:-1]:
                return f"p {p}: one too few: the token that reaches p belongs to it"
            if listed == sorted(right) != right:
                return f"p {p}: these are the right tokens, but not the likeliest first"
            if len(listed) == len(right) + 1:
                return f"p {p}: one too many: once p is reached no more are needed"
            if listed and all(0 < x < 1 for x in listed):
                return f"p {p}: these are probabilities: the numbers of the tokens are asked for"
        wrong = difference(listed, right, 0, where=f"[.125, .5, .25, .0625, .0625], p {p}")
        if wrong is not None:
            return wrong
    return None


def exercise_3(pick: Callable) -> str | None:
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25])
    for finger, right in ((0.1, 0), (0.3, 2), (0.25, 2), (0.9, 3), (0.0, 0)):
        mistakes: dict[str, object] = {
            "it always takes the likeliest: that is greedy": 2 if right != 2 else None,
            "one too far: the token whose share the finger is in": right + 1,
            "a token of probability 0 is taken: at the border the next one begins": 1,
            "at a border the next token begins": 0 if finger == 0.25 else None,
            "one too early": right - 1,
        }
        possible = {mistake: value for mistake, value in mistakes.items() if value is not None}
        found = pick(probabilities.clone(), finger)
        wrong = difference(found, right, 0, possible, f"[.25, 0, .5, .25], finger {finger}")
        if wrong is not None:
            return wrong
    return None
