"""How much memory a run takes, estimated before it starts and measured while it runs."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from llmfast.backends.pytorch import LOGITS_BYTES, LOGITS_BYTES_ELSEWHERE
from llmfast.models import ModelConfig
from llmfast.training.weights import kinds_of

STATES = {"adamw": 2, "sgd": 1, "muon": 1}  # float32 numbers that an optimizer keeps for a weight
KEPT_BY_A_CHECKPOINT = 2  # the branch and the residual stream that a block is computed again from


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by what they are for."""

    weights: int  # float32, and the rounded copy
    gradients: int
    optimizer: int
    activations: int  # of one part of a batch
    logits: int  # the largest chunk of them

    @property
    def lasting(self) -> int:
        """What is there from the first step to the last."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.lasting + self.activations + self.logits

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "logits")
        return f"{megabytes(self.total)} (" + ", ".join(f"{p} {megabytes(getattr(self, p))}" for p in parts) + ")"


def estimate(
    config: ModelConfig,
    sequences: int,
    context: int,
    optimizer: str,
    dtype: torch.dtype,
    device: torch.device,
    activation_checkpointing: bool = False,
    dropout: bool = False,
    shards: int = 1,
    trained: int | None = None,
    frozen_bytes: int = 0,
    rank: int = 0,
    bottleneck: int = 0,
) -> MemoryEstimate:
    """For `sequences` of `context` tokens computed at once. `shards`: among how many processes the weights, gradients
    and the optimizer's state are divided, one block's weights being whole at a time. `trained`: how many numbers are
    trained, if not all, beside weights of `frozen_bytes` that are not. `rank`: of adapters beside all matrices of
    the blocks. `bottleneck`: the width of those after both halves of each."""
    N, itemsize = config.num_parameters if trained is None else trained, dtype.itemsize
    copied = itemsize if itemsize < 4 else 0
    states = STATES[optimizer] * N
    if optimizer == "muon" and trained is None:  # AdamW moves the rest
        kinds = kinds_of(config)
        states += sum(p.size for p in config.parameters() if kinds[p.name] != "matrix")
    tokens, width = sequences * context, config.width
    block = kept_by_a_block(config, rank, bottleneck) * itemsize
    if dropout:
        block += 4 * width  # each dropout's mask and what it was applied to
    layers = config.blocks * block
    if activation_checkpointing:
        layers = config.blocks * KEPT_BY_A_CHECKPOINT * width * itemsize + block
    largest = LOGITS_BYTES.get(device.type, LOGITS_BYTES_ELSEWHERE)
    return MemoryEstimate(
        weights=(4 + copied) * N // shards + frozen_bytes,
        gradients=(4 + copied) * N // shards,
        optimizer=4 * states // shards,
        activations=tokens * (layers + 4 * width * itemsize),
        logits=min(largest, 4 * tokens * config.vocab_size),
    )


def check_room(config: ModelConfig, optimizer: str, dtype: torch.dtype, device: torch.device, shards: int = 1) -> None:
    """`ValueError` where what a run keeps of a model alone is more than there is."""
    needed, free = estimate(config, 1, 1, optimizer, dtype, device, shards=shards).lasting, available(device)
    if free is not None and needed > free:
        raise ValueError(
            f"a model of {config.num_parameters:,} parameters takes {megabytes(needed)} to train with {optimizer}, and "
            f"{megabytes(free)} are free: make it smaller"
        )


def kept_by_a_block(config: ModelConfig, rank: int = 0, bottleneck: int = 0) -> int:
    """The numbers that a block keeps of each token for backward: the sums and outputs of both norms; query, key, value
    and attention's output; the wide layers, before and after the activation, with a gate also up and the product; and
    what norms of single heads are given. Beside adapters the gate's activation is made again; those of `rank` keep
    heads a second time where they stand side by side, and of each matrix x Aᵀ. Each of two bottlenecks keeps what it is
    given, and its inner numbers before and after the activation."""
    heads = 2 * (config.heads + config.key_heads)
    if any(p.role == "query_norm" for p in config.parameters()):
        heads += config.heads + config.key_heads
    wide = 4 if any(p.role == "gate" for p in config.parameters()) else 2
    if rank or bottleneck:
        wide = min(wide, 3)
    if rank:
        heads += config.heads
    narrow = rank * sum(p.block == 0 and p.is_matrix for p in config.parameters())
    narrow += 2 * (config.width + 2 * bottleneck) if bottleneck else 0
    return int(4 * config.width + heads * config.head_dim + wide * config.inner_dim + narrow)


def available(device: torch.device) -> int | None:
    """The bytes that are free now, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def give_back(needed: int) -> None:
    """Returns to the system what the allocator holds unused, where fewer than `needed` bytes are available.

    Batches of other widths leave holes that a wider one does not fit in, and that glibc keeps: several GB after some
    dozens. Pages that are given back cost a tenth of a step's time when they are used again.
    """
    free = available(torch.device("cpu"))
    if free is not None and free < needed:
        with contextlib.suppress(AttributeError, OSError):  # where the C library is not glibc
            ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """The most memory in use since it was made, in bytes, without what was in use before."""

    def __init__(self, device: torch.device):
        self.device = device
        self._before = process_bytes("VmRSS") if device.type == "cpu" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def measured(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        most = process_bytes("VmHWM")  # getrusage's begins with that of the process that started this one
        return most - self._before if self.device.type == "cpu" and self._before and most else None


def process_bytes(name: str) -> int:
    """A size in bytes that Linux gives of this process; 0 on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
