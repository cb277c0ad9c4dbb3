"""The Triton kernels of `kernels/`: on a GPU, or anywhere in Triton's interpreter (`TRITON_INTERPRET=1`).

They are the operators `torch.ops.llmfast_triton.*`, defined here. Where Triton is not installed this module still
imports, and `why_not` says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from llmfast.backends.quantized_gradient import differentiable
from llmfast.backends.registered import SCHEMAS, contract_functions, register

# For inference: it has no gradients, so it stands beside the operators that have them.
QUANTIZED_LINEAR = (
    "(Tensor x, Tensor values, Tensor scale, Tensor? bias, str activation, *, Tensor? minimum=None, "
    "Tensor? scale_code=None, Tensor? minimum_code=None) -> Tensor"
)

# Which file of `kernels/` holds an operator; most files bear the name of their op.
KERNEL_FILE = {
    "bidirectional_attention": "causal_attention",
    "add_layer_norm": "layer_norm",
    "add_rms_norm": "rms_norm",
}

MAX_HEAD_DIM = 256
TRANSFORMABLE = False  # by torch.func or forward-mode differentiation
CAPTURABLE = True  # in a CUDA graph
# Triton reads this variable when a kernel is defined, so it is fixed from the first import on.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Asked once, outside of anything that torch.compile traces.
BFLOAT16_GPU = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _kernels(op: str) -> Any:
    """The file of `kernels/` that holds an op."""
    return importlib.import_module(f"llmfast.kernels.{KERNEL_FILE.get(op, op)}")


def _define_operators() -> str | None:
    """Defines the operators; the reason where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'llmfast-kernels[triton]'"
    try:
        for op, schema in (*SCHEMAS.items(), ("quantized_linear", QUANTIZED_LINEAR)):
            module = _kernels(op.removesuffix("_backward"))
            torch.library.define(f"llmfast_triton::{op}", schema)
            # One implementation for every device: CUDA and ROCm tensors run for real, CPU tensors in the interpreter.
            torch.library.impl(f"llmfast_triton::{op}", "CompositeExplicitAutograd")(getattr(module, op))
    except Exception as error:  # a broken Triton must not keep the package from importing
        return f"triton does not import: {type(error).__name__}: {error}"
    register("llmfast_triton")
    torch.library.register_fake(
        "llmfast_triton::quantized_linear",
        lambda x, values, *_, **__: x.new_empty((*x.shape[:-1], values.shape[0])),
    )
    return None


_missing = _define_operators()


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on this device and dtype, or None."""
    if _missing is not None:
        return _missing
    if device.type == "cpu" and not INTERPRETED:
        return "Triton kernels need a GPU, or TRITON_INTERPRET=1 to run in the interpreter"
    if device.type not in ("cpu", "cuda"):
        return f"the Triton kernels do not run on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "the Triton kernels know float32, bfloat16 and float16"
    if device.type == "cuda" and dtype == torch.bfloat16 and not BFLOAT16_GPU:
        return "this GPU has no bfloat16 arithmetic (compute capability below 8.0)"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16 matrices"
    return None


def describe(op: str, *args: Any, **kwargs: Any) -> str:
    """The kernel and the configuration that a call would get, for `llmfast.explain`."""
    configuration = _kernels(op).describe(*args, **kwargs)
    return f"{configuration}, interpreted" if INTERPRETED else configuration


globals().update(contract_functions("llmfast_triton"))


def quantized_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **parts: Tensor,
) -> Tensor:
    return differentiable(_quantized_linear, x, {"values": values, "scale": scale} | parts, bias, activation)


def _quantized_linear(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None, **parts: Tensor
) -> Tensor:
    return torch.ops.llmfast_triton.quantized_linear(x, values, scale, bias, activation or "", **parts)
