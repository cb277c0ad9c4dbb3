"""Low-rank adapters beside one model's weights, chosen for each sequence of a batch: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

The weights are there once, whatever the number of adapters. `beside` is for the module, on any device; natively
`NativeAdapter` is packed as the weights are, and a step adds it to the rows that have one (`csrc/decoder/adapter.h`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmfast.adapting import Adaptable
from llmfast.inference.decoders.native import NativeModel
from llmfast.models import LanguageModel
from llmfast.weights.adapter import Adapter


class RowsAdapted(nn.Module):
    """What adapters add to one layer: x (B, T, K) -> (B, T, N). `groups` are A (r, K), B (N, r), the scale, and the
    sequences (n,) that have this one."""

    def __init__(self, groups: list[tuple[Tensor, Tensor, float, Tensor]]):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor, layer: Adaptable) -> Tensor:
        out = layer.product(x)
        for a, b, scale, rows in self.groups:
            out = out.index_add(0, rows, (x[rows] @ a.t()) @ b.t(), alpha=scale)
        return out


def beside(model: LanguageModel, adapters: Sequence[Adapter | None]) -> LanguageModel:
    """A module of its own over the same weights, for as many sequences as there are `adapters`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    several = {id(adapter): adapter for adapter in adapters if adapter is not None}
    rows = {key: [row for row, adapter in enumerate(adapters) if id(adapter) == key] for key in several}
    for name in {name for adapter in several.values() for name in adapter.pairs}:
        groups = []
        for key, adapter in several.items():
            if name in adapter.pairs:
                a, b = (part.to(model.device, model.dtype) for part in adapter.pairs[name])
                groups.append((a, b, adapter.scale, torch.tensor(rows[key], device=model.device)))
        made.get_submodule(name.removesuffix(".weight")).adapter = RowsAdapted(groups)
    return made


class NativeAdapter:
    """An adapter packed for one `NativeModel`: in float32 beside weights of float32, else `rounded` to 8 bits."""

    def __init__(self, model: NativeModel, adapter: Adapter, rounded: bool | None = None):
        self.model = model
        numbers = {p.name: number for number, p in enumerate(model.config.parameters())}
        pairs = {numbers[name]: pair for name, pair in adapter.pairs.items()}
        a, b = (torch.cat([pair[part].float().flatten() for pair in pairs.values()]) for part in (0, 1))
        rounded = model.precision != "fp32" if rounded is None else rounded
        self._number: int = torch.ops.llmfast.native_adapter(
            model._number, list(pairs), adapter.rank, adapter.scale, a, b, rounded
        )
        weakref.finalize(self, torch.ops.llmfast.native_adapter_free, self._number)

    @property
    def nbytes(self) -> int:
        return torch.ops.llmfast.native_adapter_bytes(self._number)
