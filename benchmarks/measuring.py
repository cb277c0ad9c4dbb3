"""What the benchmarks share: which backends can be measured here, and the facts kept with every figure."""

from __future__ import annotations

from typing import Any

import torch

import llmfast
from llmfast.backends import cpp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"  # Triton on a CPU is its interpreter, which has no speed worth a figure


def measurable(op: str, dtype: torch.dtype) -> list[str]:
    """The backends that can run `op` here at a speed that means something."""
    names = dict.fromkeys(row.backend for row in llmfast.backends())
    skipped = {"reference"} | ({"triton"} if INTERPRETED else set())
    able = {(r.backend, r.op, r.device, r.dtype) for r in llmfast.backends() if r.available}
    return [n for n in names if n not in skipped and (n, op, DEVICE, str(dtype).removeprefix("torch.")) in able]


def facts() -> dict[str, Any]:
    """The machine and the versions behind a figure."""
    known = {"torch": torch.__version__, "llmfast": llmfast.__version__, "threads": torch.get_num_threads()}
    if DEVICE == "cuda":
        known["device"] = torch.cuda.get_device_name()
    elif cpp.why_not("gelu", torch.device("cpu"), torch.float32) is None:
        known["isa"] = cpp.isa()
    return known
