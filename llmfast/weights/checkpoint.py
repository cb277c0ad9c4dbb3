"""A model's weights in Hugging Face's layout, a tensor at a time, under the names that its configuration states.

Files differ from a state dict in three ways: some families store linear layers transposed, names may lack the family's
prefix, and a tied head is left out. Quantised weights are this project's own: `config.json` lists them under
"llmfast_quantization", and NAME.weight holds the integers, NAME.weight_scale their scale, and so on for the parts that
`llmfast.quantization.encodings` gives the format, whose matrices are (out, in).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmfast.models import ModelConfig
from llmfast.quantization.formats import QuantizedWeight, layout, quantize
from llmfast.quantization.plan import Quantization
from llmfast.weights.config_file import config_file, read_config, read_quantization
from llmfast.weights.files import FLOATS, Stored, dtype_name, same, stored_in, weight_files

HEAD = "lm_head.weight"
# Causal masks and frequencies that old checkpoints carry, and that are made anew.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
ROWS_BYTES = 16 << 20  # how much of a large tensor is read at once to be quantised


def stream(path: str | Path) -> Stream:
    """Opens the model in a directory or a single file, to be read a tensor at a time.

    A directory holds `config.json` and `model.safetensors` (or several with an index), or `pytorch_model.bin`; a
    single file's configuration is `config.json` beside it. Every name, shape and dtype has been checked when this
    returns, from the headers alone. `FileNotFoundError` or `ValueError` in one line otherwise.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}")
    file = config_file(path)
    config = read_config(file)
    files = weight_files(path) if path.is_dir() else [path]
    tensors = [tensor for file in files for tensor in stored_in(file)]
    if config.blocks > len(tensors):  # before anything is made for each of them
        raise ValueError(
            f"{path} does not fit its config.json: {len(tensors)} tensors are too few for {config.blocks} blocks"
        )
    quantized = read_quantization(file, config)
    formats = {} if quantized is None else quantized.weights
    return Stream(path, config, quantized, *fitting(tensors, config, formats, path))


