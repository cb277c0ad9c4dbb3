"""Weights in Hugging Face's GPT-2 layout: names and tensors in and out.

The layout differs from `llmfast.models.gpt2` in three ways: linear layers of a block are stored (in, out) ("Conv1D"),
names may lack the prefix `transformer.`, and a tied head is left out. Quantised weights are this project's own:
`config.json` lists them under "llmfast_quantization", and NAME.weight holds the integers, NAME.weight_scale their
scale, both as in `llmfast.quantization`, that is (out, in).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmfast.files import write_atomic
from llmfast.models.config import GPTConfig
from llmfast.quantization import formats as quantization
from llmfast.quantization.formats import PRECISIONS, Quantization, QuantizedWeight, layout, plan
from llmfast.tokenizers.protocol import TOKENIZER_FILES

CARD, TRAINING = "README.md", "training.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or several of a kind, with an index
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old checkpoints carry
# Settings of Hugging Face's GPT-2 that change the arithmetic, with the only value this model computes.
FIXED_SETTINGS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
ROWS_BYTES = 16 << 20  # how much of a large tensor is read at once to be quantised
RECOMMENDED = "llmfast_precision"  # in config.json: the precision that its card measured to be as good, and faster
QUANTIZATION = "llmfast_quantization"  # the key in config.json
FLOATS = ("float64", "float32", "float16", "bfloat16")
# The dtypes of a safetensors header that are read; others keep the header's name, and fit nowhere.
HEADER_DTYPES = dict(zip(("F64", "F32", "F16", "BF16", "I8", "U8"), (*FLOATS, "int8", "uint8"), strict=True))


def save(
    path: str | Path,
    config: GPTConfig,
    state: Mapping[str, Tensor | QuantizedWeight],
    tokenizer_from: Path | None = None,
    precision: str | None = None,
    **metadata: Any,
) -> None:
    """Writes `config.json` and `model.safetensors` into the directory `path`, and copies the tokenizer's files.

    Weights of `state` may be quantised; `precision` then says by which plan they were chosen, and stands with them.
    """
    formats = {name: weight.precision for name, weight in state.items() if isinstance(weight, QuantizedWeight)}
    if bool(formats) != (precision is not None):
        raise ValueError(f"precision is {precision!r}, and {len(formats)} of the weights are quantised")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if isinstance(weight, QuantizedWeight):
            tensors |= {name: weight.values, scale_of(name): weight.scale}
        else:
            tensors[name] = weight.t() if name.endswith(CONV1D) else weight
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt"} | {key: str(value) for key, value in metadata.items()}
    write_atomic(
        directory / "model.safetensors",
        lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=header),
    )
    document: dict[str, Any] = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | dataclasses.asdict(config)
    document["dtype"] = next(_name(weight.dtype) for weight in state.values() if isinstance(weight, Tensor))
    if precision is not None:
        document[QUANTIZATION] = Quantization(precision, formats).to_document()
    write_atomic(directory / "config.json", json.dumps(document, indent=2).encode())
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the files of the tokenizer in `source`, if there is one."""
    if source.resolve() != directory.resolve():
        for file in TOKENIZER_FILES:
            if (source / file).exists():
                write_atomic(directory / file, (source / file).read_bytes())


