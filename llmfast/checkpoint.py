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
BUFFERS = ("attn.bias", "attn.masked_bias")  # causal masks that old checkpoints carry
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
