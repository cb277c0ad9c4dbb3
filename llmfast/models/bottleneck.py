"""Bottleneck adapters (Houlsby et al., 2019): a narrow network after each half of a block, before it is added to the
residual stream.

    y + W₂ gelu(W₁ y + b₁) + b₂        y: what the half's last layer gives, W₁ (m, C), W₂ (C, m)

They are no linear function of a layer's input, so that they can't be folded into its weights as low-rank ones can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmfast.adapting import Adaptable
from llmfast.models.architecture import ModelConfig, Parameter
from llmfast.models.language_model import LanguageModel

PLACES = {"attention": ("attention_out",), "mlp": ("mlp_out",), "all": ("attention_out", "mlp_out")}


class Bottleneck(nn.Module):
    """The `adapter` of a layer that gives C numbers. W₂ and both biases begin as zeros: nothing changes at first."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.off = False

    def forward(self, x: Tensor, layer: Adaptable) -> Tensor:
        y = layer.product(x)
        return y if self.off else y + self.up(nn.functional.gelu(self.down(y)))


@dataclass(frozen=True)
class Bottlenecks:
    """Those of a whole model, of `size` m: float32, by the names that they have in its state dict. `score` is the head
    of a classifier (labels, C), where there is one."""

    base: str  # the name, or the path, of the model that they are for
    size: int
    state: Mapping[str, Tensor]
    score: Tensor | None = None


def places(config: ModelConfig, names: str = "all") -> list[Parameter]:
    """The weights of the layers that are followed by one: `names` is "attention", "mlp" or "all". `ValueError` for
    another."""
    if names not in PLACES:
        raise ValueError(f"bottlenecks follow {', '.join(PLACES)}, not {names!r}")
    return [p for p in config.parameters() if p.block is not None and p.is_matrix and p.role in PLACES[names]]


def shapes(layer: Parameter, size: int) -> dict[str, tuple[int, ...]]:
    """Of the parts of the one after a layer, by what follows the layer's name."""
    width = layer.shape[0]
    return {
        ".adapter.down.weight": (size, width),
        ".adapter.down.bias": (size,),
        ".adapter.up.weight": (width, size),
        ".adapter.up.bias": (width,),
    }


def put_in(
    model: LanguageModel, layers: Iterable[Parameter], size: int, device: torch.device | str | None = None
) -> None:
    """Puts one after each of these layers, on the model's device or another; W₁ is drawn from torch's generator."""
    with torch.device(device or model.device):
        for weight in layers:
            layer = model.get_submodule(weight.name.removesuffix(".weight"))
            layer.adapter = Bottleneck(weight.shape[0], size)


def load(model: LanguageModel, bottlenecks: Bottlenecks) -> None:
    """Puts those of a file into a model, whose dtype they get."""
    state = bottlenecks.state
    layers = [p for p in places(model.config) if f"{p.name.removesuffix('.weight')}.adapter.up.bias" in state]
    put_in(model, layers, bottlenecks.size, "meta")
    model.load_state_dict({n: t.to(model.device, model.dtype) for n, t in state.items()}, strict=False, assign=True)
