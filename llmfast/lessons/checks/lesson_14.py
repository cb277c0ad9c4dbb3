"""Lesson 14, the roofline."""

from __future__ import annotations

from collections.abc import Callable

from llmfast.lessons.checking import difference


def exercise_1(intensity: Callable) -> str | None:
    T, K, N, e = 8, 16, 32, 2
    elements = T * K + K * N + T * N
    mistakes = {
        "a product multiplies and adds: two operations for each of the T · K · N": T * K * N / (elements * e),
        "these are operations for each element: an element has e bytes": 2 * T * K * N / elements,
        "the result has to be written: T · N elements more": 2 * T * K * N / ((T * K + K * N) * e),
        "only the weight is counted: the input and the result move too": 2 * T * K * N / (K * N * e),
        "this is bytes for each operation, the other way round": elements * e / (2 * T * K * N),
    }
    return difference(
        intensity(T, K, N, e), 2 * T * K * N / (elements * e), mistakes=mistakes, where="T 8, K 16, N 32, e 2"
    )


def exercise_2(at_least: Callable) -> str | None:
    works = [(8e9, 2e11), (1e9, 6e12)]  # the first is bound by memory, the second by arithmetic
    memory, arithmetic = [moved / 40e9 for moved, _ in works], [operations / 2000e9 for _, operations in works]
    right = [max(pair) for pair in zip(memory, arithmetic, strict=True)]
    mistakes = {
        "only memory is counted": memory,
        "only arithmetic is counted": arithmetic,
        "the larger of the two times is the limit, not the smaller": [
            min(pair) for pair in zip(memory, arithmetic, strict=True)
        ],
        "both happen at once: the times are not added": [m + a for m, a in zip(memory, arithmetic, strict=True)],
        "the unit is wrong: bandwidth is in 10⁹ bytes a second, peak in 10⁹ operations": [s * 1e9 for s in right],
    }
    found = [at_least(moved, operations, 40, 2000) for moved, operations in works]
    where = "8 GB and 200 GFLOP, then 1 GB and 6000 GFLOP, with 40 GB/s and 2000 GFLOP/s"
    return difference(None if None in found else found, right, 1e-6, mistakes, where)


def exercise_3(fused_saves: Callable) -> str | None:
    T, K, N, e = 8, 16, 32, 2
    product, gelu = T * K + K * N + T * N, 2 * T * N
    mistakes = {
        "the result is read and written: both are saved, 2 · T · N elements": T * N / (product + T * N),
        "this compares with the product alone: the share is of the bytes of both": gelu / product,
        "this is what is left, not what is saved": product / (product + gelu),
        "these are bytes, not a share": gelu * e,
    }
    return difference(fused_saves(T, K, N, e), gelu / (product + gelu), mistakes=mistakes, where="T 8, K 16, N 32, e 2")
