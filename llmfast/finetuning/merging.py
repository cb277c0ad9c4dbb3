"""An adapter folded into the weights of its model: an ordinary checkpoint, which needs neither file any more."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmfast.finetuning.classifier import CLASSIFIER
from llmfast.training.checkpoints import save_tensors
from llmfast.weights.adapter import SCORE, SCORE_FILE, is_adapter
from llmfast.weights.checkpoint import stream
from llmfast.weights.config_file import config_file
from llmfast.weights.folding import adapted, read_any
from llmfast.weights.locate import locate_model
from llmfast.weights.quantizing import holds_model
from llmfast.weights.saving import save


def merge(
    adapter: str | Path, out: str | Path, model: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Writes the model that the directory `adapter` was made for (or `model`, where it does not say), with the adapter
    in its weights, into `out`: W + s B A, added in float32 and rounded once, to `dtype`. A classifier stays one.

    `FileNotFoundError` or `ValueError` in one line, also where `out` holds a model already.
    """
    path, out = Path(adapter), Path(out)
    if holds_model(out) or is_adapter(out):
        raise ValueError(f"{out} holds a model already: name another directory")
    if model is not None:
        source = adapted(stream(locate_model(model)), path)
    elif is_adapter(path):
        source = stream(path)
    else:
        raise FileNotFoundError(f"no adapter in {path}")
    state = {}
    for name, weight in source:
        assert isinstance(weight, Tensor)  # as all are of a model with an adapter
        state[name] = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    save(out, source.config, state, tokenizer_from=source.path)
    if (path / CLASSIFIER).exists() and (score := read_any(path, source.config).score) is not None:
        save_tensors(out / SCORE_FILE, {SCORE: score.to(dtype)})
        (out / CLASSIFIER).write_bytes((path / CLASSIFIER).read_bytes())
    ends = None if source.config_file is None else config_file(source.config_file.parent).with_name(GENERATION)
    if ends is not None and ends.exists():
        (out / GENERATION).write_bytes(ends.read_bytes())


GENERATION = "generation_config.json"  # which tokens end a text
