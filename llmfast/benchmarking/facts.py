"""Where, when and by which code a figure was taken: without it figures can't be compared."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import llmfast
from llmfast.backends import cpp
from llmfast.threads import thread_count

PACKAGES = ("torch", "triton", "numpy")
CHECKOUT = Path(llmfast.__file__).resolve().parents[1]


def facts(command: Sequence[str] | None = None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """The machine, the versions (of `packages` too), the commit and the command (this process's own by default).

    `isa` is None without the C++ kernels, `gpu` without one, `commit` and `dirty` outside a checkout.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "command": shlex.join(map(_without_folders, sys.argv if command is None else command)),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
        },
        "isa": cpp.isa() if cpp.why_not("gelu", torch.device("cpu"), torch.float32) is None else None,
        "threads": thread_count(),
        "versions": {"llmfast": llmfast.__version__, "python": platform.python_version()}
        | {name: version for name in (*PACKAGES, *packages) if (version := version_of(name)) is not None},
    }


def _without_folders(word: str) -> str:
    """Folders are private and are left out; the names of files may tell something."""
    return Path(word).name if Path(word).is_absolute() else word


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """As the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says of the checkout this package is in; None where it is installed without one, or git is missing."""
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
