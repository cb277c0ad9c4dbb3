"""The same weights in every engine's format, made once in a folder of up to 1.4 GB.

    FOLDER/hf/, reference.npz, ct2/    see models.py
    FOLDER/f32.gguf, bf16.gguf, …      what llama.cpp's engines of the model read, by the package's own writer

Random weights are as fast as trained ones, and nothing has to be downloaded; a model that is known by name is taken
from its file, whose own form stays as it is.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from llmfast.benchmarking.peers import client
from llmfast.benchmarking.peers.plan import LLAMA, Model
from llmfast.models import PRESETS
from llmfast.weights.checkpoint import stream
from llmfast.weights.converting import convert
from llmfast.weights.gguf_writing import write_gguf
from llmfast.weights.locate import locate_model

VERSION = "3"  # a folder made by another version of this file is made again


def is_made(folder: Path) -> bool:
    stamp = folder / "version"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == VERSION


def make(folder: Path, model: Model) -> None:
    """Fills `folder`, whole or not at all. `ValueError` where the peers' libraries could not, `FileNotFoundError` for
    a model that is not here."""
    file = locate_model(model.name) if model.stored_as is not None else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        place = Path(temporary) / folder.name
        place.mkdir()
        config = [json.dumps(PRESETS[model.preset].to_document())] if file is None else []
        if file is not None:
            convert(file, place / "hf", "safetensors", "f32")
        made = client.run_module("models", place, *config)
        if made.returncode:
            raise ValueError(f"the models could not be made: {made.stderr.strip().splitlines()[-1]}")
        forms = {engine.precision for engine in model.engines() if engine.library == LLAMA}
        for form in sorted(forms):
            target = place / f"{form}.gguf"
            if file is None:
                write_gguf(target, stream(place / "hf"), form, vocabulary(PRESETS[model.preset].vocab_size))
            elif form == model.stored_as:
                shutil.copyfile(file, target)
            else:
                convert(file, target, "gguf", form)
        (place / "version").write_text(VERSION, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        place.rename(folder)


def vocabulary(size: int) -> dict[str, Any]:
    """llama.cpp wants one; nothing is ever tokenised."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(size)],
        "tokenizer.ggml.token_type": [1] * size,
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.bos_token_id": size - 1,
        "tokenizer.ggml.eos_token_id": size - 1,
    }
