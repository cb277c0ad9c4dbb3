"""From a checkpoint of floats to one of 8 or 4 bits, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmfast.files import write_atomic
from llmfast.quantization.formats import QuantizedWeight, quantize, squared_error
from llmfast.quantization.plan import plan
from llmfast.tokenizers.protocol import TOKENIZER_FILES
from llmfast.weights.checkpoint import stream
from llmfast.weights.files import WEIGHT_FILES
from llmfast.weights.saving import save

CARD, TRAINING = "README.md", "training.json"


@dataclass
class Part:
    """The weights of one kind that `quantize_checkpoint` stored in the same way, and what that cost."""

    kind: str  # a role, such as "attention out", in all blocks
    precision: str  # "int8", "int4", or the dtype of what it left alone
    tensors: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    squared_error: float = 0.0  # the sum over all weights
    squared_norm: float = 0.0

    @property
    def relative_error(self) -> float:
        """The root mean square of what the weights lost, relative to their own."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    precision: str,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Part]:
    """Writes the model in `source` into the directory `target`, quantised by the plan of `precision`.

    The source is read a tensor at a time: besides the result, only one of them is in memory. The tokenizer comes
    along, and so does the model card, with a line saying what was done. `progress` is told the bytes done and in
    all. `ValueError` or `FileNotFoundError` for a source that is already quantised, or a target that is the source,
    or one that holds a model, unless `overwrite`.
    """
    model, directory = stream(source), Path(target)
    if model.precision is not None:
        raise ValueError(f"{source} is quantised already ({model.precision}): quantise what it came from")
    formats, sizes = plan(model.config, precision), model.sizes
    roles = {parameter.name: parameter.role for parameter in model.config.parameters()}
    replaces = holds_model(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a directory for the quantised model")
    if directory.resolve() == model.directory.resolve():
        raise ValueError(f"{directory} holds the model to quantise: name another directory")
    if replaces and not overwrite:
        raise ValueError(f"{directory} holds a model already: name another directory, or pass overwrite=True")

    state: dict[str, Tensor | QuantizedWeight] = {}
    parts: dict[tuple[str, str], Part] = {}
    for name, tensor in model:
        assert isinstance(tensor, Tensor)
        if name in formats:
            try:
                quantized = quantize(tensor, formats[name])
            except ValueError as error:
                raise ValueError(f"{source}: {name}: {error}") from None
            state[name] = quantized
            key = roles[name].replace("_", " "), formats[name]
            lost, whole = squared_error(tensor, quantized)
        else:
            state[name] = tensor.clone()
            key, lost, whole = ("the rest", model.precision_of(name)), 0.0, 0.0
        part = parts.setdefault(key, Part(*key))
        part.tensors += 1
        part.bytes_before += sizes[name]
        part.bytes_after += state[name].nbytes
        part.squared_error += lost
        part.squared_norm += whole
        progress(sum(part.bytes_before for part in parts.values()), sum(sizes.values()))

    save(directory, model.config, state, tokenizer_from=model.path, precision=precision)
    if replaces:  # nothing may stay of another model that stood here
        copied = (
            TOKENIZER_FILES if model.config_file is not None else ()
        )  # a tokenizer written anew has removed others'
        for file in (*copied, TRAINING, CARD):
            if file == TRAINING or not (model.directory / file).exists():
                (directory / file).unlink(missing_ok=True)
    if model.path.is_dir() and (model.path / CARD).exists():
        note = f"\n**Quantised** by `llmfast quantize --precision {precision}`; the figures above are from before.\n"
        write_atomic(directory / CARD, (model.path / CARD).read_bytes() + note.encode())
    return sorted(parts.values(), key=lambda part: part.kind == "the rest")


def holds_model(directory: Path) -> bool:
    names = ("config.json", *WEIGHT_FILES, *(f"{name}.index.json" for name in WEIGHT_FILES))
    return any((directory / name).exists() for name in names)
