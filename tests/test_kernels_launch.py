"""What a launch costs before it reaches the GPU: Python calls, which a clock on a busy machine would not count."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from llmfast.kernels import (
    attention_decoding,
    attention_delta,
    attention_forward,
    attention_key_gradient,
    attention_query_gradient,
    causal_attention,
    gated_linear,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    matmul,
    norm_rows,
    quantized_linear,
    rms_norm,
    rotary,
)

MODULES = (
    attention_decoding, attention_delta, attention_forward, attention_key_gradient, attention_query_gradient,
    gated_linear, gelu, layer_norm, linear, linear_cross_entropy, matmul, norm_rows, quantized_linear, rms_norm, rotary,
)  # fmt: skip


class Launches:
    """Stands in for every kernel, and counts what is asked of it."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        self.count += 1
        return lambda *arguments, **constants: None


@pytest.fixture
def launches(monkeypatch):
    counter = Launches()
    for module in MODULES:
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, counter)
    return counter


def attention(tokens: int, dtype: torch.dtype):
    q = torch.zeros(1, 2, tokens, 64, dtype=dtype)
    k = torch.zeros(1, 2, 64, 64, dtype=dtype)
    return q, k, k


def forward(tokens: int):
    q, k, v = attention(tokens, torch.bfloat16)
    return lambda: causal_attention.causal_attention(q, k, v, 0.1, 0.0, None, None, 0, True)


def backward(dtype: torch.dtype):
    q, k, v = attention(64, dtype)
    lse = torch.zeros(1, 2, 64)
    return lambda: causal_attention.causal_attention_backward(q, q, k, v, q, lse, 0.1, 0.0, None, None, 0, True)


def rows():
    x, weight = torch.zeros(8, 64), torch.zeros(64)
    return lambda: layer_norm.add_layer_norm(x, x, weight, weight, 1e-5)


def rows_of_a_llama():
    x, weight, rstd = torch.zeros(8, 64), torch.zeros(64), torch.zeros(8)
    return lambda: rms_norm.add_rms_norm_backward(x, x, x, weight, rstd)


def turned():
    x, angles = torch.zeros(1, 2, 8, 64), torch.zeros(1, 8, 32)
    return lambda: rotary.rotary(x, angles, angles, False)


def gated():
    x, weight = torch.zeros(8, 64), torch.zeros(32, 64)
    return lambda: gated_linear.gated_linear(x, weight, weight, None, None, "silu", False)


def gated_backward():
    x, weight, y = torch.zeros(8, 64), torch.zeros(32, 64), torch.zeros(8, 32)
    needed = (True, True, True, True, True)
    return lambda: gated_linear.gated_linear_backward(y, x, weight, weight, y, y, "silu", *needed)


def products():
    x, weight = torch.zeros(8, 64), torch.zeros(32, 64)
    y = torch.zeros(8, 32)
    return lambda: linear.linear_backward(y, x, weight, y, "gelu_tanh", True, True, True)


def integers():
    x, values, scale = torch.zeros(1, 64), torch.zeros(32, 64, dtype=torch.int8), torch.zeros(32)
    return lambda: quantized_linear.quantized_linear(x, values, scale, scale, "")


def loss():
    hidden, weight, targets = torch.zeros(8, 64), torch.zeros(40, 64), torch.zeros(8, dtype=torch.int64)
    return lambda: linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, -100)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(forward(64), id="attention"),
        pytest.param(forward(1), id="decoding"),
        pytest.param(backward(torch.bfloat16), id="attention backward"),
        pytest.param(backward(torch.float32), id="attention backward in float32"),
        pytest.param(rows(), id="add_layer_norm"),
        pytest.param(rows_of_a_llama(), id="add_rms_norm backward"),
        pytest.param(turned(), id="rotary"),
        pytest.param(gated(), id="gated_linear"),
        pytest.param(gated_backward(), id="gated_linear backward"),
        pytest.param(products(), id="linear backward"),
        pytest.param(integers(), id="quantized_linear"),
        pytest.param(loss(), id="linear_cross_entropy"),
    ],
)
def test_a_launch_takes_few_calls_of_python(launches, call):
    call()  # what is kept from call to call
    launches.count, calls = 0, 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert launches.count > 0
    assert calls <= 40 + 46 * launches.count, f"{calls} calls for {launches.count} launches"
