"""Compiles the Triton kernels for GPUs that are not here, through their own launch functions; no test by itself.

    python tests/compile_triton_kernels.py

A stand-in driver names the target, and every launch stops after compiling. What comes out, as one JSON line, is each
compiled kernel's registers and stack (read off the machine code by the cuobjdump that triton carries), and how many
kernels 40 further sequence lengths made. Runs in a process of its own, since TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llmfast.kernels import causal_attention, gelu, layer_norm, linear, linear_cross_entropy

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class StandInDriver:
    """What a launch asks of a GPU before it runs anything."""

    target = GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


compiled: dict[str, object] = {}  # by the hash of what was compiled
run = JITFunction.run


def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled[f"{self.fn.__name__} sm_{StandInDriver.target.arch} {kernel.hash}"] = kernel
    return kernel


def resources(kernel: object) -> tuple[int, int]:
    """Registers a thread, and bytes of stack, which is where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])  # type: ignore[attr-defined]
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK"))  # type: ignore


def launch_everything(T: int, dtype: torch.dtype, heads: int = 12, head_dim: int = 64) -> None:
    """One forward and backward of every op at GPT-2's shapes."""
    width = heads * head_dim
    q, k, v = torch.empty(1, T, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    out, lse = causal_attention.causal_attention(q, k, v, 0.125, 0.0, None, None)
    causal_attention.causal_attention_backward(out, q, k, v, out, lse, 0.125, 0.0, None, None)
    causal_attention.causal_attention(q[:, :, :1], k, v, 0.125, 0.0, None, torch.tensor([T]))
    x, weight = torch.empty(T, width, dtype=dtype), torch.empty(width, dtype=dtype)
    y, mean, rstd = layer_norm.layer_norm(x, weight, weight, 1e-5)
    layer_norm.layer_norm_backward(y, x, weight, mean, rstd)
    y, total, mean, rstd = layer_norm.add_layer_norm(x, x, weight, weight, 1e-5)
    layer_norm.add_layer_norm_backward(y, y, total, weight, mean, rstd)
    gelu.gelu_backward(gelu.gelu(x, "tanh"), x, "tanh")
    wide, bias = torch.empty(4 * width, width, dtype=dtype), torch.empty(4 * width, dtype=dtype)
    y, preactivation = linear.linear(x, wide, bias, "gelu_tanh", True)
    linear.linear_backward(y, x, wide, preactivation, "gelu_tanh", True, True, True)
    targets = torch.zeros(T, dtype=torch.int64)
    loss, lse = linear_cross_entropy.linear_cross_entropy(x, wide, targets, -100)
    linear_cross_entropy.linear_cross_entropy_backward(loss, x, wide, targets, lse, -100)


def main() -> None:
    driver.set_active(StandInDriver())
    JITFunction.run = compile_only
    report: dict[str, object] = {"kernels": []}
    for arch in (80, 90):
        StandInDriver.target = GPUTarget("cuda", arch, 32)
        launch_everything(1024, torch.bfloat16)
    for name, kernel in compiled.items():
        registers, stack = resources(kernel)
        report["kernels"].append({"name": name.rsplit(" ", 1)[0], "registers": registers, "stack": stack})  # type: ignore
    before = len(compiled)
    for T in range(1030, 1030 + 40 * 37, 37):
        launch_everything(T, torch.bfloat16)
    report["more_for_other_lengths"] = [name.split()[0] for name in list(compiled)[before:]]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
