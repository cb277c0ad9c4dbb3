"""The operations that the Llama family adds: Triton against torch's own composition, eager and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.layers import differentiable
from llmfast import ops
from llmfast.benchmarking.comparison import Work


def run(bench: Bench) -> None:
    rows = bench.pick(16384, 16384, 4)
    for width in bench.pick((576, 2048, 4096), (2048,), (24,)):
        rms_norm(bench, rows, width)
        add_rms_norm(bench, rows, width)
    rotary(bench, *bench.pick((8, 32, 2048, 64), (8, 32, 2048, 64), (1, 2, 6, 16)))
    gated_linear(bench, rows, *bench.pick((2048, 8192), (2048, 8192), (16, 24)))


def rms_norm(bench: Bench, rows: int, N: int) -> None:
    x, weight = bench.randn(rows, N), bench.randn(N)
    differentiable(
        bench, "rms_norm", {"rows": rows, "width": N}, ops.rms_norm,
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), (x, weight),
        Work(read=x.nbytes, written=x.nbytes), Work(read=2 * x.nbytes, written=x.nbytes),
    )  # fmt: skip


def add_rms_norm(bench: Bench, rows: int, N: int) -> None:
    def torch_own(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, 1e-6), total

    x, residual, weight = bench.randn(rows, N), bench.randn(rows, N), bench.randn(N)
    differentiable(
        bench, "add_rms_norm", {"rows": rows, "width": N}, ops.add_rms_norm, torch_own, (x, residual, weight),
        Work(read=2 * x.nbytes, written=2 * x.nbytes), Work(read=3 * x.nbytes, written=x.nbytes),
    )  # fmt: skip


def rotary(bench: Bench, B: int, H: int, T: int, D: int) -> None:
    angles = torch.rand(1, T, D // 2, device=bench.device) * 6
    cos, sin = angles.cos(), angles.sin()

    def torch_own(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)

    x = bench.randn(B, T, H, D).transpose(1, 2)
    moved = Work(read=x.nbytes, written=x.nbytes)
    sizes = {"batch": B, "heads": H, "tokens": T, "head_dim": D}
    differentiable(bench, "rotary", sizes, lambda x: ops.rotary(x, cos, sin), torch_own, (x,), moved, moved)


def gated_linear(bench: Bench, rows: int, K: int, N: int) -> None:
    x, gate, up = bench.randn(rows, K), bench.randn(N, K, scale=K**-0.5), bench.randn(N, K, scale=K**-0.5)
    operations = 4.0 * rows * K * N
    differentiable(
        bench, "gated_linear", {"rows": rows, "K": K, "N": N}, ops.gated_linear,
        lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), (x, gate, up),
        Work(operations=operations, arithmetic=bench.precision),
        Work(operations=2 * operations, arithmetic=bench.precision),
    )  # fmt: skip
