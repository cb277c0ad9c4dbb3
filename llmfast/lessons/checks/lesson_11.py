"""Lesson 11, Encoder or decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(prefix_mask: Callable) -> str | None:
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    right = causal.clone()
    right[:, :2] = True
    mistakes = {
        "the given tokens see each other in both directions: this is a plain causal mask": causal,
        "True and False are exchanged: True is where a row may look": ~right,
        "the written tokens see the future: among themselves they are causal": torch.ones(5, 5, dtype=torch.bool),
        "columns look at rows here: row looks at column": right.T,
    }
    return difference(prefix_mask(2, 3), right, 0, mistakes, "2 given, 3 written")


def exercise_2(masked_loss: Callable) -> str | None:
    generator = torch.Generator().manual_seed(11)
    logits, ids = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    hidden = torch.tensor([[True, False, False, True, False], [False, False, True, False, False]])
    each = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mistakes = {
        "this is the loss of all tokens: those that were seen teach nothing": each.mean(),
        "the sum of the hidden ones is divided by all: divide by how many are hidden": (each * hidden).mean(),
        "this is a sum: the mean is asked for": each[hidden].sum(),
        "this is the loss of those that are not hidden": each[~hidden].mean(),
    }
    return difference(masked_loss(logits, ids, hidden), each[hidden].mean(), 1e-5, mistakes)


def exercise_3(mean_pooled: Callable) -> str | None:
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(113))
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    right = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    mistakes = {
        "the padding is part of the mean": x.mean(1),
        "the sum of the real tokens is divided by T: divide by how many are real": (x * mask[..., None]).mean(1),
        "this is a sum: divide by the number of real tokens": (x * mask[..., None]).sum(1),
        "this is the first token": x[:, 0],
    }
    return difference(mean_pooled(x, mask), right, 1e-5, mistakes, "4 tokens, of which the second text has 2")
