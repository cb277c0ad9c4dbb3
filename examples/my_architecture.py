"""An architecture of your own, in one file: a block whose two branches run side by side, as in GPT-J.

    x = x + attention(norm(x)) + mlp(norm(x))

It states its parameters (`parameters`), computes (`decode`), and joins with one line at the end. From then on files,
generating, scoring, quantising, training and counting know it. `docs/add-an-architecture.md` walks through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.models import LanguageModel, ModelConfig, Parameter, Shape, register_family
from llmfast.models.layers import Linear, RMSNorm, RotaryTable
from llmfast.models.rotary import RotarySettings

if TYPE_CHECKING:
    from llmfast.inference.cache import KVCache


@dataclass(frozen=True)
class ParallelConfig(ModelConfig):
    """The shape: V tokens, C channels, `blocks` blocks of `heads` heads, `inner_dim` channels inside the MLP."""

    vocab_size: int = 4000
    width: int = 128  # type: ignore[assignment]
    blocks: int = 4  # type: ignore[assignment]
    heads: int = 4  # type: ignore[assignment]
    inner_dim: int = 512  # type: ignore[assignment]
    context: int = 256  # type: ignore[assignment]
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None

    model_types: ClassVar = ("parallel",)
    prefix: ClassVar = "body."
    ops: ClassVar = ("causal_attention", "rms_norm", "rotary", "linear")

    @property
    def key_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def shaped(cls, shape: Shape, model_type: str) -> ParallelConfig:
        if shape.dropout or shape.attention_dropout or shape.key_heads not in (None, shape.heads):
            raise ValueError(f"{model_type} has no dropout, and a key head for each head")
        inner = shape.inner_dim or 4 * shape.width
        sizes = shape.vocab_size, shape.width, shape.blocks, shape.heads, inner, shape.context
        return cls(*sizes, shape.tie_word_embeddings, shape.end_of_text)

    def parameters(self) -> list[Parameter]:
        C = self.width
        stated = [Parameter("body.tokens.weight", (self.vocab_size, C), "token_embedding")]
        for block in range(self.blocks):
            at = f"body.blocks.{block}"
            stated += [
                Parameter(f"{at}.norm.weight", (C,), "attention_norm", block),
                Parameter(f"{at}.qkv.weight", (3 * C, C), "query_key_value", block),
                Parameter(f"{at}.out.weight", (C, C), "attention_out", block),
                Parameter(f"{at}.widen.weight", (self.inner_dim, C), "mlp_in", block),
                Parameter(f"{at}.narrow.weight", (C, self.inner_dim), "mlp_out", block),
            ]
        stated.append(Parameter("body.norm.weight", (C,), "final_norm"))
        if not self.tie_word_embeddings:
            stated.append(Parameter("lm_head.weight", (self.vocab_size, C), "head"))
        return stated


class Block(nn.Module):
    def __init__(self, config: ParallelConfig):
        super().__init__()
        C, self.heads = config.width, config.heads
        self.norm = RMSNorm(C, 1e-6)
        self.qkv, self.out = Linear(C, 3 * C, bias=False), Linear(C, C, bias=False)
        self.widen, self.narrow = Linear(C, config.inner_dim, bias=False), Linear(config.inner_dim, C, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: KVCache | None, block: int) -> Tensor:
        B, T, C = x.shape
        normed = self.norm(x)
        q, k, v = self.qkv(normed).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D)
        q, k = ops.rotary(q, *turn), ops.rotary(k, *turn)
        if cache is not None:
            k, v = cache.append(block, k, v)
        y = ops.causal_attention(q, k, v, kv_lengths=None if cache is None else cache.kv_lengths)
        attended = self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + attended + self.narrow(self.widen(normed, "gelu_tanh"))


class Body(nn.Module):
    def __init__(self, config: ParallelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = RMSNorm(config.width, 1e-6)
        self.turn = RotaryTable(RotarySettings().rotary(config.head_dim, config.context))

    def forward(self, ids: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        x, turn = self.tokens(ids), self.turn(positions if positions.ndim == 2 else positions.unsqueeze(0))
        for number, block in enumerate(self.blocks):
            x = block(x, turn, cache, number)
        return self.norm(x)


@register_family
class Parallel(LanguageModel):
    config_class = ParallelConfig

    def __init__(self, config: ParallelConfig):
        super().__init__(config)
        self.body = Body(config)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.tie_head()
        for parameter in self.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02)

    @property
    def token_embedding(self) -> Any:
        return self.body.tokens

    @property
    def final_norm(self) -> Any:
        return self.body.norm

    @property
    def block_modules(self) -> nn.ModuleList:
        return self.body.blocks

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        return self.body(ids, positions, cache)
