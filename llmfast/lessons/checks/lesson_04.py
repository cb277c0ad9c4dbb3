"""Lesson 4, Attention without weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmfast.lessons.checking import difference


def words(count: int = 4) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(4))


def exercise_1(softmax_rows: Callable) -> str | None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
    mistakes = {
        "this goes down the columns: each row must sum to 1, so sum over the last dimension": scores.softmax(dim=0),
        "all weights together sum to 1; it should be so in every row: keepdim=True keeps a sum for each": (
            scores.exp() / scores.exp().sum()
        ),
        "these are powers that are not divided by their row's sum": scores.exp(),
    }
    wrong = difference(softmax_rows(scores), scores.softmax(-1), mistakes=mistakes)
    if wrong is None:
        large = softmax_rows(scores + torch.tensor([[1000.0], [0.0], [-1000.0]]))
        if not torch.isfinite(large).all():
            return "scores around 1000 give inf or nan: subtract the row's largest before exp"
        wrong = difference(large, scores.softmax(-1), where="1000 more in row 0, 1000 less in row 2")
        if wrong is not None and bool((large == 0).all(dim=-1).any()):
            return "rows far below the largest score become 0: subtract each row's own largest, not that of all"
    return wrong


def exercise_2(sharper: Callable) -> str | None:
    x = words()
    for factor in (3.0, 0.0):
        weights = torch.softmax(factor * (x @ x.T), dim=-1)
        mistakes = {
            "these are the weights (T, T): mix the words with them": weights,
            "the factor changes nothing here: it belongs to the scores, before softmax": torch.softmax(x @ x.T, -1) @ x,
            "the factor multiplies the result: it belongs to the scores, before softmax": factor
            * (torch.softmax(x @ x.T, -1) @ x),
            "the words that are mixed are multiplied too: only the scores should be": weights @ (factor * x),
            "the factor counts twice: both sides of the product are multiplied": torch.softmax(factor**2 * x @ x.T, -1)
            @ x,
        }
        wrong = difference(sharper(x, factor), weights @ x, mistakes=mistakes, where=f"factor {factor:g}")
        if wrong is not None:
            return wrong
    return None


def exercise_3(looking_away: Callable) -> str | None:
    x = words()
    scores, diagonal = x @ x.T, torch.eye(4, dtype=torch.bool)
    plain = scores.softmax(-1)
    mistakes = {
        "every word still looks at itself": plain,
        "the diagonal is 0, but its weight is lost: the rows no longer sum to 1": plain.masked_fill(diagonal, 0.0),
        "a score of 0 is not a weight of 0, since e⁰ = 1: the score must be −∞": scores.masked_fill(
            diagonal, 0.0
        ).softmax(-1),
    }
    return difference(
        looking_away(x), scores.masked_fill(diagonal, -torch.inf).softmax(-1), mistakes=mistakes, where="4 words"
    )
