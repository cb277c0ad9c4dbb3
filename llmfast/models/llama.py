"""The Llama family (Touvron et al., 2023): Llama, SmolLM2, TinyLlama, Mistral, Qwen 2 and 3, SmolLM3, Granite.

    ids (B, T) -> embed_tokens[ids] -> blocks × [attention, MLP] -> RMSNorm -> head -> logits (B, T, V)

What changed since GPT-2: RMSNorm for LayerNorm, rotary positions (the queries and keys turn by their position) for a
learned table, a gated feed-forward layer (SwiGLU) for two plain ones, few key heads for many query heads, no biases.
Modules and parameters bear the checkpoint's names (`model.layers.0.self_attn.q_proj` …). Shapes: B sequences, T tokens,
C = hidden_size channels, H query heads and Hkv key heads of D channels, V tokens in the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.adapting import gated
from llmfast.models.architecture import (
    Arithmetic,
    HiddenSizes,
    Parameter,
    Role,
    Shape,
    positive_integers,
    positive_numbers,
    probabilities,
    token_ids,
    truth_values,
)
from llmfast.models.language_model import LanguageModel
from llmfast.models.layers import AddRMSNorm, Linear, RMSNorm, RotaryTable
from llmfast.models.rotary import RotarySettings

if TYPE_CHECKING:
    from llmfast.inference.cache import KVCache

# Hugging Face's names for the gate's activation -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Where a family's Hugging Face class has another default than `LlamaConfig`, for files that do not say.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, "bos_token_id": None, "eos_token_id": None},
    "smollm3": {
        **{"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True},
        **{"bos_token_id": 128000, "eos_token_id": 128001},
    },
    "granite": {"attention_multiplier": 1.0},
}
THETAS = {"smollm3": 2_000_000.0}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Settings that are read beside the fields, and settings that only sound as if they changed the arithmetic.
READ = {
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "model_type", "layer_types"),
    *("use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"),
}
HARMLESS = {"_attn_implementation", "attn_implementation", "_attn_implementation_internal", "is_llama_config"}
HARMLESS |= {"llmfast_quantization", "architectures", "_experts_implementation"}
# A setting that is not known, set to something, and has one of these in its name may change the arithmetic.
TELLING = (
    *(
        "attention",
        "attn",
        "bias",
        "norm",
        "rope",
        "rotary",
        "window",
        "softcap",
        "scal",
        "multiplier",
        "expert",
        "moe",
    ),
    *("mlp", "residual", "embedding", "alibi", "clip", "parallel", "layer", "quant", "activation", "head"),
)


@dataclass(frozen=True)
class LlamaConfig(HiddenSizes):
    """Hyperparameters of a model of the Llama family, named as in Hugging Face's `config.json`.

    `model_type` decides what has no switch of its own: Qwen 2 has biases on queries, keys and values, Qwen 3 normalises
    every head's queries and keys. Raises `ValueError` naming the field when a value is out of range.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # as many as there are query heads when None
    head_dim: int | None = None  # hidden_size / num_attention_heads when None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    rope: RotarySettings = RotarySettings()
    no_rope_blocks: tuple[int, ...] = ()  # blocks whose heads do not turn (SmolLM3)
    sliding_window: int | None = None  # a query sees this many keys, itself included
    window_blocks: tuple[int, ...] | None = None  # the blocks that have the window; None for all
    embedding_multiplier: float = 1.0  # Granite's four
    attention_multiplier: float | None = None  # instead of 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    model_types: ClassVar = tuple(FAMILY_DEFAULTS)
    prefix: ClassVar = "model."
    ops: ClassVar = ("causal_attention", "rms_norm", "add_rms_norm", "rotary", "gated_linear", "linear")

    def __post_init__(self) -> None:
        if self.model_type not in FAMILY_DEFAULTS:
            raise ValueError(f"model_type must be one of {', '.join(FAMILY_DEFAULTS)}, got {self.model_type!r}")
        positive_integers(self, *REQUIRED, "max_position_embeddings", "key_heads")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads must divide hidden_size where head_dim is not given, but "
                    f"{self.num_attention_heads} does not divide {self.hidden_size}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        positive_integers(self, "head_dim")
        if self.num_attention_heads % self.key_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, but {self.key_heads} does not divide "
                f"{self.num_attention_heads}"
            )
        if str(self.hidden_act) not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        positive_numbers(self, "rms_norm_eps", "initializer_range", "embedding_multiplier", "residual_multiplier")
        positive_numbers(self, "logits_scaling", *(["attention_multiplier"] if self.attention_multiplier else []))
        probabilities(self, "attention_dropout")
        truth_values(self, "tie_word_embeddings", "attention_bias", "mlp_bias")
        token_ids(self, "bos_token_id", "eos_token_id")
        if self.sliding_window is not None:
            positive_integers(self, "sliding_window")
        turning = int(self.head_channels * self.rope.partial_rotary_factor)
        if turning < 2 or turning % 2:
            raise ValueError(f"rotary positions need an even number of channels, got {turning} of {self.head_dim}")
        if self.rope.short_factor is not None and len(self.rope.short_factor) != turning // 2:
            raise ValueError(f"short_factor must have {turning // 2} numbers, got {len(self.rope.short_factor)}")

    @property
    def key_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_channels(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def end_tokens(self) -> tuple[int, ...]:
        ends = self.eos_token_id
        return () if ends is None else ends if isinstance(ends, tuple) else (ends,)

    @property
    def query_key_value_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def attention_out_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def query_key_norm(self) -> bool:
        return self.model_type == "qwen3"

    def window(self, block: int) -> int | None:
        """How many keys a query of this block sees at most, itself included; None for all."""
        here = self.window_blocks is None or block in self.window_blocks
        return self.sliding_window if here else None

    @classmethod
    def shaped(cls, shape: Shape, model_type: str) -> LlamaConfig:
        if shape.dropout > 0:
            raise ValueError(f"{model_type} has no dropout but of attention: set attention_dropout instead")
        # Three matrices of 8/3 of the width have as many weights as GPT-2's two of four times the width.
        usual = -(-8 * shape.width // 3 // 64) * 64
        return cls(
            model_type,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.context,
            hidden_size=shape.width,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            intermediate_size=usual if shape.inner_dim is None else shape.inner_dim,
            attention_dropout=shape.attention_dropout,
            tie_word_embeddings=shape.tie_word_embeddings,
            bos_token_id=shape.end_of_text,
            eos_token_id=shape.end_of_text,
        )

    def parameters(self) -> list[Parameter]:
        C, D, inner = self.hidden_size, self.head_channels, self.intermediate_size
        Q, KV = self.heads * D, self.key_heads * D

        def linear(name: str, out: int, within: int, role: Role, block: int, bias: bool) -> list[Parameter]:
            weight = Parameter(f"{name}.weight", (out, within), role, block)
            return [weight, Parameter(f"{name}.bias", (out,), role, block)] if bias else [weight]

        stated = [Parameter("model.embed_tokens.weight", (self.vocab_size, C), "token_embedding")]
        for block in range(self.num_hidden_layers):
            at, biased = f"model.layers.{block}", self.query_key_value_bias
            stated.append(Parameter(f"{at}.input_layernorm.weight", (C,), "attention_norm", block))
            stated += linear(f"{at}.self_attn.q_proj", Q, C, "query", block, biased)
            stated += linear(f"{at}.self_attn.k_proj", KV, C, "key", block, biased)
            stated += linear(f"{at}.self_attn.v_proj", KV, C, "value", block, biased)
            if self.query_key_norm:
                stated.append(Parameter(f"{at}.self_attn.q_norm.weight", (D,), "query_norm", block))
                stated.append(Parameter(f"{at}.self_attn.k_norm.weight", (D,), "key_norm", block))
            stated += linear(f"{at}.self_attn.o_proj", C, Q, "attention_out", block, self.attention_out_bias)
            stated.append(Parameter(f"{at}.post_attention_layernorm.weight", (C,), "mlp_norm", block))
            stated += linear(f"{at}.mlp.gate_proj", inner, C, "gate", block, self.mlp_bias)
            stated += linear(f"{at}.mlp.up_proj", inner, C, "up", block, self.mlp_bias)
            stated += linear(f"{at}.mlp.down_proj", C, inner, "mlp_out", block, self.mlp_bias)
        stated.append(Parameter("model.norm.weight", (C,), "final_norm"))
        if not self.tie_word_embeddings:
            stated.append(Parameter("lm_head.weight", (self.vocab_size, C), "head"))
        return stated

    def arithmetic(self) -> Arithmetic:
        scale = self.attention_multiplier
        return Arithmetic(
            norm="rms",
            norm_epsilon=self.rms_norm_eps,
            activation=ACTIVATIONS[self.hidden_act],  # type: ignore[arg-type]
            gated=True,
            attention_scale=self.head_channels**-0.5 if scale is None else scale,
            windows=tuple(self.window(block) for block in range(self.blocks)),
            rotary=self.rope.rotary(self.head_channels, self.context),
            rotary_blocks=tuple(block not in self.no_rope_blocks for block in range(self.blocks)),
            embedding_multiplier=self.embedding_multiplier,
            residual_multiplier=self.residual_multiplier,
            logits_divisor=self.logits_scaling,
        )

    def without_dropout(self) -> LlamaConfig:
        return self.replaced(attention_dropout=0.0)

    def replaced(self, **fields: Any) -> LlamaConfig:
        if self.head_dim == self.hidden_size // self.num_attention_heads:
            fields.setdefault("head_dim", None)  # it follows from the other two, unless it is given
        return super().replaced(**fields)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> LlamaConfig:
        family = document.get("model_type", "llama")
        if missing := [name for name in REQUIRED if document.get(name) is None]:
            raise ValueError(f"it does not say {', '.join(missing)}")
        fields = {field.name for field in dataclasses.fields(cls)}
        for name, value in document.items():
            neutral = value is None or value is False or value == "" or (value in (0, 1) and value is not True)
            if name in fields | READ | HARMLESS or name.endswith("_token_id"):
                continue
            if not neutral and any(part in name.lower() for part in TELLING):
                raise ValueError(f"it sets {name} to {value!r}, which this model does not compute")
        given = {name: value for name, value in document.items() if name in fields and value is not None}
        for name in ("head_dim", "bos_token_id", "eos_token_id", "sliding_window"):  # where null says something
            if name in document:
                given[name] = document[name]
        given = FAMILY_DEFAULTS.get(family, {}) | given
        if family != "granite":
            for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
                if given.get(name, 1.0) != 1.0:
                    raise ValueError(f"it sets {name} to {given[name]!r}, which {family} does not compute")
                given.pop(name, None)
        if isinstance(given.get("eos_token_id"), list):
            given["eos_token_id"] = tuple(given["eos_token_id"])
        given["rope"] = RotarySettings.from_document(document, THETAS.get(family, 10000.0))
        blocks = document["num_hidden_layers"]
        if isinstance(blocks, int) and 0 < blocks <= MOST_BLOCKS:
            given |= _windows(document, family, given.get("sliding_window"), blocks)
            if family == "smollm3":
                given["no_rope_blocks"] = _still_blocks(document, blocks)
        return cls(**given)

    def to_document(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        for name in ("rope", "no_rope_blocks", "window_blocks"):
            del document[name]
        document |= {"architectures": [ARCHITECTURES[self.model_type]], "num_key_value_heads": self.key_heads}
        document["pad_token_id"] = None  # or SmolLM3's class takes one beyond a small vocabulary
        document |= {"rope_theta": self.rope.rope_theta, "rope_parameters": self.rope.to_document()}
        if self.model_type in ("qwen2", "qwen3", "smollm3"):
            kinds = ["full_attention" if self.window(b) is None else "sliding_attention" for b in range(self.blocks)]
            document |= {"use_sliding_window": self.sliding_window is not None, "layer_types": kinds}
        elif self.window_blocks is not None and self.sliding_window is not None:
            raise ValueError(f"a {self.model_type} model has its window in every block or in none")
        if self.model_type == "smollm3":
            document["no_rope_layers"] = [int(block not in self.no_rope_blocks) for block in range(self.blocks)]
        if self.model_type == "granite":
            document["attention_multiplier"] = self.arithmetic().attention_scale
        else:
            for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
                del document[name]
        return document

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LlamaConfig:
        """A named shape, such as `LlamaConfig.preset("smollm2-135m")`; keyword arguments replace single fields."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**PRESETS[name]).replaced(**overrides)


MOST_BLOCKS = 10_000  # no list is made for more: a file that says so has no tensors for them either


def _windows(document: Mapping[str, Any], family: str, window: Any, blocks: int) -> dict[str, Any]:
    """`sliding_window` and `window_blocks`, by each family's rules."""
    if family in ("llama", "granite"):
        if window is not None:
            raise ValueError(f"it sets sliding_window to {window!r}, which {family} does not compute")
        return {"sliding_window": None}
    if family == "mistral":
        if document.get("layer_types") and set(document["layer_types"]) != {"sliding_attention"}:
            raise ValueError("it sets layer_types, which mistral does not compute")
        return {"sliding_window": window}
    if not document.get("use_sliding_window", False):
        return {"sliding_window": None}
    kinds = document.get("layer_types")
    if kinds is None and family == "smollm3":
        chosen = _still_blocks(document, blocks)
    elif kinds is None:
        chosen = tuple(range(min(blocks, document.get("max_window_layers", 28)), blocks))
    elif len(kinds) != blocks or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types must be {blocks} of full_attention and sliding_attention, got {kinds!r}")
    else:
        chosen = tuple(block for block, kind in enumerate(kinds) if kind == "sliding_attention")
    return {"sliding_window": 4096 if "sliding_window" not in document else window, "window_blocks": chosen}


def _still_blocks(document: Mapping[str, Any], blocks: int) -> tuple[int, ...]:
    """SmolLM3's blocks without rotary positions: 0 in `no_rope_layers`, by default every fourth."""
    turning = document.get("no_rope_layers")
    if turning is None:
        interval = document.get("no_rope_layer_interval", 4)
        return tuple(block for block in range(blocks) if (block + 1) % interval == 0)
    if not isinstance(turning, list) or len(turning) < blocks:
        raise ValueError(f"no_rope_layers must be one number for each of {blocks} blocks, got {turning!r}")
    return tuple(block for block in range(blocks) if not turning[block])


class Attention(nn.Module):
    """Every token looks at itself and the tokens before it; Hkv key heads serve H query heads."""

    def __init__(self, config: LlamaConfig, block: int):
        super().__init__()
        C, D, biased = config.hidden_size, config.head_channels, config.query_key_value_bias
        self.heads, self.key_heads, self.head_dim = config.heads, config.key_heads, D
        self.scale, self.dropout = config.arithmetic().attention_scale, config.attention_dropout
        self.window, self.turns = config.window(block), block not in config.no_rope_blocks
        self.q_proj = Linear(C, self.heads * D, bias=biased)
        self.k_proj = Linear(C, self.key_heads * D, bias=biased)
        self.v_proj = Linear(C, self.key_heads * D, bias=biased)
        self.o_proj = Linear(self.heads * D, C, bias=config.attention_out_bias)
        if config.query_key_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.normalises = config.query_key_norm

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: KVCache | None, block: int) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.key_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.key_heads, self.head_dim).transpose(1, 2)
        if self.normalises:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H or Hkv, T, D)
        if self.turns:
            q, k = ops.rotary(q, *turn), ops.rotary(k, *turn)
        if cache is not None:
            k, v = cache.append(block, k, v)  # (B, Hkv, S, D), S the tokens so far
        y = ops.causal_attention(
            q,
            k,
            v,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            kv_lengths=None if cache is None else cache.kv_lengths,
            window=self.window,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side again


class MLP(nn.Module):
    """Each token by itself: SwiGLU (Shazeer, 2020), down(act(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(C, inner, bias=bias)
        self.up_proj = Linear(C, inner, bias=bias)
        self.down_proj = Linear(inner, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        # Quantised weights are multiplied one after the other, and so are those that something is added to.
        if not isinstance(gate, Linear) or gate.adapter is not None or up.adapter is not None:
            if torch.is_grad_enabled():
                return self.down_proj(gated(gate(x), up(x), self.activation))
            return self.down_proj(gate(x, self.activation) * up(x))
        return self.down_proj(ops.gated_linear(x, gate.weight, up.weight, gate.bias, up.bias, self.activation))


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)), every addition fused with the norm after it (as in GPT-2)."""

    def __init__(self, config: LlamaConfig, block: int):
        super().__init__()
        self.input_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, block)
        self.post_attention_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.multiplier = config.residual_multiplier

    def forward(
        self, branch: Tensor | None, residual: Tensor, turn: tuple[Tensor, Tensor], cache: KVCache | None, block: int
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.input_layernorm(branch, residual)
        branch = self.scaled(self.self_attn(normed, turn, cache, block))
        normed, residual = self.post_attention_layernorm(branch, residual)
        return self.scaled(self.mlp(normed)), residual

    def scaled(self, branch: Tensor) -> Tensor:
        return branch if self.multiplier == 1.0 else branch * self.multiplier


class Decoder(nn.Module):
    """Everything below the head: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, block) for block in range(config.blocks))
        self.norm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.turn = RotaryTable(config.rope.rotary(config.head_channels, config.context))
        self.embedding_multiplier, self.logits_scaling = config.embedding_multiplier, config.logits_scaling

    def forward(self, ids: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        residual = self.embed_tokens(ids)  # (B, T, C)
        if self.embedding_multiplier != 1.0:
            residual = residual * self.embedding_multiplier
        turn = self.turn(positions if positions.ndim == 2 else positions.unsqueeze(0))
        branch = None
        for number, block in enumerate(self.layers):
            branch, residual = block(branch, residual, turn, cache, number)
        hidden = self.norm(branch, residual)[0]
        return hidden if self.logits_scaling == 1.0 else hidden / self.logits_scaling


class Llama(LanguageModel):
    """A language model of the Llama family.

    >>> model = Llama(LlamaConfig.preset("smollm2-135m"))
    >>> logits = model(ids)                      # (B, T) int64 -> (B, T, V)
    >>> loss = model.loss(ids, targets)          # mean nats a token, without holding the logits
    """

    config_class = LlamaConfig
    config: LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def token_embedding(self) -> Any:
        return self.model.embed_tokens

    @property
    def final_norm(self) -> Any:
        return self.model.norm

    @property
    def block_modules(self) -> nn.ModuleList:
        return self.model.layers

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        return self.model(ids, positions, cache)


_SMOLLM2: dict[str, Any] = {"vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
_SMOLLM2 |= {"tie_word_embeddings": True, "rope": RotarySettings(rope_theta=100_000.0)}
_LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
_LLAMA_3 |= {"tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": (128001, 128008, 128009)}
_LLAMA_3 |= {
    "rope": RotarySettings(
        rope_theta=500_000.0,
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
}
_QWEN: dict[str, Any] = {"vocab_size": 151936, "tie_word_embeddings": True, "rope": RotarySettings(rope_theta=1e6)}
_QWEN |= {"bos_token_id": None, "eos_token_id": 151643}


def _shape(width: int, inner: int, blocks: int, heads: int, key_heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (width, inner, blocks, heads, key_heads), strict=True))


# The shapes people know, as fields of `LlamaConfig`, and a small one to train.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-small": _shape(384, 1024, 4, 6, 2)
    | {"vocab_size": 4000, "max_position_embeddings": 256, "tie_word_embeddings": True},
    "smollm2-135m": _shape(576, 1536, 30, 9, 3) | _SMOLLM2,
    "smollm2-360m": _shape(960, 2560, 32, 15, 5) | _SMOLLM2,
    "smollm2-1.7b": _shape(2048, 8192, 24, 32, 32) | _SMOLLM2 | {"rope": RotarySettings(rope_theta=130_000.0)},
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, 4) | {"rms_norm_eps": 1e-5},
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8) | _LLAMA_3,
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8) | _LLAMA_3,
    "mistral-7b": _shape(4096, 14336, 32, 32, 8)
    | {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
    | {"rope": RotarySettings(rope_theta=1e6)},
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2) | _QWEN | {"model_type": "qwen2", "max_position_embeddings": 32768},
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, 8)
    | _QWEN
    | {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960},
    "smollm3-3b": _shape(2048, 11008, 36, 16, 4)
    | {"model_type": "smollm3", "vocab_size": 128256, "max_position_embeddings": 65536, "tie_word_embeddings": True}
    | {"no_rope_blocks": tuple(range(3, 36, 4)), "rope": RotarySettings(rope_theta=5e6)}
    | {"bos_token_id": None, "eos_token_id": 128012},
    "granite-3.1-2b": _shape(2048, 8192, 40, 32, 8)
    | {"model_type": "granite", "vocab_size": 49155, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    | {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22}
    | {"logits_scaling": 8.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
    | {"rope": RotarySettings(rope_theta=5e6)},
}
