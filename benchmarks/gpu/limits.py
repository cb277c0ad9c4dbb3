"""What the GPU can do at most, measured: the figures that all others stand beside, in 10^9 a second.

copy   bytes read and written by a copy of 1 GiB        read   bytes read by a sum over 1 GiB
bf16, fp32   operations of a matrix product (a product and a sum are two); fp32 without TF32
exp    exponentials: attention needs one for every 4 D operations
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu.bench import Bench
from llmfast.backends.triton import why_not

ROUNDS = 15
EXP_BLOCK = 1024


@triton.jit(do_not_specialize=["steps"])
def _exp_kernel(out, steps, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(0, steps):
        x = tl.exp2(-x)  # stays between 1/2 and 1
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def run(bench: Bench) -> None:
    found: dict[str, Any] = {"threads": 1}  # as of a CPU's limits: a figure for each number of threads
    source, target = (torch.zeros(bench.pick(1 << 28, 1 << 28, 1 << 18), device=bench.device) for _ in range(2))
    found["copy"] = _rate(bench, lambda: target.copy_(source), 2 * source.nbytes)
    found["read"] = _rate(bench, source.sum, source.nbytes)
    width = bench.pick(8192, 8192, 128)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(width, width, device=bench.device, dtype=dtype) for _ in range(2))
        found[name] = _rate(bench, lambda a=a, b=b: a @ b, 2 * width**3)
    if why_not("gelu", torch.device(bench.device), torch.float32) is None:
        programs, steps = bench.pick(8192, 8192, 2), bench.pick(2048, 2048, 4)
        out = torch.empty(programs * EXP_BLOCK, device=bench.device)
        found["exp"] = _rate(bench, lambda: _exp_kernel[(programs,)](out, steps, BLOCK=EXP_BLOCK), out.numel() * steps)
    bench.limits = found


def _rate(bench: Bench, call: Any, amount: int) -> dict[str, dict[str, float]]:
    turn = bench.turn(call)
    turn()
    rates = [amount / turn() / 1e9 for _ in range(ROUNDS if bench.on_gpu else 1)]
    return {"1": {"median": round(statistics.median(rates), 1), "best": round(max(rates), 1)}}
