"""Lesson 16, Triton. The answers are kernels: they are launched in the interpreter, on sizes that fill no block."""

from __future__ import annotations

from typing import Any

import torch

from llmfast.lessons.checking import difference

GUARD = 1234.5  # what stands behind an array's end, and must stay
PLAIN = "this is no kernel: write @triton.jit above it"
UNWRITTEN = "some of the result is never written: {} of {}"


def exercise_1(scale: Any) -> str | None:
    if not hasattr(scale, "__getitem__"):
        return PLAIN
    n, block, factor = 37, 16, 2.5
    x, out = torch.randn(n + block, generator=torch.Generator().manual_seed(16)), torch.full((n + block,), GUARD)
    scale[(3,)](x, out, n, factor, BLOCK=block)
    if bool((out[n:] != GUARD).any()):
        return "it writes beyond the end: the last block needs mask=at < n"
    if (missing := int((out[:n] == GUARD).sum())) > 0:
        return UNWRITTEN.format(missing, n) + "; program p has the offsets from p * BLOCK"
    return difference(
        out[:n], factor * x[:n], 1e-5, {"the factor is missing": x[:n], "the factor is added": x[:n] + factor}
    )


def exercise_2(rms_norm: Any) -> str | None:
    if not hasattr(rms_norm, "__getitem__"):
        return PLAIN
    rows, N, eps = 3, 20, 0.1
    x, weight = 2 + torch.randn(rows, N, generator=torch.Generator().manual_seed(162)), torch.arange(1.0, N + 1)
    out = torch.full((rows * N + 32,), GUARD)
    behind = torch.full((32,), 9.0)
    rms_norm[(rows,)](torch.cat([x.flatten(), behind]), torch.cat([weight, behind]), out, N, eps, BLOCK=32)
    if bool((out[rows * N :] != GUARD).any()):
        return "it writes beyond the end of a row: mask=at < N"
    found, mean = out[: rows * N].view(rows, N), x.square().mean(-1, keepdim=True)
    if bool((found == GUARD).any()):
        return UNWRITTEN.format(int((found == GUARD).sum()), rows * N) + "; program r has row r, from r * N"
    mistakes = {
        "the weight is missing": x / (mean + eps).sqrt(),
        "the mean is over BLOCK places, of which only N are real: divide by N": x
        / (mean * N / 32 + eps).sqrt()
        * weight,
        "eps is missing": x / mean.sqrt() * weight,
        "this takes the sum of squares: divide it by N": x / (mean * N + eps).sqrt() * weight,
    }
    return difference(found, x / (mean + eps).sqrt() * weight, 1e-4, mistakes)


def exercise_3(row_max: Any) -> str | None:
    if not hasattr(row_max, "__getitem__"):
        return PLAIN
    rows, N = 3, 41
    x, out = -1 - torch.rand(rows, N, generator=torch.Generator().manual_seed(163)), torch.full((rows,), GUARD)
    x[1, 40], x[2, 20] = -0.5, -0.7
    row_max[(rows,)](torch.cat([x.flatten(), torch.full((16,), 9.0)]), out, N, BLOCK=16)
    if bool((out == GUARD).any()):
        return UNWRITTEN.format(int((out == GUARD).sum()), rows)
    mistakes = {
        "all numbers are negative, and you find 0: what is masked out must be -inf, and so must the start": torch.zeros(
            rows
        ),
        "only the first block is looked at: rows are longer": x[:, :16].amax(-1),
        "the last, partial block is left out": x[:, :32].amax(-1),
        "this is the minimum": x.amin(-1),
    }
    return difference(out, x.amax(-1), 1e-6, mistakes)
