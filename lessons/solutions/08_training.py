"""Lesson 8, Training: solutions."""


def exercise_1(w, g, m, lr, beta):
    m = beta * m + g
    return w - lr * (g + beta * m), m


def exercise_2(gradients, most):
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    factor = min(1.0, most / norm) if norm > 0 else 1.0
    return [g * factor for g in gradients]


def exercise_3(step, steps, warmup, lr):
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (steps - step) / (steps - warmup)
