"""Lesson 18, One token: solutions."""


def exercise_1(weight_bytes, cache_bytes, batch, bandwidth):
    return batch * bandwidth * 1e9 / (weight_bytes + batch * cache_bytes)


def exercise_2(a, k, cost):
    return sum(a**i for i in range(k + 1)) / cost


def exercise_3(memory, weight_bytes, cache_bytes):
    return max(0, (memory - weight_bytes) // cache_bytes)