def load(path: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The configuration and the weights under this model's names, quantised ones as float32; see `stream`."""
    source = stream(path)
    tensors = {
        name: weight.dequantize()
        if isinstance(weight, QuantizedWeight)
        else weight.clone(memory_format=torch.contiguous_format)  # no longer a part of the file
        for name, weight in source
    }
    if source.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return source.config, tensors


def stream(path: str | Path) -> Stream:
    """Opens the model in a directory or a single file, to be read a tensor at a time.

    A directory holds `config.json` and `model.safetensors` (or several with an index), or `pytorch_model.bin`; a
    single file's configuration is `config.json` beside it. Every name, shape and dtype has been checked when this
    returns, from the headers alone. `FileNotFoundError` or `ValueError` in one line otherwise.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}")
    directory = path if path.is_dir() else path.parent
    config, quantized = _read_config(directory / "config.json")
    files = _weight_files(directory) if path.is_dir() else [path]
    tensors = [tensor for file in files for tensor in _stored(file)]
    formats = {} if quantized is None else quantized.weights
    return Stream(path, config, quantized, *_fitting(tensors, config, formats, path))


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


@dataclass(frozen=True)
class Stream:
    """A model's tensors, one at a time: pairs of a name in the state dict and a `Tensor` or a `QuantizedWeight`.

    The largest come first, when whoever reads has not gathered much yet. A tied head does not come beside the
    embedding. Shapes are those of the model; a `Tensor` has the file's dtype, and the weight of a linear layer is a
    transposed view, not contiguous. They are parts of the mapped file: copy what is to be kept, and let go of one
    before asking for the next, to have no more than one in memory. Contents that do not fit raise `ValueError`.
    """

    path: Path
    config: GPTConfig
    quantization: Quantization | None
    stored: Mapping[str, Stored]  # by this model's names; a scale beside its weight
    tied_head: Stored | None  # a copy of the embedding, in files that hold it twice

    @property
    def directory(self) -> Path:
        """Where config.json is, and the tokenizer if there is one."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def precision(self) -> str | None:
        """ "int8", "int4" or "int4-all", or None for a model that is not quantised."""
        return None if self.quantization is None else self.quantization.precision

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each weight in the file, its scale included, largest first."""
        weights = [name for name in expected_shapes(self.config) if name in self.stored]
        sizes = {n: sum(self.stored[part].nbytes for part in (n, scale_of(n)) if part in self.stored) for n in weights}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def precision_of(self, name: str) -> str:
        """ "int8" or "int4", or the dtype of a weight that is not quantised."""
        formats = {} if self.quantization is None else self.quantization.weights
        return formats.get(name, self.stored[name].dtype)

    def __iter__(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        return self.tensors({})

    def tensors(self, formats: Mapping[str, str]) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """The same, where `formats` quantises weights that are stored as floats, the largest a few rows at a time."""
        if self.tied_head is not None and not _same(self.tied_head, self.stored["transformer.wte.weight"]):
            raise ValueError(
                f"{self.path}: config.json ties the head to the embedding, but lm_head.weight differs from it"
            )
        shapes = expected_shapes(self.config)
        for name in self.sizes:
            if scale_of(name) not in self.stored:
                yield name, self._quantize(name, formats[name]) if name in formats else self.stored[name].read()
                continue
            values, scale = self.stored[name].read(), self.stored[scale_of(name)].read()
            N, K = shapes[name]
            try:
                weight = QuantizedWeight(self.precision_of(name), values, scale, (N, K))
            except ValueError as error:
                raise ValueError(f"{self.path}: {name}: {error}") from None
            del values, scale
            yield name, weight
            del weight

    def _quantize(self, name: str, precision: str) -> QuantizedWeight:
        stored = self.stored[name]
        step = stored.shape[0] if stored.transposed else max(1, ROWS_BYTES * stored.shape[0] // stored.nbytes)
        rows = [slice(start, start + step) for start in range(0, stored.shape[0], step)]
        try:
            parts = [quantization.quantize(stored.read(part if len(rows) > 1 else None), precision) for part in rows]
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from None
        values, scale = torch.cat([part.values for part in parts]), torch.cat([part.scale for part in parts])
        N, K = stored.shape
        return QuantizedWeight(precision, values, scale, (N, K))


def scale_of(name: str) -> str:
    """The name under which the scale of a quantised weight is stored."""
    return f"{name}_scale"


def _same(first: Stored, second: Stored, chunk: int = 1 << 22) -> bool:
    """Compared a few rows at a time: both at once may be more than there is memory for."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    step = max(1, chunk // math.prod(first.shape[1:]))
    chunks = [slice(start, start + step) for start in range(0, first.shape[0], step)]
    return all(torch.equal(first.read(rows), second.read(rows)) for rows in chunks)


@dataclass
class Part:
    """The weights of one kind that `quantize` stored in the same way, and what that cost."""

    kind: str  # such as "attn.c_attn", of all layers
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


def quantize(
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
    replaces = _holds_model(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a directory for the quantised model")
    if directory.resolve() == model.directory.resolve():
        raise ValueError(f"{directory} holds the model to quantise: name another directory")
    if replaces and not overwrite:
        raise ValueError(
            f"{directory} holds a model already: name another directory, or pass --overwrite (overwrite=True)"
        )

    state: dict[str, Tensor | QuantizedWeight] = {}
    parts: dict[tuple[str, str], Part] = {}
    for name, tensor in model:
        assert isinstance(tensor, Tensor)
        if name in formats:
            try:
                quantized = quantization.quantize(tensor, formats[name])
            except ValueError as error:
                raise ValueError(f"{source}: {name}: {error}") from None
            state[name] = quantized
            key = re.sub(r"^transformer\.(h\.\d+\.)?|\.weight$", "", name), formats[name]
            lost, whole = quantization.squared_error(tensor, quantized)
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

    save(directory, model.config, state, tokenizer_from=model.directory, precision=precision)
    if replaces:  # nothing may stay of another model that stood here
        for file in (*TOKENIZER_FILES, TRAINING, CARD):
            if file == TRAINING or not (model.directory / file).exists():
                (directory / file).unlink(missing_ok=True)
    if model.path.is_dir() and (model.path / CARD).exists():
        note = f"\n**Quantised** by `llmfast quantize --precision {precision}`; the figures above are from before.\n"
        write_atomic(directory / CARD, (model.path / CARD).read_bytes() + note.encode())
    return sorted(parts.values(), key=lambda part: part.kind == "the rest")


def record_quality(directory: str | Path, quality: Mapping[str, Mapping[str, float]]) -> None:
    """Notes what was measured of a quantised model in its `config.json`: for each text the figures by name."""
    path = Path(directory) / "config.json"
    _, quantized = _read_config(path)
    if quantized is None:
        raise ValueError(f"{directory} is not quantised: its quality is that of the model itself")
    document = _read_document(path)
    document[QUANTIZATION] = dataclasses.replace(quantized, quality=quality).to_document()
    write_atomic(path, json.dumps(document, indent=2).encode())


def recommended_precision(path: str | Path) -> str | None:
    """The precision to run a model in on a CPU: the one it was quantised to, or that its `config.json` recommends."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    _, quantized = _read_config(file)
    recommended = _read_document(file).get(RECOMMENDED)
    if recommended not in (None, "fp32", "bf16", *PRECISIONS):
        raise ValueError(f"{file} recommends {RECOMMENDED} {recommended!r}, which is not known")
    return quantized.precision if quantized is not None else recommended


def _holds_model(directory: Path) -> bool:
    names = ("config.json", *WEIGHT_FILES, *(f"{name}.index.json" for name in WEIGHT_FILES))
    return any((directory / name).exists() for name in names)


def _read_config(path: Path) -> tuple[GPTConfig, Quantization | None]:
    """What a Hugging Face `config.json` says of the model, refusing settings that this model does not compute."""
    document = _read_document(path)
    if document.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{path} describes a {document['model_type']!r} model; only gpt2 is read")
    for name, computed in FIXED_SETTINGS.items():
        if document.get(name, computed) != computed:
            raise ValueError(f"{path} sets {name} to {document[name]}, which this model does not compute")
    document.setdefault("n_positions", document.get("n_ctx", 1024))
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    try:
        config = GPTConfig(**{name: value for name, value in document.items() if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if QUANTIZATION not in document:
        return config, None
    try:
        return config, Quantization.from_document(document[QUANTIZATION], config)
    except ValueError as error:
        raise ValueError(f"{path}: {QUANTIZATION} is not understood: {error}") from None


def _read_document(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    return document


def _weight_files(directory: Path) -> list[Path]:
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
            if missing:
                raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
            return [directory / name for name in names]
    raise FileNotFoundError(f"no weights in {directory}: expected model.safetensors or pytorch_model.bin")


def _stored(file: Path) -> list[Stored]:
    """What a file holds, by its header. A .bin file has none, and is read whole."""
    if file.suffix != ".safetensors":
        tensors = _read_bin(file)
        return [Stored(file, name, tuple(t.shape), _name(t.dtype), tensor=t.detach()) for name, t in tensors.items()]
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


def _read_bin(file: Path) -> dict[str, Tensor]:
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


def _fitting(
    tensors: list[Stored], config: GPTConfig, formats: Mapping[str, str], path: Path
) -> tuple[dict[str, Stored], Stored | None]:
    """The tensors by this model's names, and the copy of a tied head; all that does not fit is listed in one error."""
    found: dict[str, Stored] = {}
    twice = []
    for tensor in tensors:
        name = tensor.name
        if name.endswith(BUFFERS):
            continue
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if name.endswith(CONV1D) and name not in formats and len(tensor.shape) == 2:
            tensor = dataclasses.replace(tensor, shape=tensor.shape[::-1], transposed=True)
        if name in found:
            twice.append(name)
        found[name] = tensor
    tied_head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None

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


def _expected(config: GPTConfig, formats: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """The shape of every tensor that a file should hold, and the dtypes that it may have."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, shape in expected_shapes(config).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        expected[name] = shape, FLOATS
        if name in formats:
            parts = layout(formats[name], shape)
            for part, (shape, dtype) in zip((name, scale_of(name)), parts.values(), strict=True):
                expected[part] = shape, (_name(dtype),)
    return expected


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model of this configuration."""
    C, inner = config.n_embd, config.inner_dim
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (inner, C),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (C, inner),
        "mlp.c_proj.bias": (C,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config.vocab_size, C),
        "transformer.wpe.weight": (config.n_positions, C),
    }
    for layer in range(config.n_layer):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        "lm_head.weight": (config.vocab_size, C),
    }


def _some(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
