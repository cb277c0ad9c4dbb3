"""Lesson 8, Training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(nesterov: Callable) -> str | None:
    w, g, m, lr, beta = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]), torch.tensor([2.0, -1.0]), 0.1, 0.9
    found = nesterov(w.clone(), g.clone(), m.clone(), lr, beta)
    if found is None:
        return difference(None, 0)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return "it must return two things: the weight and the momentum, (w, m)"
    new = beta * m + g
    wrong = difference(
        found[1], new, 1e-5, {"m is not updated": m, "m is β m + g, with the whole g": beta * m + 0.1 * g}
    )
    if wrong is not None:
        return f"the momentum: {wrong}"
    mistakes = {
        "this is plain momentum, or the old m: the step is g + β m with the new m": w - lr * new,
        "the step goes up the hill": w + lr * (g + beta * new),
        "the learning rate is missing": w - (g + beta * new),
    }
    wrong = difference(found[0], w - lr * (g + beta * new), 1e-5, mistakes)
    return None if wrong is None else f"the weight: {wrong}"


def exercise_2(clip: Callable) -> str | None:
    gradients = [torch.tensor([2.0, 2.0, 1.0]), torch.tensor([[0.0], [4.0]])]  # norm 5
    for most, factor in ((1.0, 0.2), (10.0, 1.0)):
        found = clip([g.clone() for g in gradients], most)
        if found is None:
            return difference(None, 0)
        scaled = list(found)
        if [g.shape for g in scaled] != [g.shape for g in gradients]:
            return "it must return as many tensors as it gets, each of the shape that it had"
        flat = torch.cat([g.flatten() for g in scaled])
        whole = torch.cat([g.flatten() for g in gradients])
        mistakes = {
            "each tensor is scaled by its own norm: one factor for all, or the direction changes": torch.cat(
                [(g * min(1.0, most / float(g.norm()))).flatten() for g in gradients]
            ),
            "numbers are cut one by one: all are scaled by one factor": whole.clamp(-most, most),
            "what is short enough is made longer: the norm is to be at most, not exactly": whole * most / 5,
            "nothing is scaled": whole,
        }
        wrong = difference(flat, whole * factor, 1e-5, mistakes, f"norm 5, at most {most:g}")
        if wrong is not None:
            return wrong
    return None


def exercise_3(rate: Callable) -> str | None:
    steps, warmup, lr = 20, 4, 2.0

    def right(step: int) -> float:
        return lr * (step + 1) / warmup if step < warmup else lr * (steps - step) / (steps - warmup)

    found = [rate(step, steps, warmup, lr) for step in range(steps)]
    mistakes = {
        "step 0 has a rate of 0, and learns nothing: it is lr / warmup": [
            lr * step / warmup if step < warmup else right(step) for step in range(steps)
        ],
        "there is no warm-up": [lr * (steps - step) / steps for step in range(steps)],
        "it does not fall after the warm-up": [right(step) if step < warmup else lr for step in range(steps)],
        "it falls as if it had begun at step 0: count from the end of the warm-up": [
            right(step) if step < warmup else lr * (steps - step) / steps for step in range(steps)
        ],
        "it falls from step warmup - 1 on: step `warmup` still has lr": [
            right(step) if step < warmup else lr * (steps - step) / (steps - warmup + 1) for step in range(steps)
        ],
        "the last step has a rate of 0: step number `steps` would have, and there is none": [
            right(step) if step < warmup else lr * (steps - 1 - step) / (steps - 1 - warmup) for step in range(steps)
        ],
    }
    return difference(
        None if None in found else found, [right(s) for s in range(steps)], 1e-6, mistakes, "of 20 steps, 4"
    )
