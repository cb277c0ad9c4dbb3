"""The modules that architectures share; their arithmetic is `llmfast.ops`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.adapting import Adaptable
from llmfast.models.architecture import Rotary


class Linear(Adaptable, nn.Linear):
    """x Wᵀ + b, with the activation fused in."""

    def __init__(self, within: int, out: int, bias: bool = True):
        super().__init__(within, out, bias)
        self.register_module("adapter", None)

    def product(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, activation)


class AddLayerNorm(nn.LayerNorm):
    """The residual step: adds a branch to the residual stream, and normalises the sum for the next branch."""

    def forward(self, branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if branch is None:
            return ops.layer_norm(residual, self.weight, self.bias, self.eps), residual
        return ops.add_layer_norm(branch, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich, 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """The residual step with it."""

    def forward(self, branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if branch is None:
            return ops.rms_norm(residual, self.weight, self.eps), residual
        return ops.add_rms_norm(branch, residual, self.weight, self.eps)


class RotaryTable(nn.Module):
    """Cosine and sine of every position's angles: positions (B or 1, T) -> two tensors (B or 1, T, R / 2) float32.

    The frequencies stay float32 when the model changes its dtype: rounded to bfloat16 they would be off by whole turns
    a few hundred tokens on. So they are no buffer, but copied to a device when it is first used.
    """

    def __init__(self, rotary: Rotary):
        super().__init__()
        self.factor = rotary.factor
        self._frequencies = {torch.device("cpu"): rotary.inverse_frequencies}

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        device = positions.device
        if device not in self._frequencies:
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        angles = positions.unsqueeze(-1).float() * self._frequencies[device]
        return angles.cos() * self.factor, angles.sin() * self.factor
