"""The shape of a GPT: GPT-2's hyperparameters under GPT-2's names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# Hugging Face's names for GELU -> the `approximate` argument of `ops.gelu`.
GELU_APPROXIMATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


@dataclass(frozen=True)
class GPTConfig:
    """Hyperparameters of a GPT-2-family model (Radford et al., 2019), named as in Hugging Face's `config.json`.

    Raises `ValueError` naming the field when a value is out of range or the head count does not divide the width.
    """

    vocab_size: int = 50257
    n_positions: int = 1024  # the context: how many tokens the model can look at
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the feed-forward layer; 4 * n_embd when None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd, but {self.n_head} does not divide {self.n_embd}")
        if str(self.activation_function) not in GELU_APPROXIMATIONS:
            known = ", ".join(GELU_APPROXIMATIONS)
            raise ValueError(f"activation_function must be one of {known}, got {self.activation_function!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings must be True or False, got {self.tie_word_embeddings!r}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def gelu_approximate(self) -> str:
        return GELU_APPROXIMATIONS[self.activation_function]

    @property
    def num_parameters(self) -> int:
        """How many numbers a model of this shape learns (a tied head counts once)."""
        C, inner = self.n_embd, self.inner_dim
        block = (C * 3 * C + 3 * C) + (C * C + C) + (C * inner + inner) + (inner * C + C) + 4 * C
        head = 0 if self.tie_word_embeddings else self.vocab_size * C
        return (self.vocab_size + self.n_positions) * C + self.n_layer * block + 2 * C + head

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """A named shape, such as `GPTConfig.preset("gpt2")`; keyword arguments replace single fields."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **overrides)


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> GPTConfig:
    return GPTConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head, bos_token_id=50256, eos_token_id=50256)


PRESETS = {
    "gpt2": _gpt2(768, 12, 12),  # 124 M parameters
    "gpt2-medium": _gpt2(1024, 24, 16),  # 355 M
    "gpt2-large": _gpt2(1280, 36, 20),  # 774 M
    "gpt2-xl": _gpt2(1600, 48, 25),  # 1.56 B
    "stories": GPTConfig(
        vocab_size=4000, n_positions=512, n_embd=256, n_layer=6, n_head=4
    ),  # 5.9 M, the embedded model
}
