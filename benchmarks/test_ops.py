"""Causal attention, LayerNorm and GELU at GPT-2's width, by backend and sequence length.

pytest benchmarks --benchmark-only -k ops
"""

from __future__ import annotations

import pytest
import torch
from measuring import DEVICE, measurable

LENGTHS = [128, 512, 1024, 2048]
DTYPES = [torch.float32, torch.bfloat16]
WIDTH, HEADS = 768, 12


def grid(op: str) -> list:
    return [
        pytest.param(T, dtype, backend, id=f"{T}-{str(dtype).removeprefix('torch.')}-{backend}")
        for T in LENGTHS
        for dtype in DTYPES
        for backend in measurable(op, dtype)
    ]


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("T, dtype, backend", grid("causal_attention"))
def test_causal_attention(T, dtype, backend, measure, benchmark):
    benchmark.group = f"causal attention, {str(dtype).removeprefix('torch.')}, T={T}"
    D = WIDTH // HEADS
    q, k, v = tensor(1, T, 3, HEADS, D, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    operations = 2 * HEADS * T * (T + 1) * D  # two products over half of the square
    settings = {"scale": D**-0.5}
    measure(backend, "causal_attention", (q, k, v), settings, bytes_moved=4 * q.nbytes, operations=operations)


@pytest.mark.parametrize("T, dtype, backend", grid("layer_norm"))
def test_layer_norm(T, dtype, backend, measure, benchmark):
    benchmark.group = f"layer norm, {str(dtype).removeprefix('torch.')}, T={T}"
    x = tensor(T, WIDTH, dtype=dtype)
    arguments = (x, tensor(WIDTH, dtype=dtype), tensor(WIDTH, dtype=dtype))
    measure(backend, "layer_norm", arguments, {}, bytes_moved=2 * x.nbytes, operations=8 * x.numel())


@pytest.mark.parametrize("T, dtype, backend", grid("gelu"))
def test_gelu(T, dtype, backend, measure, benchmark):
    benchmark.group = f"gelu, {str(dtype).removeprefix('torch.')}, T={T}"
    x = tensor(T, 4 * WIDTH, dtype=dtype)
    measure(backend, "gelu", (x,), {}, bytes_moved=2 * x.nbytes, operations=20 * x.numel())
