"""Lesson 4, Attention without weights: solutions."""

import torch


def exercise_1(scores):
    powers = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def exercise_2(x, factor):
    """0: every word becomes the mean of all. 100: every word becomes the one with which its score is largest."""
    return torch.softmax(factor * (x @ x.T), dim=-1) @ x


def exercise_3(x):
    scores = x @ x.T
    return torch.softmax(scores.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf), dim=-1)
