"""GGUF, the file of llama.cpp: a header of typed values and tensors, then the tensors' bytes.

    "GGUF"  version  number of tensors  number of values
    values:   key, type, value                      (an array: type of its elements, their number, the elements)
    tensors:  name, dimensions, ggml type, offset   (the fastest dimension first: a weight (N, K) is K, N here)
    padding to `general.alignment`, then the bytes that the offsets count from

All little-endian; a string is its length in 8 bytes and UTF-8. The header is read by this file and not by the package
`gguf`, because a stranger wrote it: every length is checked against the bytes that are left before anything is made of
it, and the vocabulary, most of the header, is not turned into strings until it is asked for.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT, MOST_DIMENSIONS, LONGEST_NAME = 32, 4, 1024
# By number: the types of values. 8 is a string, 9 an array.
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
BOOL, STRING, ARRAY = 7, 8, 9
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the header describes it; `type` is ggml's name. Its rows are whole blocks of that type."""

    file: Path
    name: str
    shape: tuple[int, ...]  # the fastest dimension last, as in torch
    type: str
    block: int  # elements
    block_bytes: int
    start: int  # in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_bytes

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block * self.block_bytes

    def read(self, rows: slice | None = None) -> Tensor:
        """The numbers of a floating-point type, in `shape`; of another the blocks, uint8 (…, bytes of a row).

        It may be some of the first dimension's `rows`. It is a part of the mapped file, whose pages leave memory when
        it does. `ValueError` where the file has become shorter.
        """
        first, stop, _ = (rows or slice(None)).indices(self.shape[0])
        shape = (max(0, stop - first), *self.shape[1:])
        one = self.nbytes // self.shape[0]
        if shape[0] == 0:
            data = torch.empty(0, dtype=torch.uint8)
        else:
            data = _mapped(self.file, self.start + first * one, shape[0] * one)
        if self.type in FLOATS:
            return data.view(FLOATS[self.type]).view(shape)
        return data.view(*shape[:-1], self.row_bytes)


class GGUFArray:
    """An array among the values: numbers or strings, which are read from the file when they are asked for."""

    def __init__(self, header: _Header, kind: int, count: int, start: int):
        self._header, self._kind, self._count, self._start = header, kind, count, start

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __repr__(self) -> str:
        return f"<{self._count} {'strings' if self._kind == STRING else 'numbers'} of {self._header.path.name}>"

    def tolist(self) -> list[Any]:
        """All elements, made anew. `ValueError` for a string that is not UTF-8, or a truth value that is none."""
        self._header.position = self._start
        try:
            if self._kind != STRING:
                return list(self._header.numbers(self._kind, self._count))
            return [str(string, "utf-8") for string in self._header.strings(self._count)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._header.path} holds a string that is not UTF-8: {error.object!r:.60}") from None
        except _Damaged as error:
            raise ValueError(f"{self._header.path} is damaged: {error}") from None


