"""Launches the Triton kernels of a decode step on tensors without values; no test by itself.

    python tests/record_decode_step.py

On the meta device, whoever looks at a value fails: so a launch that gets through depends on sizes alone, and a CUDA
graph can record it. Prints one JSON line: the kernels of a step of 16 sequences, and those that other batch sizes need
beyond them. Runs in a process of its own, since TRITON_INTERPRET must not be set. Nothing is compiled.
"""

from __future__ import annotations

import json
import sys

import torch

from llmfast.kernels import causal_attention, layer_norm, linear, quantized_linear
from llmfast.kernels.aot.chips import CHIPS
from llmfast.kernels.aot.recorder import record

DTYPE = torch.bfloat16
H, D = 12, 64
C = H * D


def step(batch: int) -> None:
    """The operations of a block, with weights as floats, in 8 and in 4 bits."""
    with torch.device("meta"):
        q, cache = torch.empty(batch, H, 1, D, dtype=DTYPE), torch.empty(batch, H, 1024, D, dtype=DTYPE)
        lengths = torch.empty(batch, dtype=torch.int64)
        causal_attention.causal_attention(q, cache, cache, 0.125, 0.0, None, lengths, 0, True)
        x, weight = torch.empty(batch, C, dtype=DTYPE), torch.empty(C, dtype=DTYPE)
        layer_norm.layer_norm(x, weight, weight, 1e-5)
        layer_norm.add_layer_norm(x, x, weight, weight, 1e-5)
        for N, K in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C)):
            x, bias = torch.empty(batch, K, dtype=DTYPE), torch.empty(N, dtype=DTYPE)
            activation = "gelu_tanh" if N == 4 * C else ""
            linear.linear(x, torch.empty(N, K, dtype=DTYPE), bias, activation, False)
            int8 = torch.empty(N, K, dtype=torch.int8), torch.empty(N)
            int4 = torch.empty(N, K // 2, dtype=torch.uint8), torch.empty(N, K // 32, dtype=DTYPE)
            for values, scale in (int8, int4):
                quantized_linear.quantized_linear(x, values, scale, bias, activation)


def main() -> None:
    def recorded(*batches: int) -> dict[str, str]:
        calls = (("bfloat16", str(batch), lambda batch=batch: step(batch)) for batch in batches)
        return {found.fingerprint: found.name for found in record(CHIPS["sm_90"], calls)}

    first = recorded(16)
    further = recorded(*range(1, 16))
    report = {
        "kernels": sorted(set(first.values())),
        "further": [name for fingerprint, name in further.items() if fingerprint not in first],
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