def load(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the weights under the state dict's names, quantised ones as float32; see `stream`."""
    source = stream(path)
    tensors = {
        name: weight.dequantize()
        if isinstance(weight, QuantizedWeight)
        else weight.clone(memory_format=torch.contiguous_format)  # no longer a part of the file
        for name, weight in source
    }
    if source.config.tie_word_embeddings:
        tensors[HEAD] = tensors[source.config.head_name]
    return source.config, tensors


@dataclass(frozen=True)
class Stream:
    """A model's tensors, one at a time: pairs of a name in the state dict and a `Tensor` or a `QuantizedWeight`.

    The largest come first, when whoever reads has not gathered much yet. A tied head does not come beside the
    embedding. Shapes are those of the model; a `Tensor` has the file's dtype, and the weight of a linear layer is a
    transposed view, not contiguous. They are parts of the mapped file: copy what is to be kept, and let go of one
    before asking for the next, to have no more than one in memory. Contents that do not fit raise `ValueError`.
    """

    path: Path
    config: ModelConfig
    quantization: Quantization | None
    stored: Mapping[str, Stored]  # by this model's names; the parts of a quantised weight side by side
    tied_head: Stored | None  # a copy of the embedding, in files that hold it twice

    @property
    def directory(self) -> Path:
        """Where config.json is, and the tokenizer if there is one."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def precision(self) -> str | None:
        """One of `plan.PRECISIONS`, or None for a model that is not quantised."""
        return None if self.quantization is None else self.quantization.precision

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each weight in the file, all its parts together, largest first."""
        weights = [parameter.name for parameter in self.config.parameters() if parameter.name in self.stored]
        sizes = {name: sum(part.nbytes for part in self._parts(name).values()) for name in weights}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def precision_of(self, name: str) -> str:
        """The format of a quantised weight, or the dtype of another."""
        return self._formats.get(name, self.stored[name].dtype)

    @property
    def _formats(self) -> Mapping[str, str]:
        return {} if self.quantization is None else self.quantization.weights

    def _parts(self, name: str) -> dict[str, Stored]:
        """A weight's tensors in the file, by the names of its format's parts; of floats there is one, `values`."""
        parts = layout(self._formats[name], (1, 1)) if name in self._formats else ["values"]
        return {part: self.stored[part_name(name, part)] for part in parts}

    def __iter__(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        return self.tensors({})

    def tensors(self, formats: Mapping[str, str]) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """The same, where `formats` quantises weights that are stored as floats, the largest a few rows at a time."""
        if self.tied_head is not None and not same(self.tied_head, self.stored[self.config.head_name]):
            raise ValueError(
                f"{self.path}: config.json ties the head to the embedding, but lm_head.weight differs from it"
            )
        shapes = {parameter.name: (parameter.shape[0], parameter.shape[-1]) for parameter in self.config.parameters()}
        for name in self.sizes:
            if name not in self._formats:
                yield name, self._quantize(name, formats[name]) if name in formats else self.stored[name].read()
                continue
            parts = {part: stored.read() for part, stored in self._parts(name).items()}
            try:
                weight = QuantizedWeight(self._formats[name], shapes[name], parts)
            except ValueError as error:
                raise ValueError(f"{self.path}: {name}: {error}") from None
            del parts
            yield name, weight
            del weight

    def _quantize(self, name: str, precision: str) -> QuantizedWeight:
        stored = self.stored[name]
        step = stored.shape[0] if stored.transposed else max(1, ROWS_BYTES * stored.shape[0] // stored.nbytes)
        rows = [slice(start, start + step) for start in range(0, stored.shape[0], step)]
        try:
            pieces = [quantize(stored.read(piece if len(rows) > 1 else None), precision).parts for piece in rows]
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from None
        N, K = stored.shape
        return QuantizedWeight(precision, (N, K), {p: torch.cat([piece[p] for piece in pieces]) for p in pieces[0]})


def part_name(name: str, part: str) -> str:
    """The name under which a part of a quantised weight is stored: its values under the weight's own."""
    return name if part == "values" else f"{name}_{part}"


def fitting(
    tensors: list[Stored], config: ModelConfig, formats: Mapping[str, str], path: Path
) -> tuple[dict[str, Stored], Stored | None]:
    """The tensors by this model's names, and the copy of a tied head; all that does not fit is listed in one error."""
    found: dict[str, Stored] = {}
    twice = []
    transposed = {parameter.name for parameter in config.parameters() if parameter.transposed}
    for tensor in tensors:
        name = tensor.name
        if name.endswith(BUFFERS):
            continue
        if not name.startswith((config.prefix, HEAD)):
            name = config.prefix + name
        if name in transposed and name not in formats and len(tensor.shape) == 2:
            tensor = dataclasses.replace(tensor, shape=tensor.shape[::-1], transposed=True)
        if name in found:
            twice.append(name)
        found[name] = tensor
    tied_head = found.pop(HEAD, None) if config.tie_word_embeddings else None

    expected = _expected(config, formats)
    both = [name for name in expected if name in found]
    complaints = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": sorted(found.keys() - expected.keys()),
        "stored twice:": twice,
        "wrongly shaped:": [
            f"{name} is {found[name].shape}, not {expected[name][0]}"
            for name in both
            if found[name].shape != expected[name][0]
        ],
        "of the wrong type:": [
            f"{name} is {found[name].dtype}, not {' or '.join(expected[name][1])}"
            for name in both
            if found[name].dtype not in expected[name][1]
        ],
    }
    problems = [f"{complaint} {_some(names)}" for complaint, names in complaints.items() if names]
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems)}")
    return found, tied_head


def _expected(config: ModelConfig, formats: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """The shape of every tensor that a file should hold, and the dtypes that it may have."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, shape in ((parameter.name, parameter.shape) for parameter in config.parameters()):
        expected[name] = shape, FLOATS
        if name in formats:
            for part, (part_shape, dtype) in layout(formats[name], shape).items():
                expected[part_name(name, part)] = part_shape, (dtype_name(dtype),)
    return expected


def _some(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
