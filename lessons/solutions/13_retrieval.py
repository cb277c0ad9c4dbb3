"""Lesson 13, Retrieval: solutions."""

from collections import defaultdict

import torch


def exercise_1(table, question, count):
    return torch.nn.functional.cosine_similarity(table, question[None], dim=-1).topk(count).indices.tolist()


def exercise_2(rankings, k=60):
    scores = defaultdict(float)
    for ranking in rankings:
        for rank, piece in enumerate(ranking, 1):
            scores[piece] += 1 / (k + rank)
    return sorted(scores, key=lambda piece: -scores[piece])


def exercise_3(found, right):
    return 1 / (found.index(right) + 1) if right in found else 0.0
