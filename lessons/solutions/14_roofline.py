"""Lesson 14, the roofline: solutions."""


def exercise_1(T, K, N, e):
    return 2 * T * K * N / ((T * K + K * N + T * N) * e)


def exercise_2(moved, operations, bandwidth, peak):
    return max(moved / (bandwidth * 1e9), operations / (peak * 1e9))


def exercise_3(T, K, N, e):
    product, gelu = (T * K + K * N + T * N) * e, 2 * T * N * e
    return gelu / (product + gelu)