class GGUFFile:
    """What the header of a GGUF file says: `metadata` by key, and `tensors` by name.

    Values are Python's int, float, bool and str, or a `GGUFArray`. `ValueError` naming the file where it is no GGUF
    file, cut off, or contradicts itself; after that every tensor lies whole in the file, and no two share a byte.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = _Header(self.path)
        try:
            self.metadata, tensors = _read(header)
            self.tensors = _located(header, tensors, self.metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT))
        except _Damaged as error:
            raise ValueError(f"{self.path} is damaged or not a GGUF file: {error}") from None


class _Damaged(ValueError):
    """What is wrong with a header; `GGUFFile` names the file."""


class _Header:
    """The file, mapped, and how far its header has been read."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        with open(path, "rb") as file:
            self.size = file.seek(0, 2)
            # Nothing is read yet; only the pages of the header ever will be, through this map.
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def take(self, count: int, what: str) -> int:
        """Steps over `count` bytes, and gives where they begin."""
        start = self.position
        if count > self.size - start:
            raise _Damaged(f"{what} takes {count:,} bytes at {start:,}, of {self.size:,} in the file")
        self.position = start + count
        return start

    def number(self, kind: int) -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: int, count: int) -> tuple[Any, ...]:
        code = NUMBERS[kind]
        start = self.take(count * struct.calcsize(code), f"{count:,} numbers")
        if kind == BOOL:
            values = struct.unpack_from(f"<{count}B", self.bytes, start)
            if any(value > 1 for value in values):
                raise _Damaged("a truth value is neither 0 nor 1")
            return tuple(value == 1 for value in values)
        return struct.unpack_from(f"<{count}{code}", self.bytes, start)

    def string(self, longest: float = math.inf) -> str:
        length = self.number(10)
        if length > longest:
            raise _Damaged(f"a name has {length:,} bytes")
        start = self.take(length, "a string")
        try:
            return str(self.bytes[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"the string at {start:,} is not UTF-8") from None

    def name(self) -> str:
        """Of a value or a tensor, fit to be shown: messages name it."""
        start, name = self.position, self.string(LONGEST_NAME)
        if not name.isprintable():
            raise _Damaged(f"the name at {start:,} holds characters that can't be printed")
        return name

    def skip_strings(self, count: int) -> None:
        """Most of a header's time: a vocabulary has some hundred thousand."""
        position, last, data = self.position, self.size - 8, self.bytes
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position > last:
                raise _Damaged(f"an array of {count:,} strings goes past the end of the file")
            position += 8 + length_at(data, position)[0]
        if position > self.size:
            raise _Damaged(f"an array of {count:,} strings goes past the end of the file")
        self.position = position

    def strings(self, count: int) -> Iterator[bytes]:
        """Those that `skip_strings` has been over."""
        position, data = self.position, self.bytes
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = position + 8
            position = start + length_at(data, position)[0]
            yield data[start:position]

    def value(self, key: str) -> Any:
        kind = self.number(4)
        if kind == STRING:
            return self.string()
        if kind in NUMBERS:
            return self.number(kind)
        if kind != ARRAY:
            raise _Damaged(f"{key} has the unknown type {kind}")
        kind, count, start = self.number(4), self.number(10), self.position
        if kind == STRING:
            self.skip_strings(count)
        elif kind in NUMBERS:
            self.take(count * struct.calcsize(NUMBERS[kind]), f"the array {key}")
        else:
            raise _Damaged(f"{key} is an array of {'arrays' if kind == ARRAY else f'the unknown type {kind}'}")
        return GGUFArray(self, kind, count, start)


def _read(header: _Header) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
    """The values, and of every tensor its name, shape, type and offset. Counts that lie run into the file's end."""
    if header.bytes[:4] != MAGIC:
        raise _Damaged("it does not begin with GGUF")
    header.take(4, "the beginning")
    version = header.number(4)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise _Damaged("it is big-endian" if swapped else f"its version is {version}, and 2 and 3 are read")
    tensor_count, value_count = header.number(10), header.number(10)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = header.name()
        if key in metadata:
            raise _Damaged(f"it says {key} twice")
        metadata[key] = header.value(key)
    tensors = []
    for _ in range(tensor_count):
        name = header.name()
        dimensions = header.number(4)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Damaged(f"the tensor {name} has {dimensions} dimensions")
        shape = header.numbers(10, dimensions)[::-1]
        tensors.append((name, shape, header.number(4), header.number(10)))
    return metadata, tensors


def _located(
    header: _Header, tensors: list[tuple[str, tuple[int, ...], int, int]], alignment: Any
) -> dict[str, GGUFTensor]:
    """The tensors by name, once each is known to lie in the file, by itself."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise _Damaged(f"{ALIGNMENT} must be a power of two, and is {alignment!r:.60}")
    from gguf import GGML_QUANT_SIZES  # a twentieth of a second, for GGUF files only

    types = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    data = -(-header.position // alignment) * alignment
    located: dict[str, GGUFTensor] = {}
    for name, shape, number, offset in tensors:
        if name in located:
            raise _Damaged(f"it holds the tensor {name} twice")
        if number not in types:
            raise ValueError(f"{header.path}: the tensor {name} has type {number} of ggml, which is not known here")
        kind, block, block_bytes = types[number]
        if 0 in shape or shape[-1] % block:
            raise _Damaged(f"the tensor {name} is {shape}, which {kind} has no room for")
        if offset % alignment:
            raise _Damaged(f"the tensor {name} begins at {offset:,}, which {ALIGNMENT} {alignment} does not divide")
        tensor = GGUFTensor(header.path, name, shape, kind, block, block_bytes, data + offset)
        if tensor.start + tensor.nbytes > header.size:
            raise _Damaged(f"the tensor {name} ends at {tensor.start + tensor.nbytes:,}, past the end of the file")
        located[name] = tensor
    in_order = sorted(located.values(), key=lambda tensor: tensor.start)
    for tensor, after in zip(in_order, in_order[1:], strict=False):
        if tensor.start + tensor.nbytes > after.start:
            raise _Damaged(f"the tensors {tensor.name} and {after.name} share bytes")
    return located


def _mapped(path: Path, start: int, count: int) -> Tensor:
    """Some bytes of a file as uint8, as long as the tensor lives; writing to them would change only this copy."""
    aligned = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), start - aligned + count, access=mmap.ACCESS_COPY, offset=aligned)
    except (OSError, ValueError) as error:  # it was longer when its header was read
        raise ValueError(f"{path} can't be read any more: {error}") from None
    return torch.frombuffer(view, dtype=torch.uint8, count=count, offset=start - aligned)
