"""The tensors in a model's files, by their headers: read when they are asked for, whole or a few rows at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmfast.files import write_atomic

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or several of a kind, with an index
FLOATS = ("float64", "float32", "float16", "bfloat16")
# The dtypes of a safetensors header that are read; others keep the header's name, and fit nowhere.
HEADER_DTYPES = dict(zip(("F64", "F32", "F16", "BF16", "I8", "U8"), (*FLOATS, "int8", "uint8"), strict=True))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header describes it; `dtype` is torch's name for it."""

    file: Path
    name: str
    shape: tuple[int, ...]  # the model's, which the file's is the transpose of if `transposed`
    dtype: str
    transposed: bool = False
    tensor: Tensor | None = None  # of an old .bin file, which can only be read whole

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def stored_as(self) -> str:
        return self.dtype

    @property
    def format(self) -> None:
        return None

    @property
    def in_rows(self) -> bool:
        return not self.transposed

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some rows of it. It is a part of the mapped file, whose pages leave memory when it does.

        The file is opened anew each time: one that stays open keeps every page that was ever read of it.
        """
        if self.tensor is not None:
            tensor = self.tensor if rows is None else self.tensor[rows]
        else:
            with _opened(self.file) as file:
                tensor = file.get_tensor(self.name) if rows is None else file.get_slice(self.name)[rows]
        return tensor.t() if self.transposed else tensor


def weight_files(directory: Path) -> list[Path]:
    """The files of a directory that hold its model's weights."""
    for single in WEIGHT_FILES:
        if (directory / single).exists():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                missing = [name for name in names if not (directory / name).exists()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is not a valid index of weight files: {error}") from None
            if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
                raise ValueError(f"{index} names files outside of its folder: {', '.join(outside)}")
            if missing:
                raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
            return [directory / name for name in names]
    raise FileNotFoundError(f"no weights in {directory}: expected model.safetensors or pytorch_model.bin")


def stored_in(file: Path) -> list[Stored]:
    """What a file holds, by its header. A .bin file has none, and is read whole."""
    if file.suffix != ".safetensors":
        tensors = read_bin(file)
        return [
            Stored(file, name, tuple(t.shape), dtype_name(t.dtype), tensor=t.detach()) for name, t in tensors.items()
        ]
    with _opened(file) as opened:
        headers = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dictionary
        return [
            Stored(file, name, tuple(header.get_shape()), HEADER_DTYPES.get(header.get_dtype(), header.get_dtype()))
            for name, header in headers.items()
        ]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None


def read_bin(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch.load fails in many ways, and advises to load such files unsafely
        raise ValueError(
            f"{file} is damaged, or holds something else than plain tensors, which alone are read from it"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(t, Tensor) and isinstance(k, str) for k, t in tensors.items()
    ):
        raise ValueError(f"{file} should hold a dictionary of tensors")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous tensors on the CPU as a safetensors file, whole or not at all. `OSError` where that fails."""
    try:
        write_atomic(path, lambda temporary: save_file(dict(tensors), temporary, metadata=dict(metadata or {})))
    except SafetensorError as error:  # its own word for what the system said
        raise OSError(f"{path} can't be written: {error}") from None


def same(first: Stored, second: Stored, chunk: int = 1 << 22) -> bool:
    """Compared a few rows at a time: both at once may be more than there is memory for."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    step = max(1, chunk // math.prod(first.shape[1:]))
    chunks = [slice(start, start + step) for start in range(0, first.shape[0], step)]
    return all(torch.equal(first.read(rows), second.read(rows)) for rows in chunks)


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name for it: float32, int8, …"""
    return str(dtype).removeprefix("torch.")
