"""Lesson 12, Fine-tuning: solutions."""


def exercise_1(out, within, rank):
    return rank * within + out * rank


def exercise_2(W, A, B, scale):
    return W + scale * B @ A


def exercise_3(question, answer):
    return [-100] * (len(question) - 1) + list(answer)
