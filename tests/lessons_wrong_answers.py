"""For every exercise at least three wrong answers, and words that its checker must say of them."""

from __future__ import annotations

import importlib.util
import math
import runpy
from collections import Counter
from typing import Any

import torch

from llmfast.lessons.catalogue import lesson, lessons


def solutions(number: int) -> dict[str, Any]:
    """The right answers to a lesson's exercises, by number."""
    names = runpy.run_path(str(lesson(number).solutions))
    return {name.removeprefix("exercise_"): value for name, value in names.items() if name.startswith("exercise_")}


HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import lessons_kernels
LESSONS = [chosen.number for chosen in lessons() if HAS_TRITON or chosen.number != 16]
solved = {f"{number}.{name}": answer for number in LESSONS for name, answer in solutions(number).items()}


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
        (lambda T, S: solved["5.1"](T, S).tolist(), "a list, not a tensor"),
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
        (lambda x: x.clamp(min=0), "a string of C++"),
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
    "2.1": [
        (lambda words: Counter(pair for word in words for pair in zip(word, word[1:], strict=False)), "counts once"),
        (lambda words: {("a", "b"): 3, ("b", "a"): 5}, "stand there twice"),
        (lambda words: {("a", "b"): 11}, "have an order"),
    ],
    "2.2": [
        (lambda word, vocabulary: ["un", "known"], "with ## before"),
        (lambda word, vocabulary: ["u", "##n", "##known"], "not the shortest"),
        (lambda word, vocabulary: ["un", "##x"] if word == "unx" else solved["2.2"](word, vocabulary), "one [UNK]"),
    ],
    "2.3": [
        (lambda nats, tokens, text: nats * tokens / math.log(2) / len(text), "two bytes"),
        (lambda nats, tokens, text: nats * tokens / len(text.encode()), "these are nats"),
        (lambda nats, tokens, text: nats / math.log(2) / len(text.encode()), "for each token"),
    ],
    "3.1": [
        (lambda table, i: i, "itself"),
        (lambda table, i: int((table @ table[i]).argmax()), "longest vector"),
        (lambda table, i: int((table @ table[i]).argmin()), "least alike"),
    ],
    "3.2": [
        (lambda T, C: solved["3.2"](T, C).roll(C // 2, dims=-1), "sines, then cosines"),
        (lambda T, C: solved["3.2"](T + 1, C)[1:], "from 1"),
        (lambda T, C: solved["3.2"](T, C).T, "shape"),
    ],
    "3.3": [
        (lambda q, k, m, n, omega: q @ k, "nothing is turned"),
        (lambda q, k, m, n, omega: solved["3.3"](q, k, n, m, omega), "other way"),
        (lambda q, k, m, n, omega: solved["3.3"](q, k, m, 0, omega), "only the query"),
    ],
    "6.1": [
        (lambda x, w, eps: x / (x.square().mean(-1, keepdim=True) + eps).sqrt(), "weight is missing"),
        (lambda x, w, eps: x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * w, "the mean is meant"),
        (lambda x, w, eps: torch.nn.functional.layer_norm(x, x.shape[-1:], w, None, eps), "LayerNorm"),
        (lambda x, w, eps: x / x.square().mean(-1, keepdim=True).sqrt() * w, "eps is missing"),
    ],
    "6.2": [
        (lambda x, gate, up, down: solved["6.2"](x, up, gate, down), "exchanged"),
        (lambda x, gate, up, down: torch.nn.functional.silu(x @ gate.T) * (x @ up.T), "not narrowed"),
        (lambda x, gate, up, down: ((x @ gate.T).sigmoid() * (x @ up.T)) @ down.T, "sigmoid"),
    ],
    "6.3": [
        (lambda x, n, a, m, f: m(n(x + a(x)) + f(n(x + a(x)))), "post-norm"),
        (lambda x, n, a, m, f: f(m(a(n(x)))), "nothing is added"),
        (lambda x, n, a, m, f: x + a(n(x)) + f(m(x)), "reads the stream after"),
        (lambda x, n, a, m, f: solved["6.3"](x, n, f, m, a), "attention comes first"),
    ],
    "7.1": [
        (lambda V, P, C, L: solved["7.1"](V, P, C, L) - 2 * C, "last norm"),
        (lambda V, P, C, L: solved["7.1"](V, P, C, L) + V * C, "not counted twice"),
        (lambda V, P, C, L: solved["7.1"](V, P, C, L) - 9 * C * L, "biases"),
    ],
    "7.2": [
        (lambda L, H, D, tokens, e: L * H * D * tokens * e, "twice as much"),
        (lambda L, H, D, tokens, e: 2 * H * D * tokens * e, "one layer"),
        (lambda L, H, D, tokens, e: 2 * L * H * D * tokens, "e bytes"),
    ],
    "7.3": [
        (lambda x, table, last: x[:, -1] @ table.T, "padded end"),
        (lambda x, table, last: x @ table.T, "every position"),
        (lambda x, table, last: x[torch.arange(len(x)), last - 1], "hidden state"),
        (lambda x, table, last: x[torch.arange(len(x)), last.clamp(max=4)] @ table.T, "n - 1"),
    ],
    "8.1": [
        (lambda w, g, m, lr, beta: (w - lr * (beta * m + g), beta * m + g), "plain momentum"),
        (lambda w, g, m, lr, beta: w - lr * g, "two things"),
        (lambda w, g, m, lr, beta: (w - lr * (g + beta * m), beta * m + g), "the old m"),
        (lambda w, g, m, lr, beta: (w, m), "not updated"),
    ],
    "8.2": [
        (lambda gs, most: [g * min(1, most / float(g.norm())) for g in gs], "one factor for all"),
        (lambda gs, most: [g.clamp(-most, most) for g in gs], "one by one"),
        (lambda gs, most: [g * most / 5 for g in gs], "made longer"),
        (lambda gs, most: gs, "nothing is scaled"),
        (lambda gs, most: [torch.cat([g.flatten() for g in solved["8.2"](gs, most)])], "as many tensors"),
    ],
    "8.3": [
        (lambda s, n, w, lr: lr * s / w if s < w else solved["8.3"](s, n, w, lr), "learns nothing"),
        (lambda s, n, w, lr: lr * (n - s) / n, "no warm-up"),
        (lambda s, n, w, lr: lr * min(1, (s + 1) / w), "does not fall"),
        (lambda s, n, w, lr: lr * min((s + 1) / w, (n - s) / (n - w + 1)), "still has lr"),
    ],
    "9.1": [
        (lambda logits, k: logits * (logits >= logits.topk(k).values[-1]), "−∞ is none"),
        (lambda logits, k: logits.topk(k).values, "keep the shape"),
        (lambda logits, k: logits.masked_fill(logits <= logits.topk(k).values[-1], -torch.inf), "one too few"),
        (lambda logits, k: solved["9.1"](logits.mul_(2), k), "where it should be"),
    ],
    "9.2": [
        (
            lambda ps, p: ps.sort(descending=True).indices[ps.sort(descending=True).values.cumsum(0) < p].tolist(),
            "too few",
        ),
        (lambda ps, p: solved["9.2"](ps, p + 0.1), "one too many"),
        (lambda ps, p: ps[solved["9.2"](ps, p)].tolist(), "numbers of the tokens"),
    ],
    "9.3": [
        (lambda ps, finger: int(ps.argmax()), "greedy"),
        (lambda ps, finger: int(torch.searchsorted(ps.cumsum(0), torch.tensor(finger))), "at a border"),
        (lambda ps, finger: solved["9.3"](ps, finger) + 1, "one too far"),
    ],
    "17.1": [
        (lambda bits, group, scale_bits: bits + scale_bits, "shared by the group"),
        (lambda bits, group, scale_bits: bits, "scale is missing"),
        (lambda bits, group, scale_bits: bits * group + scale_bits, "a whole group"),
    ],
    "17.2": [
        (lambda packed: solved["17.2"](packed) + 8, "8 is to be subtracted"),
        (lambda packed: torch.cat([packed % 16, packed // 16], -1).int() - 8, "neighbours share a byte"),
        (lambda packed: torch.stack([packed % 16, packed // 16], -1).flatten(-2) - 8, "in uint8"),
    ],
    "17.3": [
        (lambda w, bits: ((w - w.min()) / (w.max() - w.min()) * (2**bits - 1)).round(), "what they stand for"),
        (lambda w, bits: solved["17.3"](w, bits) - w.min(), "not added again"),
        (lambda w, bits: w, "nothing is rounded"),
    ],
    "18.1": [
        (lambda w, c, b, gb: gb * 1e9 / (w + b * c), "one text"),
        (lambda w, c, b, gb: b * gb * 1e9 / (w + c), "cache of its own"),
        (lambda w, c, b, gb: b * gb / (w + b * c), "10⁹"),
    ],
    "18.2": [
        (lambda a, k, cost: sum(a**i for i in range(1, k + 1)) / cost, "own token"),
        (lambda a, k, cost: (1 + k * a) / cost, "not k · a"),
        (lambda a, k, cost: sum(a**i for i in range(k + 1)), "cost of reading more"),
    ],
    "18.3": [
        (lambda memory, weights, cache: memory // cache, "take memory too"),
        (lambda memory, weights, cache: (memory - weights) / cache, "round down"),
        (lambda memory, weights, cache: (memory - weights) // cache, "less than no text"),
    ],
    "10.1": [
        (lambda nats, size: nats / size, "nats a byte"),
        (lambda nats, size: nats / math.log(2), "divide by the bytes"),
        (lambda nats, size: nats * math.log(2) / size, "not multiply"),
    ],
    "10.2": [
        (lambda wins: sum(wins) / len(wins), "share itself"),
        (lambda wins: solved["10.2"](wins) * len(wins) ** 0.5, "1 / √n"),
        (lambda wins: solved["10.2"](wins) ** 2, "root is missing"),
        (lambda wins: float(torch.tensor(wins).double().std()) / len(wins) ** 0.5, "n - 1"),
    ],
    "10.3": [
        (lambda E, B, beta, target: (B / (target - E)) ** beta if target > E else math.inf, "1 / β"),
        (lambda E, B, beta, target: (B / target) ** (1 / beta), "E is missing"),
        (lambda E, B, beta, target: abs(B / (target - E + 1e-12)) ** (1 / beta), "infinity"),
    ],
    "11.1": [
        (lambda given, written: torch.ones(given + written, given + written).tril() > 0, "plain causal"),
        (lambda given, written: ~solved["11.1"](given, written), "exchanged"),
        (lambda given, written: torch.ones(given + written, given + written) > 0, "see the future"),
    ],
    "11.2": [
        (lambda logits, ids, hidden: torch.nn.functional.cross_entropy(logits.mT, ids), "all tokens"),
        (lambda logits, ids, hidden: solved["11.2"](logits, ids, ~hidden), "not hidden"),
        (lambda logits, ids, hidden: solved["11.2"](logits, ids, hidden) * hidden.sum(), "a sum"),
    ],
    "11.3": [
        (lambda x, mask: x.mean(1), "padding is part"),
        (lambda x, mask: (x * mask[..., None]).mean(1), "divided by T"),
        (lambda x, mask: x[:, 0], "first token"),
    ],
    "12.1": [
        (lambda out, within, rank: out * within, "weight itself"),
        (lambda out, within, rank: rank * within, "two matrices"),
        (lambda out, within, rank: out + within, "rank counts"),
    ],
    "12.2": [
        (lambda W, A, B, scale: W + B @ A, "scale is missing"),
        (lambda W, A, B, scale: W + scale * (B @ A).T, "transposed"),
        (lambda W, A, B, scale: scale * B @ A, "added to nothing"),
    ],
    "12.3": [
        (lambda q, a: [-100] * len(q) + a[:-1], "one to the right"),
        (lambda q, a: (q + a)[1:], "question is learned"),
        (lambda q, a: [-100] * len(q) + a, "a target less"),
        (lambda q, a: [-100] * len(a) + a, "shape"),
    ],
    "13.1": [
        (lambda table, q, count: (table @ q).topk(count).indices.tolist(), "divide by the lengths"),
        (lambda table, q, count: solved["13.1"](table, -q, count), "least alike"),
        (lambda table, q, count: solved["13.1"](table, q, count)[::-1], "best comes first"),
        (lambda table, q, count: (table - q).norm(dim=-1).argsort()[:count], "by distance"),
    ],
    "13.2": [
        (lambda rankings, k=60: solved["13.2"](rankings, k)[:3], "one search alone"),
        (lambda rankings, k=60: [p for ranking in rankings for p in ranking], "comes once"),
        (lambda rankings, k=60: list(dict.fromkeys(p for ranking in rankings for p in ranking)), "ranks are summed"),
        (lambda rankings, k=60: solved["13.2"](rankings), "k is not used"),
        (lambda rankings, k=60: solved["13.2"](rankings, k - 1), "counted from 1"),
    ],
    "13.3": [
        (lambda found, right: 1 / max(1, found.index(right)), "counted from 1"),
        (lambda found, right: found.index(right) + 1, "this is the place"),
        (lambda found, right: float(right in found), "not enough"),
    ],
}

if HAS_TRITON:
    WRONG |= {
        "16.1": [
            (lessons_kernels.scale_without_mask, "beyond the end"),
            (lessons_kernels.scale_without_program, "never written"),
            (lessons_kernels.scale_adds, "added"),
            (lambda x, out, n, factor, BLOCK: None, "@triton.jit"),
        ],
        "16.2": [
            (lessons_kernels.rms_without_weight, "weight is missing"),
            (lessons_kernels.rms_over_block, "only N are real"),
            (lessons_kernels.rms_without_eps, "eps is missing"),
        ],
        "16.3": [
            (lessons_kernels.max_from_zero, "you find 0"),
            (lessons_kernels.max_of_first_block, "only the first block"),
            (lessons_kernels.max_of_whole_blocks, "partial block"),
        ],
    }
