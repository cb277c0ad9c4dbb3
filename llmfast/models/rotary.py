"""The frequencies of rotary positions, and how contexts are stretched by changing them.

default   theta^(-2i/R) for pair i of R channels (Su et al., 2021)
linear    all divided by `factor` (position interpolation; Chen et al., 2023)
dynamic   as default up to the model's own context, which is where this project stops
llama3    long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1)
yarn      the same with a ramp over the pairs, and cosine and sine multiplied (Peng et al., 2023)
longrope  each pair's divided by a factor of its own (Ding et al., 2024), the same for short and long texts
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmfast.models.architecture import Rotary, positive_numbers

# What each kind needs besides theta, and what it may have.
NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
}
MAY_HAVE = {
    "longrope": ("factor", "original_max_position_embeddings"),
    "dynamic": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True)
class RotarySettings:
    """What a `config.json` says of rotary positions, under its names. `ValueError` names a value out of range."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0  # the share of a head's channels that turn
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in NEEDS:
            raise ValueError(f"rope_type must be one of {', '.join(NEEDS)}, got {self.rope_type!r}")
        positive_numbers(self, "rope_theta", "partial_rotary_factor")
        if self.partial_rotary_factor > 1:
            raise ValueError(f"partial_rotary_factor must be at most 1, got {self.partial_rotary_factor}")
        for name in NEEDS[self.rope_type]:
            if getattr(self, name) is None:
                raise ValueError(f"rope_type {self.rope_type!r} needs {name}")
        for field in dataclasses.fields(self):
            if field.name in ("short_factor", "long_factor"):
                self._check_factors(field.name)
            elif field.name not in ("rope_type", "truncate") and getattr(self, field.name) is not None:
                positive_numbers(self, field.name)
        if self.short_factor != self.long_factor:
            raise ValueError("longrope with other factors for long texts than for short ones is not computed here")

    def _check_factors(self, name: str) -> None:
        factors = getattr(self, name)
        if factors is None:
            return
        if not isinstance(factors, (list, tuple)) or not all(
            isinstance(f, (int, float)) and not isinstance(f, bool) and 0 < f < math.inf for f in factors
        ):
            raise ValueError(f"{name} must be a list of positive numbers, got {factors!r}")
        object.__setattr__(self, name, tuple(map(float, factors)))

    @classmethod
    def from_document(cls, document: Mapping[str, Any], theta: float) -> RotarySettings:
        """Of both spellings: `rope_parameters`, or `rope_theta` and `rope_scaling`. `theta` is the family's default."""
        parameters = document.get("rope_scaling") or document.get("rope_parameters") or {}
        if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
            raise ValueError(f"rope_parameters must be one set for all layers, got {parameters!r}")
        given = {"rope_theta": document.get("rope_theta") or theta} | dict(parameters)
        given["rope_type"] = given.pop("type", None) or given.get("rope_type") or "default"
        given["rope_type"] = parameters.get("rope_type", given["rope_type"])
        partial = document.get("partial_rotary_factor")
        if partial is not None:
            given.setdefault("partial_rotary_factor", partial)
        kind = given["rope_type"]
        known = {"rope_theta", "rope_type", "partial_rotary_factor", *NEEDS.get(kind, ()), *MAY_HAVE.get(kind, ())}
        for name, value in given.items():
            if name not in known and value is not None and kind in NEEDS:
                raise ValueError(f"rope_parameters sets {name} to {value!r}, which is not computed for {kind!r}")
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_document(self) -> dict[str, Any]:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        kept = {"rope_theta", "rope_type"}
        return {n: v for n, v in dataclasses.asdict(self).items() if n in kept or v != default[n]}

    def rotary(self, head_dim: int, context: int) -> Rotary:
        """For heads of `head_dim` channels in a model of `context` positions."""
        R = int(head_dim * self.partial_rotary_factor)
        # On the CPU even where a model is being made on the meta device: these numbers come from no file.
        frequencies = 1.0 / self.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R)
        if self.rope_type == "linear":
            assert self.factor is not None
            return Rotary(frequencies / self.factor)
        if self.rope_type == "llama3":
            return Rotary(self._llama3(frequencies))
        if self.rope_type == "longrope":
            assert self.short_factor is not None and self.attention_factor is not None
            return Rotary(frequencies / torch.tensor(self.short_factor, device="cpu"), self.attention_factor)
        if self.rope_type == "yarn":
            return Rotary(self._yarn(frequencies, R, context), self._yarn_factor())
        return Rotary(frequencies)

    def _llama3(self, frequencies: Tensor) -> Tensor:
        assert self.factor is not None and self.low_freq_factor is not None and self.high_freq_factor is not None
        assert self.original_max_position_embeddings is not None
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)

    def _yarn(self, frequencies: Tensor, R: int, context: int) -> Tensor:
        assert self.factor is not None
        original = self.original_max_position_embeddings or context

        def pair_that_turns(times: float) -> float:
            return R * math.log(original / (times * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low, high = pair_that_turns(self.beta_fast or 32), pair_that_turns(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        ramp = (torch.arange(R // 2, dtype=torch.float32, device="cpu") - low) / (high - low if high != low else 0.001)
        divided = ramp.clamp(0, 1)
        return frequencies * (divided / self.factor + (1 - divided))

    def _yarn_factor(self) -> float:
        assert self.factor is not None
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(by: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * by * math.log(self.factor) + 1.0  # type: ignore[operator,arg-type]

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)
