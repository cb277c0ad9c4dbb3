"""Lesson 9, Sampling: solutions."""

import torch


def exercise_1(logits, k):
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def exercise_2(probabilities, p):
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return order[before < p].tolist()


def exercise_3(probabilities, finger):
    return int(torch.searchsorted(probabilities.cumsum(-1), torch.tensor(finger), right=True))
