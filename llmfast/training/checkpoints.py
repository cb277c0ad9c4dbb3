"""Checkpoints of a run: directories that are there as a whole or not at all.

checkpoints/
  step-000500/
    model.safetensors, config.json     the float32 weights in Hugging Face's layout: a model that `load` takes
    vocab.json, …                      its tokenizer
    optimizer.safetensors              the optimizer's state by the names of the weights
    shards/                            both, where processes share them (`sharded`), instead of the two files
    state.json                         the step, the configuration, and what else the run has to know
    SHA256SUMS                         the checksums of all these, as `sha256sum --check` reads them

The learning rate, the batches and the random numbers of dropout are functions of the step and the seed (`Trainer`):
the step restores them all.
A checkpoint is written under a temporary name, brought to the disk, and renamed. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from llmfast.files import file_sha256
from llmfast.training.processes import Processes
from llmfast.weights.files import write_tensors

STATE, OPTIMIZER, SHARDS, SUMS = "state.json", "optimizer.safetensors", "shards", "SHA256SUMS"
VERSION = 1
NAME = re.compile(r"step-(\d+)")


def directory_of(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def found(root: Path) -> list[Path]:
    """The whole checkpoints below `root`, oldest first."""
    names = [path for path in root.glob("step-*") if NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(names, key=step_of)


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def write(root: Path, step: int, keep: int, content: Callable[[Path], None], group: Processes) -> None:
    """A checkpoint whose files `content` writes into the directory that it is given; the newest `keep` stay.

    For all processes to call: each runs `content`. A checkpoint that is there already is left as it is. `OSError` where
    the disk has no room: the older ones are as they were.
    """
    target = directory_of(root, step)
    temporary = target.with_name(f".{target.name}")
    if group.agree(group.first and target.exists()):
        return
    if group.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    group.wait()
    try:
        content(temporary)
        group.wait()
        if group.first:
            written = sorted(path for path in temporary.rglob("*") if path.is_file())
            sums = (f"{file_sha256(path)}  {path.relative_to(temporary).as_posix()}\n" for path in written)
            (temporary / SUMS).write_text("".join(sums), encoding="utf-8")
            for path in temporary.rglob("*"):
                sync(path)
            sync(temporary)
            os.replace(temporary, target)
            sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if group.first:
        for old in found(root)[:-keep]:
            shutil.rmtree(old)
    group.wait()


def remove_unfinished(root: Path) -> None:
    """What a process left that was killed while it wrote."""
    for path in root.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint; `ValueError` where it is damaged or from another version."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["version"] != VERSION:
            raise ValueError(f"its version is {state['version']}, and this llmfast reads {VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: {error}") from None
    return state


def verify(path: Path, group: Processes) -> None:
    """`ValueError` where a file of a checkpoint is not what was written. For all processes to call; the first reads.

    One that was written before there were checksums is taken as it is.
    """
    wrong: list[str] = []
    if group.first and (path / SUMS).exists():
        for line in (path / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
            expected, _, name = line.partition("  ")
            file = path / name
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif file_sha256(file) != expected:
                wrong.append(f"{name} is not what was written (its SHA-256 has changed)")
    if group.agree(bool(wrong)):
        raise ValueError(f"the checkpoint {path} is damaged: {'; '.join(wrong) or 'the first process says so'}")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_tensors(path, {name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {path.parent} is damaged: {path.name}: {error}") from None


def sync(path: Path) -> None:
    """Brings a file's bytes, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every system syncs directories
            raise
    finally:
        os.close(descriptor)
