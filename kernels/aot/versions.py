"""The same command under another Triton: installed into a folder of its own, which comes before the one that is here.

torch and the rest stay those of this environment: compiling asks nothing of a GPU, and no more of torch than empty
tensors. The folder is `build/triton-VERSION`, kept for the next time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build"


def run_with(version: str, arguments: list[str]) -> int:
    """The exit code of `python -m llmfast.kernels.aot` with these arguments and Triton `version`.

    `RuntimeError` where pip can't install it.
    """
    folder = FOLDER / f"triton-{version}"
    if not (folder / "triton").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*install, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip can't install triton {version}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "llmfast.kernels.aot", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
