"""For every exercise at least three wrong answers, and words that its checker must say of them."""

from __future__ import annotations

import math

WRONG: dict[str, list[tuple[object, str]]] = {
    "1.1": [
        (lambda counts, c, size: counts[c] / counts.total(), "without smoothing"),
        (lambda counts, c, size: (counts[c] + 1) / counts.total(), "sum to more than 1"),
        (lambda counts, c, size: (counts[c] + 1) / (counts.total() + len(counts)), "not only for those that were seen"),
    ],
    "1.2": [
        (lambda ps: math.exp(-sum(map(math.log, ps))), "take the mean"),
        (lambda ps: -sum(map(math.log, ps)) / len(ps), "in nats"),
        (lambda ps: math.exp(sum(map(math.log, ps)) / len(ps)), "sign"),
    ],
    "1.3": [
        (lambda table, size: sum(map(len, table.values())) / (len(table) * size), "the rest"),
        (lambda table, size: 1 - sum(c.total() for c in table.values()) / (len(table) * size), "fills one place"),
        (lambda table, size: len(table) * size - sum(map(len, table.values())), "not a share"),
    ],
}
