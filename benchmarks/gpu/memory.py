"""The most memory that something takes besides its inputs, by sequence length: nothing of ours grows with T²."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import TIME_IS_UP, Bench
from benchmarks.gpu.decoding import TINY
from benchmarks.gpu.training import Step, losses, without_dropout
from llmfast import GPTConfig, ops, use_backend
from llmfast.benchmarking.comparison import LeftOut, explained
from llmfast.benchmarking.records import Record


def run(bench: Bench) -> None:
    for T in bench.pick((1024, 2048, 4096, 8192, 16384), (1024, 4096, 16384), (16,)):
        attention(bench, T)
        loss(bench, T)
    config = without_dropout(bench.pick(GPTConfig.preset("gpt2"), GPTConfig.preset("gpt2"), TINY))
    for batch in bench.pick((1, 8, 32), (8,), (1,)):
        for backend in ("torch eager", "triton"):
            training(bench, config, batch, backend)


def attention(bench: Bench, T: int) -> None:
    """Forward and backward of 12 heads of 64."""

    def one(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        q, k, v = (bench.randn(1, *bench.pick((12, T, 64), (12, T, 64), (2, T, 16))).requires_grad_() for _ in range(3))
        return lambda: torch.autograd.grad(function(q, k, v).sum(), (q, k, v))

    def sdpa(kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return function

    def triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with use_backend("triton"):
            return ops.causal_attention(q, k, v)

    for name, function in {
        "sdpa math": sdpa(SDPBackend.MATH),
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "triton": triton,
    }.items():
        note(bench, "causal_attention forward and backward", name, {"tokens": T}, lambda f=function: one(f))


def loss(bench: Bench, T: int) -> None:
    """Forward and backward of the head and the loss on T rows."""
    K, V = bench.pick((768, 50257), (768, 50257), (16, 40))

    def torch_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def triton(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with use_backend("triton"):
            return ops.linear_cross_entropy(hidden, weight, targets)

    def one(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        hidden, weight = bench.randn(T, K).requires_grad_(), bench.randn(V, K, scale=K**-0.5).requires_grad_()
        targets = torch.randint(V, (T,), device=bench.device)
        return lambda: torch.autograd.grad(function(hidden, weight, targets), (hidden, weight))

    for name, function in {"torch eager": torch_own, "triton": triton}.items():
        note(
            bench, "linear_cross_entropy forward and backward", name, {"tokens": T}, lambda f=function: one(f)
        )  # fmt: skip


def training(bench: Bench, config: GPTConfig, batch: int, backend: str) -> None:
    """A whole step, the weights and AdamW's state included."""
    T = bench.pick(1024, 1024, 8)

    def make() -> Callable[[], object]:
        model, function = losses(bench, config)[backend]()
        text = torch.randint(config.vocab_size, (batch, T + 1), device=bench.device)
        return Step(bench, model, function, text)

    note(bench, "training step", backend, {"batch": batch, "tokens": T}, make, inputs_count=True)


def note(
    bench: Bench, name: str, backend: str, sizes: dict[str, int], make: Callable[[], Callable[[], object]],
    inputs_count: bool = False,
) -> None:  # fmt: skip
    """Records the peak of what `make()` returns, above what its inputs take."""
    found: dict[str, object]
    try:
        if time.monotonic() > bench.deadline:
            raise LeftOut(TIME_IS_UP)
        before = torch.cuda.memory_allocated() if bench.on_gpu else 0
        call = make()
        if bench.on_gpu and not inputs_count:
            before = torch.cuda.memory_allocated()
        call()
        if bench.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            found = {"bytes": torch.cuda.max_memory_allocated() - before}
        else:
            found = {"problem": "memory is counted on a GPU"}
        del call
    except Exception as error:  # out of memory is a result too
        found = {"problem": explained(error)[:200]}
    bench.records.append(Record("memory", name, backend, bench.precision, bench.device, sizes, **found))  # type: ignore
    bench.save(bench)
    if bench.on_gpu:
        torch.cuda.empty_cache()
