"""What a step costs and what the machine could do: the share of its peak that training reaches."""

from __future__ import annotations

import time

import torch

from llmfast.backends import cpp
from llmfast.models import ENDS, FLOATS, ModelConfig

# Dense bfloat16 / float16 peaks of the makers' data sheets, in FLOP/s; the first name that is part of the device's.
DATA_SHEETS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}
SECONDS = 0.02  # of measuring


def flops_per_token(config: ModelConfig, context: int) -> float:
    """Floating-point operations of forward and backward for a token: 6 N + 12 L C T (Chowdhery et al., 2022, app. B).

    N are the weights that a token is multiplied with: all but the embeddings, and the head, tied or not. What is
    computed twice to save memory does not count.
    """
    parameters = config.parameters()
    within = sum(p.size for p in parameters if p.role not in ENDS and p.role != "position_embedding")
    head = config.vocab_size * config.width
    return 6.0 * (within + head) + 12.0 * config.blocks * config.heads * config.head_dim * context


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The arithmetic that `device` can do in "fp32", "bf16" or "fp16", in FLOP/s, and where the figure is from.

    A known GPU's is its data sheet's, as "model FLOPs utilisation" has it; else it is measured for a few milliseconds.
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for part, peak in DATA_SHEETS.items():
            if part in name:
                return peak, f"the data sheet of {part}"
    if device.type == "cpu" and precision != "fp16" and cpp.why_not("linear", device, torch.float32) is None:
        measured = _arithmetic(precision) or _arithmetic("fp32")
        if measured:
            return measured, "measured arithmetic"
    return _product(device, precision), "a measured matrix product"


def _arithmetic(kind: str) -> float:
    """The C++ kernels' own loop of multiplications and additions; 0 where there is no instruction for the format.

    The best of some short ones: on a busy machine others' time would pass for ours.
    """
    tasks, rounds, took, best = 8 * torch.get_num_threads(), 1000, 0.0, 0.0
    while took < SECONDS:
        rounds *= 2
        start = time.perf_counter()
        if torch.ops.llmfast.limit_arithmetic(kind, 1, rounds) == 0:  # a single task stays on this thread
            return 0.0
        took = 8 * (time.perf_counter() - start)
    for _ in range(5):
        start = time.perf_counter()
        done = torch.ops.llmfast.limit_arithmetic(kind, tasks, rounds)
        best = max(best, done / (time.perf_counter() - start))
    return best


def _product(device: torch.device, precision: str) -> float:
    size = 4096 if device.type == "cuda" else 512
    dtype = FLOATS[precision]
    a = torch.ones(size, size, device=device, dtype=dtype)
    repeats, took = 1, 0.0
    while took < SECONDS:
        repeats *= 2
        start = time.perf_counter()
        for _ in range(repeats):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - start
    return repeats * 2 * size**3 / took
