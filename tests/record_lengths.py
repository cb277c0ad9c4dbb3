"""Which kernels further sequence lengths and batch sizes would compile; no test by itself.

    python tests/record_lengths.py

Prints one JSON line: for each op, the names of the kernels that 50 lengths need beyond those of the first. Runs in a
process of its own, since TRITON_INTERPRET must not be set. Nothing is compiled: launches stop where they would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from llmfast.kernels import (
    causal_attention,
    gated_linear,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary,
)
from llmfast.kernels.aot.chips import CHIPS
from llmfast.kernels.aot.recorder import record

LENGTHS = range(1030, 1030 + 50 * 37, 37)
H, D = 12, 64
DTYPE = torch.bfloat16


def attention(batch: int, T: int) -> None:
    q, k, v = torch.empty(batch, T, 3, H, D, dtype=DTYPE).permute(2, 0, 3, 1, 4).unbind(0)
    out, lse = causal_attention.causal_attention(q, k, v, 0.125, 0.0, None, None, 0, True)
    causal_attention.causal_attention_backward(out, q, k, v, out, lse, 0.125, 0.0, None, None, 0, True)


def attention_with_a_window_dropout_and_grouped_heads(batch: int, T: int) -> None:
    q, k = torch.empty(batch, H, T, D, dtype=DTYPE), torch.empty(batch, 4, T + 3, D, dtype=DTYPE)
    options = (0.125, 0.1, torch.zeros(1, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64), 300, True)
    out, lse = causal_attention.causal_attention(q, k, k, *options)
    causal_attention.causal_attention_backward(out, q, k, k, out, lse, *options)


def decoding_with_a_growing_cache(batch: int, T: int) -> None:
    q, cache = torch.empty(batch, H, 1, D, dtype=DTYPE), torch.empty(batch, H, T, D, dtype=DTYPE)
    causal_attention.causal_attention(q, cache, cache, 0.125, 0.0, None, torch.zeros(batch, dtype=torch.int64), 0, True)


def a_part_of_a_cache(batch: int, T: int) -> None:
    q, cache = torch.empty(batch, H, 5, D, dtype=DTYPE), torch.empty(batch, H, 4096, D, dtype=DTYPE)
    causal_attention.causal_attention(q, cache[:, :, :T], cache[:, :, :T], 0.125, 0.0, None, None, 0, True)


def normalisation(batch: int, T: int) -> None:
    x, weight = torch.empty(batch, T, H * D, dtype=DTYPE), torch.empty(H * D, dtype=DTYPE)
    y, mean, rstd = layer_norm.layer_norm(x, weight, weight, 1e-5)
    layer_norm.layer_norm_backward(y, x, weight, mean, rstd)
    y, total, mean, rstd = layer_norm.add_layer_norm(x, x, weight, weight, 1e-5)
    layer_norm.add_layer_norm_backward(y, y, total, weight, mean, rstd)


def activation(batch: int, T: int) -> None:
    x = torch.empty(batch, T, H * D + 1, dtype=DTYPE)
    gelu.gelu_backward(gelu.gelu(x, "tanh"), x, "tanh")


def what_a_llama_adds(batch: int, T: int) -> None:
    x, weight = torch.empty(batch, T, H * D, dtype=DTYPE), torch.empty(H * D, dtype=DTYPE)
    y, total, rstd = rms_norm.add_rms_norm(x, x, weight, 1e-6)
    rms_norm.add_rms_norm_backward(y, y, total, weight, rstd)
    q, angles = x.view(batch, T, H, D).transpose(1, 2), torch.empty(1, T, D // 2)
    rotary.rotary_backward(rotary.rotary(q, angles, angles, False), angles, angles, False)
    causal_attention.causal_attention(q, q, q, 0.125, 0.0, None, None, 0, False)


def gated_product(batch: int, T: int) -> None:
    x, weight = torch.empty(batch, T, H * D, dtype=DTYPE), torch.empty(2 * H * D, H * D, dtype=DTYPE)
    y, gate, up = gated_linear.gated_linear(x, weight, weight, None, None, "silu", True)
    needed = (True, True, True, False, False)
    gated_linear.gated_linear_backward(y, x, weight, weight, gate, up, "silu", *needed)


def linear_layer(batch: int, T: int) -> None:
    x, weight = torch.empty(batch, T, H * D, dtype=DTYPE), torch.empty(4 * H * D, H * D, dtype=DTYPE)
    y, before = linear.linear(x, weight, torch.empty(4 * H * D, dtype=DTYPE), "gelu_tanh", True)
    linear.linear_backward(y, x, weight, before, "gelu_tanh", True, True, True)


def head_and_loss(batch: int, T: int) -> None:
    hidden, weight = torch.empty(batch, T, H * D, dtype=DTYPE), torch.empty(2000, H * D, dtype=DTYPE)
    targets = torch.empty(batch, T, dtype=torch.int64)
    loss, lse = linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, -100)
    linear_cross_entropy.linear_cross_entropy_backward(loss, hidden, weight, targets, lse, -100)


def kernels(op: Callable[[int, int], None], sizes: list[tuple[int, int]]) -> dict[str, str]:
    """The kernels of some calls: what decides their code -> their names."""
    calls = (("bfloat16", "", lambda batch=batch, T=T: op(batch, T)) for batch, T in sizes)
    return {found.fingerprint: found.name for found in record(CHIPS["sm_90"], calls)}


def main() -> None:
    report = {}
    for op in (
        attention, attention_with_a_window_dropout_and_grouped_heads, decoding_with_a_growing_cache, a_part_of_a_cache,
        normalisation, activation, what_a_llama_adds, gated_product, linear_layer, head_and_loss,
    ):  # fmt: skip
        first = kernels(op, [(2, LENGTHS[0])])
        rest = kernels(op, [(batch, T) for T in LENGTHS for batch in (1, 2, 7)])
        anything = kernels(op, [(batch, T) for T in (2, 3, 16, 31, 40, 64, 100, 257, 512) for batch in (1, 2, 7)])
        report[op.__name__] = {
            "first": len(first),
            "further": sorted(rest[key] for key in rest.keys() - first.keys()),
            "for_short_ones": sorted(anything[key] for key in anything.keys() - first.keys()),
        }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
