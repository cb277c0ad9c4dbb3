"""C++ in a notebook: a source becomes functions in about a second, because no header of PyTorch's has to be read.

    compiled = compile_cpp('extern "C" void twice(const float* x, float* y, long n) { … }')
    compiled.twice(x, y, x.numel())          # tensors go as pointers to their data, numbers as long or float

(`torch.utils.cpp_extension.load_inline` takes half a minute for the same; docs/write-your-own-kernel.md shows it.)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

# -I: a source may include vectors.h
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-shared",
    "-fPIC",
    "-pthread",
    "-Wno-psabi",
    f"-I{Path(__file__).parent}",
)


class Compiled:
    """The `extern "C"` functions of a source, which return nothing."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        function.restype = None

        def call(*arguments: torch.Tensor | int | float) -> None:
            for argument in arguments:
                if isinstance(argument, torch.Tensor) and not argument.is_contiguous():
                    raise ValueError(f"{name} takes contiguous tensors, got strides {argument.stride()}")
            function(*map(_as_c, arguments))

        return call


def _as_c(argument: torch.Tensor | int | float) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)


def why_not() -> str | None:
    """Why no C++ can be compiled here, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[-1]
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler}); install g++ or clang"


def compile_cpp(source: str, *flags: str) -> Compiled:
    """Compiles a source, with `flags` after the usual ones. A `RuntimeError` holds what the compiler says."""
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *flags]
    name = hashlib.sha256("\0".join([*command, source]).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="llmfast-lesson-") as folder:
        file, library = Path(folder) / f"{name}.cpp", Path(folder) / f"{name}.so"
        file.write_text(source, encoding="utf-8")
        ran = subprocess.run([*command, str(file), "-o", str(library)], capture_output=True, text=True)
        if ran.returncode != 0:
            raise RuntimeError(ran.stderr)
        return Compiled(library)  # once loaded, the file may go
