"""Which weights of a model get which format: the plan, and what a checkpoint says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmfast.quantization.formats import FORMATS, GROUP_SIZE

if TYPE_CHECKING:
    from llmfast.models.architecture import ModelConfig

# A model's precision -> the format of the matrices in its blocks, and of the token embedding and the head.
PRECISIONS = {
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
    "int4-all": ("int4", "int4"),
    "q8_0": ("q8_0", "q8_0"),
    "q4_1": ("q4_1", "q8_0"),
    "q4_k": ("q4_k", "q8_0"),
}


def plan(config: ModelConfig, precision: str) -> dict[str, str]:
    """Which weights of a model get which format: {name in the state dict: one of `FORMATS`}.

    "int8", "q8_0" and "int4-all" give every matrix this format, the token embedding included; "int4", "q4_1" and "q4_k"
    keep the token embedding and the head at 8 bits. Position embeddings, norms and biases are never quantised.
    """
    inside, outside = PRECISIONS[checked(precision)]
    return {p.name: inside if p.block is not None else outside for p in config.parameters() if p.is_matrix}


def checked(precision: Any) -> str:
    """`ValueError` where this is not the precision of a quantised model."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantised: what its `config.json` says under "llmfast_quantization".

    `weights` gives the format of each weight by its name in the state dict; what it does not name is floating point.
    `quality` holds what was measured of the model: for each text the figures by name.
    """

    precision: str
    weights: Mapping[str, str]
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        document: dict[str, Any] = {"precision": self.precision, "group_size": GROUP_SIZE, "weights": self.weights}
        return document | ({"quality": self.quality} if self.quality else {})

    @classmethod
    def from_document(cls, document: Any, config: ModelConfig) -> Quantization:
        """`ValueError` names what in the document is not understood, or does not fit the model of `config`."""
        if not isinstance(document, dict):
            raise ValueError(f"it should be an object, not {document!r}")
        precision, group_size = document.get("precision"), document.get("group_size")
        if not isinstance(precision, str) or precision not in PRECISIONS:
            raise ValueError(f"its precision must be {', '.join(PRECISIONS)}, not {precision!r}")
        if group_size != GROUP_SIZE:
            raise ValueError(f"its group_size must be {GROUP_SIZE}, not {group_size!r}")
        weights, quality = document.get("weights"), document.get("quality", {})
        if not isinstance(weights, dict) or not weights:
            raise ValueError("its weights should say how each quantised weight is stored")
        known = plan(config, precision)
        for name, stored in weights.items():
            if name not in known:
                raise ValueError(f"it names {name}, which is not a matrix of this model")
            if stored not in FORMATS:
                raise ValueError(f"it stores {name} as {stored!r}, which is not {' or '.join(FORMATS)}")
        figures = list(quality.values()) if isinstance(quality, dict) else [None]
        if not all(isinstance(f, dict) and all(isinstance(x, (int, float)) for x in f.values()) for f in figures):
            raise ValueError("its quality should hold numbers by name, for each text")
        return cls(precision, weights, quality)
