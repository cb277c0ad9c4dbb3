"""Which optimizer moves which weights, and its state by the names of the weights.

LayerNorms and biases are not decayed. Muon (Jordan et al., 2024) is for the matrices of the blocks; with the scale of
Liu et al. (2025) it takes AdamW's learning rate, and AdamW moves the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmfast.training.configuration import OptimizationSettings
from llmfast.training.weights import MasterWeights


def make_optimizers(weights: MasterWeights, settings: OptimizationSettings) -> list[torch.optim.Optimizer]:
    """Optimizers that move every weight once; the learning rate is set anew at each step."""
    decay = settings.weight_decay
    decayed = weights.flat("embedding") if settings.optimizer == "muon" else weights.flat("matrix", "embedding")
    groups = [{"params": decayed, "weight_decay": decay}, {"params": weights.flat("vector"), "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=settings.lr, momentum=settings.beta1, fused=True)]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)
    if settings.optimizer == "adamw":
        return [adamw]
    muon = torch.optim.Muon(
        weights.matrices(),
        lr=settings.lr,
        weight_decay=decay,
        momentum=settings.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]


def state_by_name(optimizers: Sequence[torch.optim.Optimizer], weights: MasterWeights) -> dict[str, Tensor]:
    """Every tensor of the optimizers' states: {"transformer.wte.weight.exp_avg": …}, of its weight's shape or ()."""
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, tensor in state.items():
                whole = tensor if tensor.numel() == parameter.numel() else tensor.expand(parameter.numel())
                for name, part in weights.named_parts(parameter, whole):
                    found[f"{name}.{key}"] = part if whole is tensor else tensor.clone()  # a file holds no tensor twice
    return found


def load_state(
    optimizers: Sequence[torch.optim.Optimizer], weights: MasterWeights, state: Mapping[str, Tensor]
) -> None:
    """Puts back what `state_by_name` gave. `KeyError` names what is missing: it was another optimizer's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                (first, _), *_ = weights.named_parts(parameter, parameter.detach())
                restored: dict[str, Tensor] = {}
                for key in (name.removeprefix(f"{first}.") for name in state if name.startswith(f"{first}.")):
                    saved = state[f"{first}.{key}"]
                    if saved.ndim == 0:
                        restored[key] = saved.to(parameter.device, copy=True)
                        continue
                    restored[key] = torch.zeros_like(parameter)
                    for name, part in weights.named_parts(parameter, restored[key]):
                        part.copy_(state[f"{name}.{key}"])
                optimizer.state[parameter] = restored
