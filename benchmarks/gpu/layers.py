"""The other operations of a GPT at its sizes: Triton against torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import COMPILED, Bench, Call, Result, gradients
from llmfast import ops, use_backend
from llmfast.benchmarking.comparison import Work
from llmfast.quantization.formats import QuantizedWeight, quantize

Function = Callable[..., Result]
EAGER = "torch eager"


def run(bench: Bench) -> None:
    """What targets hang on comes first."""
    rows = bench.pick(16384, 16384, 4)
    for width in bench.pick((768, 4096, 8192), (768, 4096), (24,)):
        layer_norm(bench, rows, width)
    linear_gelu(bench, rows, *bench.pick((768, 3072), (768, 3072), (16, 24)))
    cross_entropy(bench, *bench.pick((8192, 768, 50257), (8192, 768, 50257), (6, 16, 40)))
    for K, N in bench.pick(((768, 3072), (3072, 768), (768, 50257)), ((768, 3072), (768, 50257)), ((32, 24),)):
        quantized_linear(bench, K, N, bench.pick((1, 8, 64, 2048), (1, 64), (2,)))
    for batch in bench.pick((1, 8, 64), (1, 64), (2,)):
        for capacity in bench.pick((1024, 8192), (1024,), (32,)):
            decode_attention(bench, batch, capacity)
    for width in bench.pick((768, 1600), (768,), (24,)):
        add_layer_norm(bench, rows, width)
    gelu(bench, rows, bench.pick(3072, 3072, 24))
    for width in bench.pick((1024, 1600), (), ()):
        layer_norm(bench, rows, width)


def differentiable(
    bench: Bench, name: str, sizes: dict[str, int], ours: Function, torch_own: Function, inputs: tuple[Tensor, ...],
    forward: Work, backward: Work,
) -> None:  # fmt: skip
    """A contest forward, and one backward."""
    leaves = tuple(t.requires_grad_() for t in inputs)

    def triton() -> Result:
        with use_backend("triton"):
            return ours(*leaves)

    def compiled() -> Call:
        function = bench.compiled(torch_own)
        return lambda: function(*leaves)

    plain: dict[str, Callable[[], Call]] = {
        EAGER: lambda: lambda: torch_own(*leaves),
        COMPILED: compiled,
        "triton": lambda: triton,
    }

    def without_graph(make: Callable[[], Call]) -> Callable[[], Call]:
        def made() -> Call:
            with torch.no_grad():
                call = make()

            def run_it() -> Result:
                with torch.no_grad():
                    return call()

            return run_it

        return made

    bench.contest(f"{name} forward", sizes, {n: without_graph(m) for n, m in plain.items()}, forward, (COMPILED, EAGER))
    makers = {n: (lambda make=make: gradients(make(), leaves)) for n, make in plain.items()}
    bench.contest(f"{name} backward", sizes, makers, backward, (COMPILED, EAGER))


def layer_norm(bench: Bench, rows: int, N: int) -> None:
    x, weight, bias = bench.randn(rows, N), bench.randn(N), bench.randn(N)
    differentiable(
        bench, "layer_norm", {"rows": rows, "width": N}, ops.layer_norm,
        lambda x, w, b: F.layer_norm(x, w.shape, w, b), (x, weight, bias),
        Work(read=x.nbytes, written=x.nbytes), Work(read=2 * x.nbytes, written=x.nbytes),
    )  # fmt: skip


def add_layer_norm(bench: Bench, rows: int, N: int) -> None:
    def torch_own(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias), total

    x, residual, weight, bias = bench.randn(rows, N), bench.randn(rows, N), bench.randn(N), bench.randn(N)
    differentiable(
        bench, "add_layer_norm", {"rows": rows, "width": N}, ops.add_layer_norm, torch_own,
        (x, residual, weight, bias), Work(read=2 * x.nbytes, written=2 * x.nbytes),
        Work(read=3 * x.nbytes, written=x.nbytes),
    )  # fmt: skip


def gelu(bench: Bench, rows: int, N: int) -> None:
    x = bench.randn(rows, N)
    differentiable(
        bench, "gelu", {"rows": rows, "width": N}, ops.gelu, lambda x: F.gelu(x, approximate="tanh"), (x,),
        Work(read=x.nbytes, written=x.nbytes), Work(read=2 * x.nbytes, written=x.nbytes),
    )  # fmt: skip


def linear_gelu(bench: Bench, rows: int, K: int, N: int) -> None:
    x, weight, bias = bench.randn(rows, K), bench.randn(N, K, scale=K**-0.5), bench.randn(N)
    operations = 2.0 * rows * K * N
    differentiable(
        bench, "linear with gelu", {"rows": rows, "K": K, "N": N},
        lambda x, w, b: ops.linear(x, w, b, "gelu_tanh"),
        lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), (x, weight, bias),
        Work(operations=operations, arithmetic=bench.precision),
        Work(operations=2 * operations, arithmetic=bench.precision),
    )  # fmt: skip


def cross_entropy(bench: Bench, rows: int, K: int, V: int) -> None:
    hidden, weight = bench.randn(rows, K), bench.randn(V, K, scale=K**-0.5)
    targets = torch.randint(V, (rows,), device=bench.device)
    operations = 2.0 * rows * K * V
    differentiable(
        bench, "linear_cross_entropy", {"rows": rows, "K": K, "V": V},
        lambda h, w: ops.linear_cross_entropy(h, w, targets),
        lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets), (hidden, weight),
        Work(operations=operations, arithmetic=bench.precision),
        Work(operations=2 * operations, arithmetic=bench.precision),
    )  # fmt: skip


def decode_attention(bench: Bench, B: int, capacity: int) -> None:
    """One query a sequence against a cache, whose sequences fill it to between a half and all."""
    H, D = bench.pick((12, 64), (12, 64), (2, 16))
    q, k, v = bench.randn(B, H, 1, D), bench.randn(B, H, capacity, D), bench.randn(B, H, capacity, D)
    lengths = torch.linspace(capacity, capacity // 2, B, device=bench.device).long()
    mask = (torch.arange(capacity, device=bench.device) < lengths[:, None])[:, None, None]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def compiled() -> Call:
        function = bench.compiled(sdpa)
        return lambda: function(q, k, v)

    def triton() -> Tensor:
        with use_backend("triton"):
            return ops.causal_attention(q, k, v, kv_lengths=lengths)

    makers: dict[str, Callable[[], Call]] = {
        "sdpa with a mask": lambda: lambda: sdpa(q, k, v),
        "triton": lambda: triton,
    }
    if capacity <= 1024:
        makers[COMPILED] = compiled
    read = 2 * k.nbytes * float(lengths.sum()) / (B * capacity)
    sizes = {"batch": B, "heads": H, "capacity": capacity, "head_dim": D}
    bench.contest("decode attention", sizes, makers, Work(read=read), ("sdpa with a mask", COMPILED))


def quantized_linear(bench: Bench, K: int, N: int, batches: tuple[int, ...]) -> None:
    """Weights of 8 and 4 bits against torch's product on floats: reading fewer bytes is what they are for."""
    weight, bias = bench.randn(N, K, scale=K**-0.5), bench.randn(N)
    for form in ("int8", "int4"):
        stored = quantize(weight, form)
        floats = stored.dequantize(bench.dtype)
        for rows in batches:
            x = bench.randn(rows, K)

            def triton(stored: QuantizedWeight = stored, x: Tensor = x) -> Tensor:
                with use_backend("triton"):
                    return ops.quantized_linear(x, stored.values, stored.scale, bias)

            makers: dict[str, Callable[[], Call]] = {
                "torch on floats": lambda floats=floats, x=x: lambda: F.linear(x, floats, bias),
                "triton": lambda triton=triton: triton,
            }
            sizes = {"rows": rows, "K": K, "N": N}
            work = Work(read=stored.nbytes + x.nbytes, operations=2.0 * rows * K * N, arithmetic=bench.precision)
            bench.contest("quantized_linear", sizes, makers, work, ("torch on floats",), precision=form)
