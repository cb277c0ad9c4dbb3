"""The processes of a run: one, or as many as `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

PARALLEL = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """Which of how many this one is. With one, nothing is ever sent."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    sharded: bool = False  # fsdp: each has a part of the weights; else each has them all

    @property
    def first(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replaces `tensor` by its sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers."""
        return number if self.world_size == 1 else int(self.add_up(torch.tensor(number, device=self.device)))

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.total(int(flag)) > 0

    def wait(self) -> None:
        """Until all are here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def processes(parallel: str, device: str) -> Iterator[Processes]:
    """Joins the group that `torchrun` announces in the environment: gloo between CPUs, nccl between GPUs.

    `device` is "auto", "cpu", "cuda" …; with several processes on GPUs each takes the one of its local rank.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be {', '.join(PARALLEL)}, got {parallel!r}")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if parallel == "none":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("several processes were started: say how they share the work, --parallel ddp or fsdp")
        yield Processes(device=_usable(kind))
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"--parallel {parallel} needs several processes: torchrun --nproc-per-node 2 -m llmfast train … "
            f"--parallel {parallel}"
        )
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(kind)
    place = _usable(kind)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place, parallel == "fsdp")
    finally:
        dist.destroy_process_group()


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from None
    return device
