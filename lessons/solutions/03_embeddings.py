"""Lesson 3, Embeddings and positions: solutions."""

import math

import torch


def exercise_1(table, i):
    unit = torch.nn.functional.normalize(table, dim=-1)
    cosines = unit @ unit[i]
    cosines[i] = -torch.inf
    return int(cosines.argmax())


def exercise_2(T, C):
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def exercise_3(q, k, m, n, omega):
    def turned(x, position):
        c, s = math.cos(position * omega), math.sin(position * omega)
        return torch.stack([x[0] * c - x[1] * s, x[1] * c + x[0] * s])

    return turned(q, m) @ turned(k, n)
