"""Every head of a model on one self-contained page: no network, no library. Hover over a head or a word."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PAGE = Path(__file__).with_name("attention.html")


class AttentionPage:
    """`weights` is (L, H, T, T), the attention of every head on `tokens`, T texts. A notebook shows it as it is."""

    def __init__(self, tokens: Sequence[str], weights: Tensor):
        if weights.ndim != 4 or weights.shape[2:] != (len(tokens), len(tokens)):
            raise ValueError(f"weights must be (L, H, T, T) for T = {len(tokens)} tokens, got {tuple(weights.shape)}")
        levels = (weights.float().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        parts = {
            "WEIGHTS": base64.b64encode(levels.numpy().tobytes()).decode(),
            "TOKENS": json.dumps(list(tokens)).replace("<", "\\u003c"),  # a token may be a tag
            "LAYERS": str(weights.shape[0]),
            "HEADS": str(weights.shape[1]),
        }
        self.fragment = PAGE.read_text(encoding="utf-8")
        for name in ("LAYERS", "HEADS", "WEIGHTS", "TOKENS"):
            self.fragment = self.fragment.replace(name, parts[name])

    def _repr_html_(self) -> str:
        return self.fragment

    def save(self, path: str | Path, title: str = "Attention") -> Path:
        """Writes a page for a browser."""
        head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        Path(path).write_text(head + self.fragment, encoding="utf-8")
        return Path(path)
