"""Lesson 5, Attention with weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(causal_mask: Callable) -> str | None:
    for T, S in ((4, 4), (2, 5)):
        found, expected = causal_mask(T, S), torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)
        mistakes = {
            "True and False are exchanged: True is where a query must not look": ~expected,
            "a query may look at itself: the diagonal is not masked": torch.ones(T, S, dtype=torch.bool).triu(S - T),
            "the queries are the last T tokens, not the first: query t is token S - T + t": torch.ones(
                T, S, dtype=torch.bool
            ).triu(1),
        }
        wrong = difference(found, expected, mistakes=mistakes, where=f"T = {T}, S = {S}")
        if wrong is None and not isinstance(found, torch.Tensor):
            wrong = f"it is a {type(found).__name__}, not a tensor"
        if wrong is None and found.dtype != torch.bool:
            wrong = f"its dtype is {found.dtype}, not torch.bool"
        if wrong is not None:
            return wrong
    return None


def exercise_2(join: Callable) -> str | None:
    y = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    mistakes = {
        "the shape is right, but a reshape alone mixes heads and tokens: transpose(1, 2) first": y.reshape(2, 4, 15),
        "the channels of the heads are interleaved: a head's D channels stay beside each other": y.permute(
            0, 2, 3, 1
        ).reshape(2, 4, 15),
        "tokens and heads are exchanged, but not joined: reshape to (B, T, H · D)": y.transpose(1, 2),
    }
    return difference(
        join(y.clone()), y.transpose(1, 2).reshape(2, 4, 15), mistakes=mistakes, where="B 2, H 3, T 4, D 5"
    )


def exercise_3(windowed: Callable) -> str | None:
    T, W = 6, 3
    scores = torch.rand(T, T, generator=torch.Generator().manual_seed(5))
    distance = torch.arange(T)[:, None] - torch.arange(T)

    def weights(hidden: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    right = (distance < 0) | (distance >= W)
    mistakes = {
        "there is no window: a query sees all keys before it": weights(distance < 0),
        "the window is one too wide: W keys with the query's own are distances 0 … W - 1": weights(
            (distance < 0) | (distance > W)
        ),
        "the future is seen: a window reaches back only": weights(distance.abs() >= W),
        "the rows don't sum to 1: mask the scores before softmax": scores.softmax(-1).masked_fill(right, 0.0),
    }
    return difference(windowed(scores.clone(), W), weights(right), mistakes=mistakes, where="T = 6, W = 3")
