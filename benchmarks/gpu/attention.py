"""Causal attention, forward and backward, at head dims 64 and 128 and lengths 512 to 16k.

As in FlashAttention's benchmarks every length has 16k tokens in all and a width of 2048. Queries, keys and values are
views of one projection, as a model makes them. Operations: 4 T² D a head forward, half of them masked away; backward
is 2.5 times forward, which makes the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import COMPILED, Bench, Call, gradients
from llmfast import ops, use_backend
from llmfast.benchmarking.comparison import Work

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WIDTH = 2048
LARGEST_SCORES = 4 << 30  # bytes in float32 of what keeps the whole matrix of scores
COMPILED_AT = (64, 1024)  # head dim and length at which the formula is compiled, which takes longer than all the rest


def run(bench: Bench) -> None:
    tokens = bench.pick(16384, 16384, 16)
    lengths = bench.pick((512, 1024, 2048, 4096, 8192, 16384), (1024, 4096, 16384), (16,))
    for head_dim in bench.pick((64, 128), (64, 128), (16,)):
        heads = bench.pick(WIDTH // head_dim, WIDTH // head_dim, 2)
        for T in lengths:
            for backward in (False, True):
                one(bench, tokens // T, heads, T, head_dim, backward)


def one(bench: Bench, B: int, H: int, T: int, D: int, backward: bool) -> None:
    qkv = bench.randn(B, T, 3, H, D)
    q, k, v = (t.detach().requires_grad_(backward) for t in qkv.permute(2, 0, 3, 1, 4).unbind(0))

    def ready(call: Call) -> Call:
        return gradients(call, (q, k, v)) if backward else call

    def sdpa(kind: SDPBackend) -> Callable[[], Call]:
        def call() -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return lambda: ready(call)

    def compiled() -> Call:
        function = bench.compiled(formula)
        return ready(lambda: function(q, k, v))

    def ours() -> Tensor:
        with use_backend("triton"):
            return ops.causal_attention(q, k, v)

    makers: dict[str, Callable[[], Call]] = {name: sdpa(kind) for name, kind in SDPA.items()}
    makers["triton"] = lambda: ready(ours)
    if B * H * T * T * 4 <= LARGEST_SCORES:
        makers["sdpa math"] = sdpa(SDPBackend.MATH)
        if (D, T) == COMPILED_AT or not bench.on_gpu:
            makers[COMPILED] = compiled
    operations = 4 * B * H * T * T * D / 2 * (2.5 if backward else 1)
    size = q.nbytes
    work = Work(
        read=(8 if backward else 3) * size, written=(3 if backward else 1) * size, operations=operations,
        arithmetic=bench.precision,
    )  # fmt: skip
    sizes = {"batch": B, "heads": H, "tokens": T, "head_dim": D}
    name = f"causal_attention {'backward' if backward else 'forward'}"
    bench.contest(name, sizes, makers, work, ("sdpa flash", "sdpa cudnn", COMPILED))


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it is written down, for torch.compile to make of it what it can."""
    T = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[3])
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return torch.softmax(scores.masked_fill(~visible, -math.inf).float(), dim=-1).to(v.dtype) @ v
