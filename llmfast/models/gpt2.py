"""GPT-2 (Radford et al., 2019): token ids in, logits out.

    ids (B, T) -> wte[ids] + wpe[positions] -> n_layer × [attention, MLP] -> LayerNorm -> wteᵀ -> logits (B, T, V)

A pre-LN transformer decoder. Modules and parameters bear the checkpoint's names (`transformer.h.0.attn.c_attn` …).
All arithmetic worth a kernel goes through `llmfast.ops`, which picks the backend. Shapes: B sequences, T tokens,
C = n_embd channels, H heads of D = C / H channels, V tokens in the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from llmfast import ops
from llmfast.models.architecture import (
    Arithmetic,
    ModelConfig,
    Parameter,
    Role,
    Shape,
    positive_integers,
    positive_numbers,
    probabilities,
    token_ids,
    truth_values,
)
from llmfast.models.dropout import Dropout
from llmfast.models.language_model import LanguageModel
from llmfast.models.layers import AddLayerNorm, Linear

if TYPE_CHECKING:
    from llmfast.inference.cache import KVCache

# Hugging Face's names for GELU -> ours.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Settings of Hugging Face's GPT-2 that change the arithmetic, with the only value that is computed here.
FIXED_SETTINGS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
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

    model_types: ClassVar = ("gpt2",)
    prefix: ClassVar = "transformer."
    ops: ClassVar = ("causal_attention", "layer_norm", "add_layer_norm", "linear")

    def __post_init__(self) -> None:
        positive_integers(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        if self.n_inner is not None:
            positive_integers(self, "n_inner")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd, but {self.n_head} does not divide {self.n_embd}")
        if str(self.activation_function) not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation_function must be one of {known}, got {self.activation_function!r}")
        positive_numbers(self, "layer_norm_epsilon", "initializer_range")
        probabilities(self, "embd_pdrop", "attn_pdrop", "resid_pdrop")
        truth_values(self, "tie_word_embeddings")
        token_ids(self, "bos_token_id", "eos_token_id")

    @property
    def context(self) -> int:
        return self.n_positions

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def blocks(self) -> int:
        return self.n_layer

    @property
    def heads(self) -> int:
        return self.n_head

    @property
    def key_heads(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return () if self.eos_token_id is None else (self.eos_token_id,)

    @classmethod
    def shaped(cls, shape: Shape, model_type: str) -> GPTConfig:
        if shape.key_heads not in (None, shape.heads):
            raise ValueError(f"{model_type} has a key head for each of its {shape.heads} heads, not {shape.key_heads}")
        return cls(
            vocab_size=shape.vocab_size,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.blocks,
            n_head=shape.heads,
            n_inner=shape.inner_dim,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.attention_dropout,
            resid_pdrop=shape.dropout,
            tie_word_embeddings=shape.tie_word_embeddings,
            bos_token_id=shape.end_of_text,
            eos_token_id=shape.end_of_text,
        )

    def parameters(self) -> list[Parameter]:
        C, inner = self.n_embd, self.inner_dim

        def linear(name: str, out: int, within: int, role: Role, block: int) -> list[Parameter]:
            return [
                Parameter(f"{name}.weight", (out, within), role, block, transposed=True),
                Parameter(f"{name}.bias", (out,), role, block),
            ]

        def norm(name: str, role: Role, block: int | None = None) -> list[Parameter]:
            return [Parameter(f"{name}.{part}", (C,), role, block) for part in ("weight", "bias")]

        stated = [
            Parameter("transformer.wte.weight", (self.vocab_size, C), "token_embedding"),
            Parameter("transformer.wpe.weight", (self.n_positions, C), "position_embedding"),
        ]
        for block in range(self.n_layer):
            at = f"transformer.h.{block}"
            stated += norm(f"{at}.ln_1", "attention_norm", block)
            stated += linear(f"{at}.attn.c_attn", 3 * C, C, "query_key_value", block)
            stated += linear(f"{at}.attn.c_proj", C, C, "attention_out", block)
            stated += norm(f"{at}.ln_2", "mlp_norm", block)
            stated += linear(f"{at}.mlp.c_fc", inner, C, "mlp_in", block)
            stated += linear(f"{at}.mlp.c_proj", C, inner, "mlp_out", block)
        stated += norm("transformer.ln_f", "final_norm")
        if not self.tie_word_embeddings:
            stated.append(Parameter("lm_head.weight", (self.vocab_size, C), "head"))
        return stated

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(
            norm="layer",
            norm_epsilon=self.layer_norm_epsilon,
            activation=ACTIVATIONS[self.activation_function],  # type: ignore[arg-type]
            gated=False,
            attention_scale=self.head_dim**-0.5,
            windows=(None,) * self.n_layer,
        )

    def without_dropout(self) -> GPTConfig:
        return self.replaced(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> GPTConfig:
        for name, computed in FIXED_SETTINGS.items():
            if document.get(name, computed) != computed:
                raise ValueError(f"it sets {name} to {document[name]}, which this model does not compute")
        given = {"n_positions": document.get("n_ctx", 1024)} | dict(document)
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in known})

    def to_document(self) -> dict[str, Any]:
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | dataclasses.asdict(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """A named shape, such as `GPTConfig.preset("gpt2")`; keyword arguments replace single fields."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return PRESETS[name].replaced(**overrides)


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


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and the tokens before it, in H heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads at once
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D), S the tokens so far
        y = ops.causal_attention(
            q,
            k,
            v,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            kv_lengths=None if cache is None else cache.kv_lengths,
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token by itself: widen, GELU, narrow."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.c_fc = Linear(config.n_embd, config.inner_dim)
        self.c_proj = Linear(config.inner_dim, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.c_fc(x, self.activation)))


class Block(nn.Module):
    """x = x + attention(ln_1(x)); x = x + mlp(ln_2(x)).

    Written so that every addition is fused with the LayerNorm after it: a block receives the branch not yet added
    and the residual stream, and hands on its own last branch and the stream.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = AddLayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = AddLayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, branch: Tensor | None, residual: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.ln_1(branch, residual)
        branch = self.attn(normed, cache, layer)
        normed, residual = self.ln_2(branch, residual)
        return self.mlp(normed), residual


class Transformer(nn.Module):
    """Everything below the head: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # where it stands
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = AddLayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, ids: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        residual = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        branch = None
        for layer, block in enumerate(self.h):
            branch, residual = block(branch, residual, cache, layer)
        return self.ln_f(branch, residual)[0]


class GPT(LanguageModel):
    """A GPT-2-family language model.

    >>> model = GPT(GPTConfig.preset("gpt2"))
    >>> logits = model(ids)                      # (B, T) int64 -> (B, T, V)
    >>> loss = model.loss(ids, targets)          # mean nats a token, without holding the logits
    """

    config_class = GPTConfig
    config: GPTConfig

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_head()
        self.apply(self._init_weights)
        # The residual stream sums 2 · n_layer branches; their last layers start smaller by the root of that.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=config.initializer_range / (2 * config.n_layer) ** 0.5)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def token_embedding(self) -> Any:
        return self.transformer.wte

    @property
    def final_norm(self) -> Any:
        return self.transformer.ln_f

    @property
    def block_modules(self) -> nn.ModuleList:
        return self.transformer.h

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        return self.transformer(ids, positions, cache)
