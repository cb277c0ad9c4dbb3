"""A model as a GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.files import write_atomic
from llmfast.models import ModelConfig, Parameter
from llmfast.models.architecture import ENDS
from llmfast.quantization.formats import QuantizedWeight
from llmfast.weights.gguf import GGUFArray, GGUFFile
from llmfast.weights.gguf_blocks import as_stored
from llmfast.weights.gguf_names import ROTARY_FACTORS, rotary_factors, row_order, settings_of, tensor_name
from llmfast.weights.stream import Stream

# The types of a file: of the matrices in blocks, and of the token embedding and the head.
TYPES = {
    "f32": ("F32", "F32"),
    "bf16": ("BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q4_0": ("Q4_0", "Q8_0"),
    "q4_1": ("Q4_1", "Q8_0"),
}
FILE_TYPES = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
FILE_TYPES["q4_1"] = "MOSTLY_Q4_1"
# Values of a GGUF file that are kept when it is converted: what it is called, and the tokenizer.
KEPT = ("general.", "tokenizer.")
OWN = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")


def write_gguf(
    path: Path,
    source: Stream,
    type: str,
    others: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the model of `source` to the file `path`, whole or not at all, its matrices in `type`, one of `TYPES`.

    `others` are values beside the model's own, such as `tokenizer.…`; without a tokenizer llama.cpp can run the model
    on token ids only. A matrix whose rows are not whole blocks of 32, norms, biases and position embeddings are
    float32. Weights that the source stores in the same type stay as they are. One weight at a time is in memory.
    `progress` is told the bytes of the source that are done, and all of them. `ValueError` for arithmetic that
    llama.cpp does not have.
    """
    config = source.config
    settings = settings_of(config)
    if (context := settings[f"{settings['general.architecture']}.context_length"]) < config.context:
        warnings.warn(
            f"llama.cpp would not compute the window of {context} keys: the file has a context of {context} instead "
            f"of {config.context}, within which nothing differs",
            stacklevel=2,
        )
    named = {"general.name": source.directory.name if source.path.is_dir() else source.path.stem}
    values = {"tokenizer.ggml.model": "no_vocab"} | named | settings | dict(others)
    write_atomic(path, lambda temporary: _write(temporary, source, type, values, progress))


def kept_values(file: GGUFFile) -> dict[str, Any]:
    """What of a GGUF file's values goes into one that is made of it."""
    return {key: value for key, value in file.metadata.items() if key.startswith(KEPT) and key not in OWN}


def _write(
    path: str, source: Stream, type: str, values: Mapping[str, Any], progress: Callable[[int, int], None]
) -> None:
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, values["general.architecture"])
    _add_values(writer, {key: value for key, value in values.items() if key != "general.architecture"})
    writer.add_file_type(LlamaFileType[FILE_TYPES[type]])
    if type.startswith("q"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    parameters, sizes = {p.name: p for p in source.config.parameters()}, source.sizes
    kinds = {name: GGMLQuantizationType[_type_of(parameters[name], type)] for name in sizes}
    for name, kind in kinds.items():
        *rows, K = parameters[name].shape
        shape = (*rows, _row_bytes(K, kind))
        writer.add_tensor_info(tensor_name(parameters[name]), shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    if (factors := rotary_factors(source.config)) is not None:
        bytes_ = factors.numpy().view(np.uint8)
        writer.add_tensor_info(ROTARY_FACTORS, bytes_.shape, bytes_.dtype, bytes_.nbytes, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(sizes.values())
    for name, weight in source:
        writer.write_tensor_data(_in_blocks(_in_order(weight, source.config, parameters[name]), kinds[name]))
        done += sizes[name]
        progress(done, total)
    if factors is not None:
        writer.write_tensor_data(bytes_)
    writer.close()


def _add_values(writer: Any, values: Mapping[str, Any]) -> None:
    from gguf import GGUFValueType

    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    for key, value in values.items():
        if isinstance(value, (list, tuple, GGUFArray)):
            writer.add_array(key, list(value))
        else:
            writer.add_key_value(key, value, kinds[type(value)])


def _type_of(parameter: Parameter, type: str) -> str:
    inside, outside = TYPES[type]
    kind = outside if parameter.role in ENDS else inside
    in_blocks = kind in ("F32", "BF16") or parameter.shape[-1] % 32 == 0
    return kind if parameter.is_matrix and in_blocks else "F32"


def _row_bytes(K: int, kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return K // block * size


def _in_order(weight: Tensor | QuantizedWeight, config: ModelConfig, parameter: Parameter) -> Tensor | QuantizedWeight:
    """The weight, its rows as llama.cpp has them."""
    order = row_order(config, parameter)
    if order is None:
        return weight
    if isinstance(weight, QuantizedWeight):
        parts = {name: part[order.argsort()] for name, part in weight.parts.items()}
        return QuantizedWeight(weight.precision, weight.shape, parts)
    return weight[order.argsort()]


def _in_blocks(weight: Tensor | QuantizedWeight, kind: Any) -> np.ndarray[Any, Any]:
    """The bytes of a type, uint8 (…, bytes of a row): those that hold the weight's very numbers, or rounded to it."""
    from gguf import quants

    if isinstance(weight, QuantizedWeight):
        if (blocks := as_stored(weight, kind.name)) is not None:
            return blocks.numpy()
        weight = weight.dequantize()
    if kind.name == "BF16":
        return weight.detach().to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return quants.quantize(weight.detach().float().contiguous().numpy(), kind).view(np.uint8)
