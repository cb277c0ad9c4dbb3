"""From the vectors of a text's tokens to one of the text: what a model's files say of it, and the arithmetic.

Sentence-transformers' files are read: `modules.json` lists the steps, `1_Pooling/config.json` says how tokens become
one vector, `sentence_bert_config.json` how many of them are looked at.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.tokenizers.protocol import read_json

KINDS = ("mean", "first", "last")  # of a text's tokens
# What sentence-transformers calls them, old and new.
OLD_NAMES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}
NEW_NAMES = {"mean": "mean", "cls": "first", "lasttoken": "last"}


@dataclass(frozen=True)
class Pooling:
    """`kind` is one of `KINDS`; `normalised` vectors have length 1; of a longer text only `max_tokens` count."""

    kind: str = "mean"
    normalised: bool = True
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"pooling must be {', '.join(KINDS)}, got {self.kind!r}")

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """hidden (B, T, C), of which lengths (B,) tokens count, the padding after them not -> (B, C) float32."""
        hidden = hidden.float()
        if self.kind == "mean":
            there = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            vectors = (hidden * there[:, :, None]).sum(1) / lengths[:, None]
        elif self.kind == "first":
            vectors = hidden[:, 0]
        else:
            vectors = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        return self.scaled(vectors)

    def scaled(self, vectors: Tensor) -> Tensor:
        """(B, C), of length 1 where they are to be."""
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalised else vectors


def read_pooling(directory: Path) -> Pooling:
    """What the files of a model say; the mean, normalised, where they say nothing. `ValueError` names a step that is
    not computed here."""
    steps = _steps(directory / "modules.json")
    if steps is None:
        return Pooling()
    kind, normalised, max_tokens = "mean", False, None
    for name, path in steps:
        folder = directory / path
        if name == "Transformer":
            limits = folder / "sentence_bert_config.json"
            max_tokens = read_json(limits).get("max_seq_length") if limits.exists() else None
            if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 3):
                raise ValueError(f"{limits}: max_seq_length should be a number of tokens, got {max_tokens!r}")
        elif name == "Pooling":
            kind = _kind(folder / "config.json")
        elif name == "Normalize":
            normalised = True
        else:
            raise ValueError(f"{directory / 'modules.json'} has a step {name}, which is not computed here")
    return Pooling(kind, normalised, max_tokens)


def _steps(file: Path) -> list[tuple[str, str]] | None:
    """The class of each step, and the folder of its settings."""
    if not file.exists():
        return None
    try:
        steps = json.loads(file.read_text(encoding="utf-8"))
        found = [(str(step["type"]).rpartition(".")[2], str(step["path"])) for step in steps]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is no list of steps: {error!r}") from None
    if outside := [path for _, path in found if Path(path).is_absolute() or ".." in Path(path).parts]:
        raise ValueError(f"{file} names a folder outside of its own: {outside[0]}")
    return found


def _kind(file: Path) -> str:
    document: dict[str, Any] = read_json(file)
    named = document.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [name for name, on in document.items() if on is True]
    known = NEW_NAMES if isinstance(named, str) else OLD_NAMES
    modes = [mode for mode in modes if mode in known or mode.startswith("pooling_mode")]
    if len(modes) != 1 or modes[0] not in known:
        asked = ", ".join(modes) or "no pooling"
        raise ValueError(f"{file} asks for {asked}; one of {', '.join(known)} is computed here")
    return known[modes[0]]
