"""Lesson 12, Fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(lora_parameters: Callable) -> str | None:
    mistakes = {
        "this is the weight itself": 30 * 20,
        "there are two matrices: A (r, in) and B (out, r)": 4 * 20,
        "there are two matrices: B (out, r) and A (r, in)": 4 * 30,
        "the rank counts in both matrices": 30 + 20,
        "the two are thin: their sizes add up": 4 * 30 * 20,
    }
    return difference(lora_parameters(30, 20, 4), 4 * (30 + 20), 0, mistakes, "out 30, in 20, rank 4")


def exercise_2(merged: Callable) -> str | None:
    generator = torch.Generator().manual_seed(12)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((4, 4), (2, 4), (4, 2)))
    mistakes = {
        "the scale is missing": W + B @ A,
        "the adapter is added to nothing: W + …": 0.5 * B @ A,
        "the product is transposed: (x Aᵀ) Bᵀ = x (B A)ᵀ, so B A is added": W + 0.5 * (B @ A).T,
        "the weight is scaled too": 0.5 * (W + B @ A),
        "nothing is added": W,
    }
    return difference(merged(W.clone(), A.clone(), B.clone(), 0.5), W + 0.5 * B @ A, 1e-5, mistakes)


def exercise_3(answer_targets: Callable) -> str | None:
    question, answer = [4, 5, 6, 7], [8, 9]
    mistakes = {
        "this is one to the right: position i is asked for token i + 1": [-100] * 4 + [8],
        "the question is learned too": [5, 6, 7, 8, 9],
        "the answer's first token is asked for at the question's last": [-100] * 4 + [9],
        "the text is cut at the end, [:-1], so there is a target less": [-100] * 4 + [8, 9],
        "all is hidden": [-100] * 5,
    }
    found = answer_targets(list(question), list(answer))
    return difference(found, [-100] * 3 + answer, 0, mistakes, "[4, 5, 6, 7] and [8, 9]")
