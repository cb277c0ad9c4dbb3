"""Lesson 11, Encoder or decoder: solutions."""

import torch


def exercise_1(given, written):
    T = given + written
    may = torch.ones(T, T, dtype=torch.bool).tril()
    may[:, :given] = True
    return may


def exercise_2(logits, ids, hidden):
    return torch.nn.functional.cross_entropy(logits[hidden], ids[hidden])


def exercise_3(x, mask):
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
