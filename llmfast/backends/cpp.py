"""The C++ kernels of `csrc/`, for CPUs: one build, several instruction sets, chosen when the extension is loaded.

They are the operators `torch.ops.llmfast.*`, with heads of up to `MAX_HEAD_DIM` channels. Where the extension could not
be built this module still imports, and `why_not` says what was missing.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.backends.quantized_gradient import differentiable
from llmfast.backends.registered import contract_functions, register
from llmfast.quantization.formats import dequantize

MAX_HEAD_DIM = 256
TRANSFORMABLE = False  # by torch.func or forward-mode differentiation
PACKAGE = Path(__file__).parents[1]
DEQUANTIZES = "; the weights are made floats in every call (the native decoder multiplies integers)"
HOW_TO_GET_IT = "install a C++17 compiler (such as g++) and install llmfast-kernels again"


def _load_extension() -> str | None:
    """Loads the operators; the reason where that fails."""
    libraries = [path for path in sorted(PACKAGE.glob("_C*")) if path.suffix in (".so", ".dylib", ".pyd")]
    if not libraries:
        note = PACKAGE / "_C_missing.txt"
        if note.exists():
            return note.read_text(encoding="utf-8").strip()
        return f"the extension was not built; {HOW_TO_GET_IT}"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} does not load ({str(error).splitlines()[0]}); {HOW_TO_GET_IT}"
    try:
        isa()  # a wrong LLMFAST_CPU_ISA shows here
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"the C++ kernels are off: {reason}", stacklevel=2)
        return reason
    register("llmfast")
    return None


def isa() -> str:
    """The instruction set in use: "generic", "avx2", "avx512", … `LLMFAST_CPU_ISA` overrides the choice."""
    return torch.ops.llmfast.cpu_isa()


_missing = _load_extension()


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on this device and dtype, or None."""
    if _missing is not None:
        return _missing
    if device.type != "cpu":
        return "the C++ kernels run on a CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return "the C++ kernels know float32 and bfloat16"
    return None


def describe(op: str, *args: Any, **kwargs: Any) -> str:
    """The configuration a call would get, for `llmfast.explain`."""
    return f"{isa()} kernels, {torch.get_num_threads()} threads" + (DEQUANTIZES if op == "quantized_linear" else "")


_functions = contract_functions("llmfast")
globals().update(_functions)


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
    weight = dequantize({"values": values, "scale": scale} | parts, x.shape[-1])
    return _functions["linear"](x, weight.to(x.dtype), bias, activation)
