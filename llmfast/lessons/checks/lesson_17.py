"""Lesson 17, Fewer bits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference


def exercise_1(bits_a_weight: Callable) -> str | None:
    mistakes = {
        "the scale is shared by the group: divide its bits by the group": 4 + 16,
        "the scale is missing": 4,
        "this is a whole group, not a weight": 4 * 32 + 16,
        "the bits of all weights and of the scale are divided: only the scale is shared": (4 + 16) / 32,
    }
    return difference(bits_a_weight(4, 32, 16), 4.5, 1e-9, mistakes, "4 bits, groups of 32, a scale of 16 bits")


def exercise_2(unpack: Callable) -> str | None:
    right = torch.tensor([[-8, 7, 0, -1, 3, -4], [1, 2, -3, -5, 6, -7]])
    packed = ((right[:, 0::2] + 8) + 16 * (right[:, 1::2] + 8)).to(torch.uint8)
    low, high = (packed % 16).int(), (packed // 16).int()
    mistakes = {
        "8 is to be subtracted: a nibble of 0 stands for -8": right + 8,
        "the low four bits are the even columns, not the odd ones": torch.stack([high, low], dim=-1).flatten(-2) - 8,
        "first come all low nibbles, then all high ones: neighbours share a byte": torch.cat([low, high], dim=-1) - 8,
        "the subtraction is done in uint8, where 0 - 8 is 248: convert first": (
            torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2) - 8
        ),
        "these are the low nibbles only": low - 8,
    }
    return difference(unpack(packed), right, 0, mistakes)


def exercise_3(asymmetric: Callable) -> str | None:
    w, bits = torch.tensor([1.0, 1.62, 3.4, 6.94, 7.0]), 2
    scale = torch.tensor(2.0)  # (7 - 1) / 3
    whole = ((w - 1) / scale).round()
    symmetric = (w / (w.abs().max() / 1)).round() * w.abs().max()
    wide = 6 / 4
    mistakes = {
        "these are the whole numbers: return what they stand for": whole,
        "the minimum is not added again": whole * scale,
        "there are 2^bits numbers, so 2^bits - 1 steps between them": 1 + wide * ((w - 1) / wide).round(),
        "nothing is rounded": w,
        "this is symmetric around 0, without a minimum": symmetric,
        "numbers are rounded down: to the nearest": 1 + ((w - 1) / scale).floor(),
    }
    return difference(asymmetric(w, bits), 1 + whole * scale, 1e-5, mistakes, "[1, 1.62, 3.4, 6.94, 7] in 2 bits")
