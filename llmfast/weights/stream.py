"""A model in files, read a weight at a time, whatever the files: what everything that takes a model takes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmfast.models import Bottlenecks, ModelConfig
from llmfast.quantization.formats import QuantizedWeight, quantize, squared_error
from llmfast.quantization.plan import Quantization
from llmfast.weights.config_file import recommended_precision
from llmfast.weights.files import Stored, same

ROWS_BYTES = 16 << 20  # how much of a large tensor, as float32, is read at once to be quantised


class StoredWeight(Protocol):
    """One weight of a model, in a file: `Stored`, `checkpoint.StoredParts` or `gguf_checkpoint.StoredBlocks`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The model's."""
        ...

    @property
    def nbytes(self) -> int:
        """In the file."""
        ...

    @property
    def stored_as(self) -> str:
        """The file's own word: a dtype of torch's, a format, a type of ggml's."""
        ...

    @property
    def format(self) -> str | None:
        """In which `read` gives it, or None for floats."""
        ...

    @property
    def in_rows(self) -> bool:
        """Whether some rows can be read without the others."""
        ...

    def read(self, rows: slice | None = None) -> Tensor | QuantizedWeight:
        """The weight, or some of its rows: a part of the mapped file, or made anew. `ValueError` for bad contents."""
        ...


@dataclass(frozen=True)
class Stream:
    """A model's tensors, one at a time: pairs of a name in the state dict and a `Tensor` or a `QuantizedWeight`.

    The largest come first, when the reader has not gathered much yet. A tied head does not come beside the
    embedding. Shapes are those of the model; a `Tensor` has the file's dtype, and the weight of a linear layer may be a
    transposed view, not contiguous. They are parts of the mapped file: copy what is to be kept, and let go of one
    before asking for the next, to have no more than one in memory. Contents that do not fit raise `ValueError`.
    """

    path: Path
    config: ModelConfig
    quantization: Quantization | None
    weights: Mapping[str, StoredWeight]  # by this model's names
    tied_head: Stored | None = None  # a copy of the embedding, in files that hold it twice
    config_file: Path | None = None  # None where the weights' file says everything itself
    bottlenecks: Bottlenecks | None = None  # which a module has beside its weights

    @property
    def alone(self) -> Stream:
        """The model without what is beside its weights."""
        return dataclasses.replace(self, bottlenecks=None)

    @property
    def directory(self) -> Path:
        """Where the model's card is, if there is one."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def precision(self) -> str | None:
        """One of `plan.PRECISIONS`, or None for a model that is not quantised."""
        return None if self.quantization is None else self.quantization.precision

    def recommended_precision(self) -> str | None:
        """The precision to run it in on a CPU: the one it was quantised to, or that its `config.json` recommends."""
        return self.precision or (None if self.config_file is None else recommended_precision(self.config_file))

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each weight in the file, all its parts together, largest first."""
        sizes = {name: weight.nbytes for name, weight in self.weights.items()}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def precision_of(self, name: str) -> str:
        """What a weight is stored as: a dtype of torch's, a format, a type of ggml's."""
        return self.weights[name].stored_as

    def __iter__(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        return self.tensors({})

    def tensors(self, formats: Mapping[str, str]) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """The same, where `formats` quantises what would come as floats, the largest a few rows at a time.

        Where the file holds it quantised in a way that nothing here multiplies with, and it is to run as it is, one
        warning at the end says what the rounding cost. `ValueError` where the weights are not all that there is.
        """
        if self.bottlenecks is not None:
            raise ValueError(f"{self.path} has bottleneck adapters, which can't be merged, converted or quantised")
        if self.tied_head is not None and not same(self.tied_head, self.weights[self.config.head_name]):  # type: ignore[arg-type]
            raise ValueError(
                f"{self.path}: config.json ties the head to the embedding, but lm_head.weight differs from it"
            )
        rounding = _Rounding()
        for name in self.sizes:
            try:
                yield name, self._read(name, formats.get(name), rounding)
            except ValueError as error:
                raise ValueError(f"{self.path}: {name}: {error}") from None
        if rounding.kinds:
            warnings.warn(f"{self.path.name}: {rounding}", stacklevel=2)

    def _read(self, name: str, form: str | None, rounding: _Rounding) -> Tensor | QuantizedWeight:
        weight = self.weights[name]
        if form is None or weight.format is not None:
            return weight.read()
        N, K = weight.shape
        step = max(1, ROWS_BYTES // (4 * K)) if weight.in_rows else N
        pieces = []
        for start in range(0, N, step):
            floats = weight.read(slice(start, start + step) if step < N else None)
            assert isinstance(floats, Tensor)
            pieces.append(quantize(floats, form))
            if self.quantization is not None and self.quantization.weights.get(name) == form:
                rounding.add(weight.stored_as, form, *squared_error(floats, pieces[-1]))
            del floats
        return QuantizedWeight(
            form, (N, K), {p: torch.cat([piece.parts[p] for piece in pieces]) for p in pieces[0].parts}
        )


class _Rounding:
    """What was lost by weights that a file holds quantised in a way that nothing here multiplies with."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}  # what the file calls them, and the format that they got
        self.lost = self.whole = 0.0

    def add(self, stored_as: str, form: str, lost: float, whole: float) -> None:
        self.kinds[stored_as] = form
        self.lost, self.whole = self.lost + lost, self.whole + whole

    def __str__(self) -> str:
        error = math.sqrt(self.lost / self.whole) if self.whole else 0.0
        stored, formats = ", ".join(sorted(self.kinds)), ", ".join(sorted(set(self.kinds.values())))
        return f"its {stored} weights are rounded to {formats}, which changes them by {error:.2%} (root mean square)"


def complain(path: Path, about: str, problems: Mapping[str, Collection[str]]) -> None:
    """`ValueError` in one line with all problems, each a few words and the names that have it; nothing without any."""
    found = [
        f"{problem} {_some(sorted(names) if isinstance(names, Set) else list(names))}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"{path} does not fit its {about}: {'; '.join(found)}")


def _some(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
