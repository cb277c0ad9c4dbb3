"""How long Python takes to launch each operation: what a model that is run step by step waits for on a fast GPU.

Calls follow each other without waiting for the GPU, at sizes so small that it is never the slower of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench, Call, gradients
from benchmarks.gpu.layers import EAGER
from llmfast import ops, use_backend
from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work
from llmfast.benchmarking.timing import Effort
from llmfast.quantization.formats import quantize

CALLS = 100
EFFORT = Effort(seconds=0.3, rounds=(5, 20), turn=0.0)


def run(bench: Bench) -> None:
    """Forward and backward, at a model of 128 channels."""
    B, H, T, D = bench.pick((1, 2, 64, 64), (1, 2, 64, 64), (1, 2, 4, 16))
    C, hidden, V = H * D, 2 * H * D, 3 * H * D
    rows = B * T
    q, k, v = bench.randn(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    x, residual, weight, bias = bench.randn(rows, C), bench.randn(rows, C), bench.randn(C), bench.randn(C)
    matrix, its_bias = bench.randn(hidden, C), bench.randn(hidden)
    targets = torch.randint(V, (rows,), device=bench.device)
    one, keys = bench.randn(B, H, 1, D), bench.randn(B, H, 4 * T, D)
    lengths = torch.full((B,), 2 * T, device=bench.device)
    mask = torch.ones(B, 1, 1, 4 * T, dtype=torch.bool, device=bench.device)
    stored = quantize(matrix, "int8")
    attention = F.scaled_dot_product_attention

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, w.shape, w, b)

    def add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x + r, w, b), x + r

    both = (
        ("causal_attention", ops.causal_attention, lambda q, k, v: attention(q, k, v, is_causal=True), (q, k, v)),
        ("layer_norm", ops.layer_norm, norm, (x, weight, bias)),
        ("add_layer_norm", ops.add_layer_norm, add_norm, (x, residual, weight, bias)),
        ("linear with gelu", lambda x, w, b: ops.linear(x, w, b, "gelu_tanh"),
         lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), (x, matrix, its_bias)),
        ("linear_cross_entropy", lambda h, w: ops.linear_cross_entropy(h, w, targets),
         lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets), (x, bench.randn(V, C))),
    )  # fmt: skip
    alone = (
        ("decode attention", lambda q, k: ops.causal_attention(q, k, k, kv_lengths=lengths),
         lambda q, k: attention(q, k, k, attn_mask=mask), (one, keys)),
        ("quantized_linear", lambda x: ops.quantized_linear(x, stored.values, stored.scale),
         lambda x: F.linear(x, matrix), (x[:1],)),
    )  # fmt: skip
    for name, ours, torch_own, inputs in (*both, *alone):
        launching(bench, f"{name} forward", call(ours, inputs), call(torch_own, inputs))
    for name, ours, torch_own, inputs in both:
        leaves = tuple(t.detach().requires_grad_() for t in inputs)
        makers = (lambda f=f, i=leaves: gradients(call(f, i)(), i) for f in (ours, torch_own))
        launching(bench, f"{name} backward", *makers)


def call(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], Call]:
    return lambda: lambda: function(*inputs)  # type: ignore[return-value]


def launching(bench: Bench, name: str, ours: Callable[[], Call], torch_own: Callable[[], Call]) -> None:
    """Seconds of a call without waiting for its result, the mean of many."""

    def ready(entry: Entry) -> Contestant:
        with use_backend("triton"):
            once = ours() if entry.backend == "triton" else torch_own()
            once()

        def turn() -> float:
            with use_backend("triton"):
                start = time.perf_counter()
                for _ in range(CALLS if bench.on_gpu else 1):
                    once()
                seconds = time.perf_counter() - start
            if bench.on_gpu:
                torch.cuda.synchronize()
            return seconds / (CALLS if bench.on_gpu else 1)

        return Contestant(turn)

    entries = tuple(Entry(backend, bench.precision) for backend in ("triton", EAGER))
    comparison = Comparison(
        "launches", f"launching {name}", bench.device, entries, lambda: ready, lambda entry: Work(), {}, None, (EAGER,)
    )
    bench.compare(comparison, EFFORT if bench.on_gpu else None)
