"""Lesson 10, How good is it?: solutions."""

import math


def exercise_1(nats, size):
    return nats / math.log(2) / size


def exercise_2(wins):
    share = sum(wins) / len(wins)
    return math.sqrt(share * (1 - share) / len(wins))


def exercise_3(E, B, beta, target):
    return math.inf if target <= E else (B / (target - E)) ** (1 / beta)
