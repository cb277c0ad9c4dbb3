"""The learning rate over a run: a pure function of the step."""

from __future__ import annotations

import math

from llmfast.training.configuration import OptimizationSettings


def learning_rate(step: int, steps: int, settings: OptimizationSettings) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    It rises linearly over `warmup` steps to `lr`, which the step after them has, stays there for the share `hold` of
    the others, and then falls to `final_lr · lr`, which a step after the last would have: by half a cosine
    (Loshchilov & Hutter, 2016), along a line, or not at all.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    progress = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    progress = max(0.0, progress - settings.hold) / (1 - settings.hold)
    remaining = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * remaining[settings.schedule])
