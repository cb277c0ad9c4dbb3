"""Lesson 2, Tokens: solutions."""

import math
from collections import Counter


def exercise_1(words):
    counts = Counter()
    for word, n in words.items():
        for pair in zip(word, word[1:]):
            counts[pair] += n
    return counts


def exercise_2(word, vocabulary):
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces


def exercise_3(nats, tokens, text):
    return nats * tokens / math.log(2) / len(text.encode())
