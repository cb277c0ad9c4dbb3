"""For every exercise at least three wrong answers, and words that its checker must say of them."""

from __future__ import annotations

import math

import torch


def cpp_relu(body: str) -> str:
    return '#include "vectors.h"\nEXPORT relu(const float* x, float* y, long n) { ' + body + " }"


def cpp_sums(body: str) -> str:
    head = '#include "vectors.h"\nEXPORT row_sums(const float* x, float* y, long rows, long columns) { '
    return head + "for (long r = 0; r < rows; r++) { " + body + " } }"


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
    "4.1": [
        (lambda s: s.softmax(dim=0), "down the columns"),
        (lambda s: s.exp() / s.exp().sum(), "in every row"),
        (lambda s: s.exp() / s.exp().sum(-1, keepdim=True), "inf or nan"),
        (lambda s: (s - s.max()).exp() / ((s - s.max()).exp().sum(-1, keepdim=True) + 1e-30), "each row's own largest"),
    ],
    "4.2": [
        (lambda x, factor: (factor * (x @ x.T)).softmax(-1), "these are the weights"),
        (lambda x, factor: (x @ x.T).softmax(-1) @ x, "changes nothing"),
        (lambda x, factor: (factor * (x @ x.T)).softmax(-1) @ (factor * x), "mixed are multiplied too"),
    ],
    "4.3": [
        (lambda x: (x @ x.T).softmax(-1), "still looks at itself"),
        (lambda x: (x @ x.T).softmax(-1) * (1 - torch.eye(len(x))), "no longer sum to 1"),
        (lambda x: ((x @ x.T) * (1 - torch.eye(len(x)))).softmax(-1), "must be −∞"),
    ],
    "5.1": [
        (lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T), "exchanged"),
        (lambda T, S: torch.ones(T, S, dtype=torch.bool).triu(S - T), "may look at itself"),
        (lambda T, S: torch.ones(T, S, dtype=torch.bool).triu(1), "not the first"),
        (lambda T, S: torch.ones(T, S).triu(1 + S - T), "not torch.bool"),
    ],
    "5.2": [
        (lambda y: y.reshape(y.shape[0], y.shape[2], -1), "mixes heads and tokens"),
        (lambda y: y.permute(0, 2, 3, 1).reshape(y.shape[0], y.shape[2], -1), "interleaved"),
        (lambda y: y.transpose(1, 2), "not joined"),
    ],
    "5.3": [
        (lambda s, W: s.masked_fill(torch.ones_like(s).triu(1) > 0, -torch.inf).softmax(-1), "no window"),
        (lambda s, W: s.masked_fill(torch.ones_like(s).triu(1 - W) < 1, -torch.inf).softmax(-1), "where it should be"),
        (
            lambda s, W: s.masked_fill(
                (torch.ones_like(s).triu(-W) < 1) | (torch.ones_like(s).triu(1) > 0), -torch.inf
            ).softmax(-1),
            "one too wide",
        ),
    ],
    "14.1": [
        (lambda T, K, N, e: T * K * N / ((T * K + K * N + T * N) * e), "multiplies and adds"),
        (lambda T, K, N, e: 2 * T * K * N / ((T * K + K * N) * e), "has to be written"),
        (lambda T, K, N, e: 2 * T * K * N / (T * K + K * N + T * N), "e bytes"),
    ],
    "14.2": [
        (lambda moved, operations, bandwidth, peak: moved / bandwidth / 1e9 + operations / peak / 1e9, "not added"),
        (lambda moved, operations, bandwidth, peak: min(moved / bandwidth, operations / peak) / 1e9, "not the smaller"),
        (lambda moved, operations, bandwidth, peak: max(moved / bandwidth, operations / peak), "the unit"),
        (lambda moved, operations, bandwidth, peak: moved / bandwidth / 1e9, "only memory"),
    ],
    "14.3": [
        (lambda T, K, N, e: T * N / (T * K + K * N + 2 * T * N), "read and written"),
        (lambda T, K, N, e: 2 * T * N / (T * K + K * N + T * N), "product alone"),
        (lambda T, K, N, e: 2 * T * N * e, "not a share"),
    ],
    "15.1": [
        ('#include "vectors.h"\nEXPORT relu(const float* x, float* y, long n) { y[0] = }', "does not compile"),
        ("void relu(const float* x, float* y, long n) {}", "no function relu"),
        (cpp_relu("for (long i = 0; i < n; i += W) *(vec*)(y + i) = *(const vec*)(x + i);"), "beyond the end"),
        (cpp_relu("for (long i = 0; i + 15 < n; i++) y[i] = x[i] > 0 ? x[i] : 0;"), "never written"),
        (cpp_relu("for (long i = 0; i < n; i++) y[i] = x[i] < 0 ? x[i] : 0;"), "sign is turned"),
    ],
    "15.2": [
        (
            cpp_sums("float s = 0; for (long c = 0; c < columns; c++) s += x[r * columns + c]; y[r] = s;"),
            "loses the last bits",
        ),
        (cpp_sums("double s = 0; for (long c = 0; c < columns; c++) s += x[c]; y[r] = s;"), "same sum"),
        (
            cpp_sums("double s = 0; for (long c = 0; c < columns; c++) s += x[r * columns + c]; y[r] = s / columns;"),
            "means",
        ),
    ],
    "15.3": [
        (lambda rows: rows, "other way round"),
        (lambda rows: 1.0, "step 2"),
        (lambda rows: 2 / rows, "cancels"),
    ],
}
