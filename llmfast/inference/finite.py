"""Logits that are not finite: one error, wherever they turn up.

A model with a NaN or an infinity among its weights, or whose activations overflow, has no next token and gives no text
a probability. Every path says so with the same type: choosing a token (`sampling.choose` and the native decoder mark
such a row with the token -1, which the host sees when it reads the token) and scoring tokens that are given.
"""

from __future__ import annotations

import math

from torch import Tensor


class NonFiniteLogits(ValueError):
    """The model's logits hold a NaN or an infinity. A `ValueError`, so that the command line makes one line of it."""

    def __init__(self, problem: str = "no token can be chosen"):
        super().__init__(
            f"the model's logits are not finite: {problem}. Its weights hold a NaN or an infinity, or its "
            "activations overflow"
        )


def are_finite(logits: Tensor) -> Tensor:
    """Of every row (..., V), whether all its logits are finite: (...) bool. It never waits for the device.

    Logits that lie further apart than their dtype reaches count as infinite too.
    """
    low, high = logits.aminmax(dim=-1)  # both are NaN where any logit is
    return high - low < math.inf


def check_chosen(tokens: Tensor) -> None:
    """`NonFiniteLogits` where a token is -1, which marks a row that none could be chosen from. Waits for the device."""
    if min(tokens.tolist(), default=0) < 0:
        raise NonFiniteLogits
