"""Which optimizer moves which weights, and its state by the names of the weights.

LayerNorms and biases are not decayed. Muon (Jordan et al., 2024) is for the matrices of the blocks; with the scale of
Liu et al. (2025) it takes AdamW's learning rate, and AdamW moves the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmfast.training.configuration import OptimizationSettings
from llmfast.training.weights import KINDS, MATRICES, MasterWeights

if TYPE_CHECKING:  # what it needs of torch is slow to import, and not in every build
    from llmfast.training.sharded import ShardedWeights

    Weights = MasterWeights | ShardedWeights

COUNTER = "step"
KEPT = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Muon: ("momentum_buffer",),
}


def make_optimizers(weights: Weights, settings: OptimizationSettings) -> list[torch.optim.Optimizer]:
    """Optimizers that move every weight once; the learning rate, times a group's "scale", is set anew at each step."""
    scales = lr_scales(settings.lr_scales)
    for kind in scales:
        if not weights.flat(kind):
            raise ValueError(f"lr_scales names {kind}, and nothing of that kind is trained")

    def group(kind: str, parameters: list[nn.Parameter]) -> dict[str, Any]:
        decay = 0.0 if kind == "vector" else settings.weight_decay
        return {"params": parameters, "weight_decay": decay, "scale": scales.get(kind, 1.0)}

    flat = [kind for kind in KINDS if settings.optimizer != "muon" or kind not in MATRICES]
    groups = [group(kind, weights.flat(kind)) for kind in flat]
    if settings.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=settings.lr, momentum=settings.beta1)]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)
    if settings.optimizer == "adamw":
        return [adamw]
    matrices = [group(kind, some) for kind in MATRICES if (some := weights.matrices(kind))]
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=settings.lr, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def lr_scales(text: str) -> dict[str, float]:
    """ "head=10,embedding=0.1" by the kinds of `weights.KINDS`. `ValueError` in one line for what is none."""
    scales: dict[str, float] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        kind, _, factor = part.partition("=")
        try:
            scales[kind] = float(factor)
        except ValueError:
            scales[kind] = -1.0
        if kind not in KINDS or not 0 <= scales[kind] < math.inf:
            raise ValueError(f"lr_scales must be KIND=FACTOR,… of {', '.join(KINDS)}, got {part!r:.60}")
    return scales


def state_by_name(optimizers: Sequence[torch.optim.Optimizer], weights: Weights) -> dict[str, Tensor]:
    """What the optimizers keep for each weight: {"transformer.wte.weight.exp_avg": …}, of its weight's shape.

    Counters of updates are not among them, see `updates_done`.
    """
    return {
        f"{name}.{key}": part
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
        if key != COUNTER
        for name, part in weights.named_parts(parameter, tensor)
    }


def updates_done(optimizers: Sequence[torch.optim.Optimizer], steps: int) -> int:
    """How often the weights were moved in so many steps: less often where fp16 overflowed."""
    counters = [state[COUNTER] for optimizer in optimizers for state in optimizer.state.values() if COUNTER in state]
    return int(counters[0]) if counters else steps


def load_state(
    optimizers: Sequence[torch.optim.Optimizer], weights: Weights, state: Mapping[str, Tensor], updates: int
) -> None:
    """Puts back what `state_by_name` gave after so many updates. `KeyError` names what is missing from it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                restored: dict[str, Tensor] = {}
                for key in KEPT[type(optimizer)]:
                    restored[key] = torch.zeros_like(parameter)
                    for name, part in weights.named_parts(parameter, restored[key]):
                        part.copy_(weights.placed(state[f"{name}.{key}"], part))
                if isinstance(optimizer, torch.optim.AdamW):
                    restored[COUNTER] = torch.tensor(float(updates), device=parameter.device)
                optimizer.state[parameter] = restored
