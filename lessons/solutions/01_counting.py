"""Lesson 1, Counting: solutions."""

import math


def exercise_1(counts, c, size):
    return (counts[c] + 1) / (counts.total() + size)


def exercise_2(probabilities):
    return math.exp(-sum(math.log(p) for p in probabilities) / len(probabilities))


def exercise_3(table, size):
    return 1 - sum(len(counts) for counts in table.values()) / (len(table) * size)
