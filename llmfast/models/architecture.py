"""What every architecture states of itself, once: its parameters, and the arithmetic between them.

Counting parameters, bytes and operations, reading and writing files, choosing formats, packing for the native decoder,
sharding and weight decay all iterate over `ModelConfig.parameters()`; a decoder that computes the blocks by
itself reads `ModelConfig.arithmetic()`. Neither holds a tensor of the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

Role = Literal[
    "token_embedding",  # (V, C), looked up by token
    "position_embedding",  # (context, C), looked up by position
    "type_embedding",  # (types, C), looked up by the kind of text that a token is of
    "embedding_norm",  # of what was looked up
    "attention_norm",  # before attention, or after it in an encoder
    "query_key_value",  # the three projections as one, (3C, C)
    "query",
    "key",
    "value",
    "query_norm",  # of every head by itself, (D,)
    "key_norm",
    "attention_out",
    "mlp_norm",  # before the feed-forward layers
    "mlp_in",  # widens, (inner, C)
    "gate",  # a gated one's two: act(gate) · up
    "up",
    "mlp_out",  # narrows, (C, inner)
    "final_norm",
    "head",  # (V, C)
]
# Weights that are multiplied with every token's vector, or looked up by it: what quantising and packing is about.
MATRICES = frozenset(
    ["token_embedding", "query_key_value", "query", "key", "value", "attention_out", "mlp_in", "gate", "up", "mlp_out"]
    + ["head"]
)
ENDS = frozenset(["token_embedding", "head"])  # the two matrices outside of the blocks


@dataclass(frozen=True)
class Parameter:
    """One tensor that is learned.

    `name` is that of the state dict, which is Hugging Face's; a weight's bias has its role. `transposed` says that
    files in Hugging Face's layout hold it as (in, out).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    block: int | None = None  # counted from 0; None outside of the blocks
    transposed: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2 and self.role in MATRICES


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., 2021): channel pair i of a head turns by position · inverse_frequencies[i].

    The first 2 · len(inverse_frequencies) channels of a head turn, in halves (i, i + R/2); the rest pass. `factor`
    multiplies cosine and sine (YaRN's attention factor).
    """

    inverse_frequencies: Tensor  # (R / 2,) float32, on the CPU
    factor: float = 1.0


@dataclass(frozen=True)
class Arithmetic:
    """What a block computes, for decoders that do so without the module:

    x = embedding_multiplier · token_embedding[ids] (+ position_embedding)
    x = x + residual_multiplier · attention(norm(x));  x = x + residual_multiplier · mlp(norm(x))
    logits = head(final_norm(x)) / logits_divisor

    An encoder's block has its norms behind the sums: x = norm(x + attention(x)); x = norm(x + mlp(x)).
    """

    norm: Literal["layer", "rms"]
    norm_epsilon: float
    activation: Literal["gelu_tanh", "gelu", "silu"]
    gated: bool
    attention_scale: float
    windows: tuple[int | None, ...]  # of each block: a query at p sees only keys > p - window
    rotary: Rotary | None = None
    rotary_blocks: tuple[bool, ...] = ()  # of each block: do its heads turn?
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0


@dataclass(frozen=True)
class Shape:
    """What a new model is to be, in words that every family understands."""

    vocab_size: int
    context: int
    width: int
    blocks: int
    heads: int
    key_heads: int | None = None  # as many as there are heads when None
    inner_dim: int | None = None  # what the family usually has when None
    dropout: float = 0.0  # of embeddings and residual branches
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    end_of_text: int | None = None  # the token that begins and ends a text


class ModelConfig:
    """The hyperparameters of an architecture, and what the rest of the house may ask of any of them.

    A subclass is a frozen dataclass whose fields bear the names of its family's `config.json`.
    """

    model_types: ClassVar[tuple[str, ...]]  # of config.json
    prefix: ClassVar[str]  # of names in the state dict, which a file of the bare decoder may lack
    unused: ClassVar[tuple[str, ...]] = ()  # how names begin of tensors in files which the forward pass has no use for
    ops: ClassVar[tuple[str, ...]]  # of the contract, which its forward pass calls
    generates: ClassVar[bool] = True  # text; False of an encoder, which has no head
    tie_word_embeddings: bool  # the head is the token embedding
    vocab_size: int
    bos_token_id: int | None
    head_dim: Any  # D, the channels of a head, an int; a property or a field

    @property
    def context(self) -> int:
        """How many tokens the model can look at."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """C, the channels of the residual stream."""
        raise NotImplementedError

    @property
    def blocks(self) -> int:
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """H, of the queries."""
        raise NotImplementedError

    @property
    def key_heads(self) -> int:
        """Of keys and values, each of which heads / key_heads query heads share."""
        raise NotImplementedError

    @property
    def inner_dim(self) -> int:
        """The width inside the feed-forward layers."""
        raise NotImplementedError

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return ()

    @classmethod
    def shaped(cls, shape: Shape, model_type: str) -> ModelConfig:
        """A new model to train. `ValueError` for what the family has no place for: by default, all of it."""
        raise ValueError(f"{model_type} models are not trained from nothing: {cls.__name__} has no `shaped`")

    def parameters(self) -> list[Parameter]:
        """Every tensor of a model of this shape, in the order in which it computes; a tied head is not one."""
        raise NotImplementedError

    def arithmetic(self) -> Arithmetic | None:
        """Its block, for a decoder that computes without the module; None for one that only the module computes."""
        return None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """What a `config.json` says. `ValueError` names a setting that is missing, wrong or not computed here."""
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in document.items() if name in known})

    def to_document(self) -> dict[str, Any]:
        """The `config.json`; for a family that Hugging Face has, as its class reads it."""
        return {"model_type": self.model_types[0]} | dataclasses.asdict(self)  # type: ignore[call-overload]

    @property
    def num_parameters(self) -> int:
        """How many numbers a model of this shape learns (a tied head counts once)."""
        return sum(parameter.size for parameter in self.parameters())

    @property
    def head_name(self) -> str:
        """The matrix that gives the logits: the head, or the token embedding where they are tied."""
        role = "token_embedding" if self.tie_word_embeddings else "head"
        return next(p.name for p in self.parameters() if p.role == role)

    def flops_per_token(self, keys: float) -> float:
        """Floating-point operations of the forward pass for one token that looks at `keys` keys: 2 a product."""
        matrices = sum(p.size for p in self.parameters() if p.is_matrix and p.role not in ENDS)
        head = self.vocab_size * self.width
        described = self.arithmetic()
        windows = (None,) * self.blocks if described is None else described.windows
        seen = sum(min(keys, keys if window is None else window) for window in windows)
        return 2.0 * (matrices + head) + 4.0 * seen * self.heads * self.head_dim

    def without_dropout(self) -> ModelConfig:
        """The same shape, whose forward pass is the same in training."""
        return self

    def replaced(self, **fields: Any) -> Any:
        """The same with some fields changed, checked anew."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]


class HiddenSizes(ModelConfig):
    """A configuration with the names of sizes that most `config.json` have: `hidden_size` and so on."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int

    @property
    def context(self) -> int:
        return self.max_position_embeddings

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def blocks(self) -> int:
        return self.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def inner_dim(self) -> int:
        return self.intermediate_size


def positive_integers(config: Any, *names: str) -> None:
    """`ValueError` naming the first of the fields that is not a positive integer."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def positive_numbers(config: Any, *names: str) -> None:
    """`ValueError` naming the first of the fields that is not a positive, finite number."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def probabilities(config: Any, *names: str) -> None:
    """`ValueError` naming the first of the fields that is not in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def truth_values(config: Any, *names: str) -> None:
    """`ValueError` naming the first of the fields that is not a bool."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def token_ids(config: Any, *names: str) -> None:
    """`ValueError` naming the first of the fields that is neither None, a token id, nor a tuple of them."""
    for name in names:
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and (not isinstance(one, int) or isinstance(one, bool) or one < 0):
                raise ValueError(f"{name} must be a token id or None, got {value!r}")
