"""Weights in Hugging Face's GPT-2 layout: names and tensors in and out.

The layout differs from `llmfast.model` in three ways: linear layers of a block are stored (in, out) ("Conv1D"), names
may lack the prefix `transformer.`, and a tied head is left out.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from llmfast.config import GPTConfig
from llmfast.files import write_atomic

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old checkpoints carry
# Settings of Hugging Face's GPT-2 that change the arithmetic, with the only value this model computes.
FIXED_SETTINGS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def save(
    path: str | Path, config: GPTConfig, state: dict[str, Tensor], tokenizer_from: Path | None = None, **metadata: Any
) -> None:
    """Writes `config.json` and `model.safetensors` into the directory `path`, and copies the tokenizer's files."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[name] = (tensor.t() if name.endswith(CONV1D) else tensor).detach().cpu().contiguous()
    header = {"format": "pt"} | {key: str(value) for key, value in metadata.items()}
    write_atomic(
        directory / "model.safetensors",
        lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=header),
    )
    document = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | dataclasses.asdict(config)
    document["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_atomic(directory / "config.json", json.dumps(document, indent=2).encode())
    if tokenizer_from is not None and tokenizer_from.resolve() != directory.resolve():
        for file in TOKENIZER_FILES:
            if (tokenizer_from / file).exists():
                shutil.copyfile(tokenizer_from / file, directory / file)


def load(path: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Reads the configuration and the weights, under this model's names, of a directory or a single file.

    A directory holds `config.json` and `model.safetensors` (or several with an index), or `pytorch_model.bin`; a
    single file's configuration is `config.json` beside it. `FileNotFoundError` or `ValueError` in one line otherwise.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}")
    directory = path if path.is_dir() else path.parent
    config = load_config(directory / "config.json")
    files = _weight_files(directory) if path.is_dir() else [path]
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= _read_tensors(file)
    return config, _rename(stored, config, path)


def load_config(path: Path) -> GPTConfig:
    """The `GPTConfig` of a Hugging Face `config.json`, refusing settings that this model does not compute."""
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    if document.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{path} describes a {document['model_type']!r} model; only gpt2 is read")
    for name, computed in FIXED_SETTINGS.items():
        if document.get(name, computed) != computed:
            raise ValueError(f"{path} sets {name} to {document[name]}, which this model does not compute")
    document.setdefault("n_positions", document.get("n_ctx", 1024))
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    try:
        return GPTConfig(**{name: value for name, value in document.items() if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _weight_files(directory: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
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


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None
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


def _rename(stored: dict[str, Tensor], config: GPTConfig, path: Path) -> dict[str, Tensor]:
    """The stored tensors under this model's names; every name or shape that does not fit is listed in one error."""
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(BUFFERS):
            continue
        if name != "lm_head.weight" and not name.startswith("transformer."):
            name = f"transformer.{name}"
        if name.endswith(CONV1D) and tensor.ndim == 2:
            tensor = tensor.t().contiguous()
        tensors[name] = tensor
    embedding = tensors.get("transformer.wte.weight")
    if config.tie_word_embeddings and embedding is not None:
        head = tensors.setdefault("lm_head.weight", embedding)
        if head is not embedding and not torch.equal(head, embedding):
            raise ValueError(f"{path}: config.json ties the head to the embedding, but lm_head.weight differs from it")

    expected = expected_shapes(config)
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing {_some(missing)}")
    if surplus := sorted(tensors.keys() - expected.keys()):
        problems.append(f"surplus {_some(surplus)}")
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        problems.append(f"wrongly shaped: {_some(wrong)}")
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems)}")
    return tensors


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
