"""BERT (Devlin et al., 2019), the encoder: token ids in, a vector for every token out.

    ids (B, T) -> LayerNorm(word[ids] + position + type[0]) -> blocks × [attention, MLP] -> hidden states (B, T, C)

A post-LN transformer: each branch is added to the stream, and the sum is normalised. Every token sees every other one,
and all texts are of type 0. Modules and parameters bear the checkpoint's names (`bert.encoder.layer.0 …`); its pooler
and the heads of its training are not read. Shapes: B texts, T tokens, C = hidden_size channels, H heads of D = C / H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.models.architecture import (
    Arithmetic,
    HiddenSizes,
    Parameter,
    Role,
    positive_integers,
    positive_numbers,
)
from llmfast.models.layers import AddLayerNorm, Linear

if TYPE_CHECKING:
    from typing_extensions import Self

# Hugging Face's names for GELU -> ours.
ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Settings of Hugging Face's BERT that change the arithmetic, with the only value that is computed here.
FIXED_SETTINGS = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


@dataclass(frozen=True)
class BertConfig(HiddenSizes):
    """Hyperparameters of a BERT, named as in Hugging Face's `config.json`.

    Raises `ValueError` naming the field when a value is out of range or the head count does not divide the width.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    model_types: ClassVar = ("bert",)
    prefix: ClassVar = "bert."
    unused: ClassVar = ("bert.pooler.", "bert.cls.", "bert.embeddings.position_ids")
    ops: ClassVar = ("bidirectional_attention", "layer_norm", "add_layer_norm", "linear")
    generates: ClassVar = False
    tie_word_embeddings: ClassVar = False  # type: ignore[misc]  # no setting here: there is no head
    bos_token_id: ClassVar = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        positive_integers(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        positive_integers(self, "intermediate_size", "max_position_embeddings", "type_vocab_size")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size, but {self.num_attention_heads} does not divide "
                f"{self.hidden_size}"
            )
        if str(self.hidden_act) not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        positive_numbers(self, "layer_norm_eps", "initializer_range")

    @property
    def key_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def parameters(self) -> list[Parameter]:
        C, inner = self.hidden_size, self.intermediate_size

        def both(name: str, role: Role, *shape: int, block: int | None = None) -> list[Parameter]:
            weight = Parameter(f"bert.{name}.weight", shape, role, block)
            return [weight, Parameter(f"bert.{name}.bias", shape[:1], role, block)]

        found = [
            Parameter("bert.embeddings.word_embeddings.weight", (self.vocab_size, C), "token_embedding"),
            Parameter("bert.embeddings.position_embeddings.weight", (self.context, C), "position_embedding"),
            Parameter("bert.embeddings.token_type_embeddings.weight", (self.type_vocab_size, C), "type_embedding"),
            *both("embeddings.LayerNorm", "embedding_norm", C),
        ]
        for b in range(self.blocks):
            layer = f"encoder.layer.{b}"
            found += both(f"{layer}.attention.self.query", "query", C, C, block=b)
            found += both(f"{layer}.attention.self.key", "key", C, C, block=b)
            found += both(f"{layer}.attention.self.value", "value", C, C, block=b)
            found += both(f"{layer}.attention.output.dense", "attention_out", C, C, block=b)
            found += both(f"{layer}.attention.output.LayerNorm", "attention_norm", C, block=b)
            found += both(f"{layer}.intermediate.dense", "mlp_in", inner, C, block=b)
            found += both(f"{layer}.output.dense", "mlp_out", C, inner, block=b)
            found += both(f"{layer}.output.LayerNorm", "mlp_norm", C, block=b)
        return found

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(
            norm="layer",
            norm_epsilon=self.layer_norm_eps,
            activation=ACTIVATIONS[self.hidden_act],
            gated=False,
            attention_scale=self.head_dim**-0.5,
            windows=(None,) * self.blocks,
        )

    def flops_per_token(self, keys: float) -> float:
        """Floating-point operations for one token in a text of `keys` tokens: 2 a product, and no head."""
        matrices = sum(p.size for p in self.parameters() if p.is_matrix and p.block is not None)
        return 2.0 * matrices + 4.0 * keys * self.blocks * self.hidden_size

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        for name, value in FIXED_SETTINGS.items():
            if document.get(name, value) != value:
                raise ValueError(f"it sets {name} to {document[name]!r}, and only {value!r} is computed here")
        return super().from_document(document)

    def to_document(self) -> dict[str, Any]:
        return {"model_type": "bert", "architectures": ["BertModel"]} | dataclasses.asdict(self)


class Embeddings(nn.Module):
    """What a token is, where it stands, and the type of its text, normalised together."""

    def __init__(self, config: BertConfig):
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, C)
        self.position_embeddings = nn.Embedding(config.context, C)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, C)
        self.LayerNorm = AddLayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        place = self.position_embeddings.weight[: ids.shape[1]] + self.token_type_embeddings.weight[0]  # (T, C)
        return self.LayerNorm(None, self.word_embeddings(ids) + place)[0]


class Heads(nn.Module):
    """Query, key and value of all heads: every token looks at all of its text."""

    def __init__(self, config: BertConfig):
        super().__init__()
        C = config.hidden_size
        self.heads = config.heads
        self.query, self.key, self.value = Linear(C, C), Linear(C, C), Linear(C, C)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)  # (B, H, T, D)
            for part in (self.query, self.key, self.value)
        )
        y = ops.bidirectional_attention(q, k, v, kv_lengths=lengths)
        return y.transpose(1, 2).reshape(B, T, C)  # heads side by side again


class Output(nn.Module):
    """The end of a branch: narrows it, adds it to the stream, normalises the sum."""

    def __init__(self, inner: int, config: BertConfig):
        super().__init__()
        self.dense = Linear(inner, config.hidden_size)
        self.LayerNorm = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(branch), x)[0]


class Attention(nn.Module):
    """x = norm(x + attention(x))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = Heads(config)
        self.output = Output(config.hidden_size, config)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self.output(self.self(x, lengths), x)


class Intermediate(nn.Module):
    """Each token by itself: widen, GELU."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x, self.activation)


class Layer(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = self.attention(x, lengths)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.blocks))

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, lengths)
        return x


class Trunk(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        return self.encoder(self.embeddings(ids), lengths)


class Bert(nn.Module):
    """An encoder of the BERT family.

    >>> model = Bert(BertConfig())
    >>> hidden = model(ids, lengths)             # (B, T) int64, (B,) int64 -> (B, T, C)
    """

    config_class: ClassVar = BertConfig

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Trunk(config)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    @property
    def block_modules(self) -> nn.ModuleList:
        return self.bert.encoder.layer

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The last hidden states: (B, T) int64 -> (B, T, C). `lengths` (B,) integers are those of texts that padding on
        the right follows, whose own hidden states mean nothing; None where all have T tokens."""
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be (B, T) int64, got {tuple(ids.shape)} {ids.dtype}")
        if ids.shape[1] > self.config.context:
            raise ValueError(f"{ids.shape[1]} tokens do not fit the context of {self.config.context}")
        return self.bert(ids, lengths)
