"""Low-rank adapters (Hu et al., 2021) as modules of a model.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ        A (r, in), B (out, r), s = alpha / r

W takes no gradient, so that none is made for it: of a layer r (in + out) numbers are trained instead of in · out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmfast.adapting import Adaptable
from llmfast.models import LanguageModel, ModelConfig, Parameter
from llmfast.models.bottleneck import Bottleneck
from llmfast.models.dropout import Dropout
from llmfast.weights.adapter import Adapter, scale_of

ATTENTION = ("query_key_value", "query", "key", "value", "attention_out")
MLP = ("mlp_in", "gate", "up", "mlp_out")
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


class LowRank(nn.Module):
    """What a linear layer (in -> out) of `Linear.adapter` adds: s (dropout(x) Aᵀ) Bᵀ.

    A begins as peft's does, uniform in ±1/√in; B is zero, so that nothing is added at first.
    """

    def __init__(self, within: int, out: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        bound = 1 / math.sqrt(within)
        self.a = nn.Parameter(torch.empty(rank, within).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(out, rank))
        self.scale, self.dropout = scale, Dropout(dropout)
        self.off = False

    def forward(self, x: Tensor, layer: Adaptable) -> Tensor:
        if self.off:
            return layer.product(x)
        if self.dropout.p and self.training:  # the two are given different x
            return layer.product(x) + self.scale * ((self.dropout(x) @ self.a.t()) @ self.b.t())
        return added(x, self.a, self.b, self.scale, layer)


def added(x: Tensor, a: Tensor, b: Tensor, scale: float, layer: Adaptable) -> Tensor:
    """The layer's product + scale (x aᵀ) bᵀ: x (..., K), a (r, K), b (N, r) -> (..., N)."""
    return _Added.apply(x, a, b, scale, layer)


class _Added(torch.autograd.Function):
    """Both sums, of the outputs and of the gradients of x, are made within a product, instead of after it.

    The thin products are PyTorch's on every backend: of an inner dimension of 16 its kernels make 1536 columns in 0.25
    ms where `csrc/gemm` takes 1.9 (1024 rows, bfloat16, AMX, one thread). For backward x and x aᵀ are kept, and no
    graph of the layer's own: a block that is computed again in backward would keep that, with x, from the first time,
    and be computed again for each of its layers. What the layer has learned of its own gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, layer: Adaptable) -> Tensor:
        out = layer.product(x)
        narrow = x.reshape(-1, x.shape[-1]) @ a.t()
        out.view(-1, out.shape[-1]).addmm_(narrow, b.t(), alpha=scale)
        ctx.save_for_backward(x, a, b, narrow)
        ctx.scale, ctx.layer = scale, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, a, b, narrow = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dnarrow = torch.addmm(narrow.new_zeros(()), rows, b, beta=0, alpha=ctx.scale)
        da = dnarrow.t() @ x.reshape(-1, x.shape[-1])
        db = torch.addmm(narrow.new_zeros(()), rows.t(), narrow, beta=0, alpha=ctx.scale)
        dx = (rows @ ctx.layer.weight).addmm_(dnarrow, a).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, da, db, None, None


def targets(config: ModelConfig, names: str) -> list[Parameter]:
    """The weights that get an adapter: `names` are roles, or "attention", "mlp" or "all", separated by commas.

    `ValueError` for a name that is none, or that this family has no layer for.
    """
    layers = [p for p in config.parameters() if p.is_matrix and p.block is not None]
    chosen: set[str] = set()
    for name in [part.strip() for part in names.split(",")]:
        roles = GROUPS.get(name, (name,))
        if not any(p.role in roles for p in layers):
            known = ", ".join([*GROUPS, *dict.fromkeys(p.role for p in layers)])
            raise ValueError(f"this model has no layers {name!r} to adapt; it has {known}")
        chosen |= set(roles)
    return [p for p in layers if p.role in chosen]


def put_in(
    model: LanguageModel,
    weights: Iterable[Parameter],
    rank: int,
    alpha: float,
    rank_stabilised: bool = False,
    dropout: float = 0.0,
) -> None:
    """Gives these layers an adapter, whose A is drawn from torch's generator, and takes gradients from all else."""
    model.requires_grad_(False)
    scale = scale_of(rank, alpha, rank_stabilised)
    for weight in weights:
        out, within = weight.shape
        layer_of(model, weight.name).adapter = LowRank(within, out, rank, scale, dropout).to(model.device)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before it got adapters, of either kind, as long as this is entered."""
    layers = [module for module in model.modules() if isinstance(module, (LowRank, Bottleneck))]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


def layer_of(model: nn.Module, weight: str) -> nn.Module:
    """The layer whose weight bears this name."""
    return model.get_submodule(weight.removesuffix(".weight"))


def pairs_of(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the weight that they adapt, of a state dict with the adapters that `put_in` made."""
    ends = ".adapter.a"
    layers = [name.removesuffix(ends) for name in state if name.endswith(ends)]
    return {f"{name}.weight": (state[f"{name}{ends}"], state[f"{name}.adapter.b"]) for name in layers}


def state_of(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The reverse of `pairs_of`."""
    state: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        layer = name.removesuffix(".weight")
        state |= {f"{layer}.adapter.a": a, f"{layer}.adapter.b": b}
    return state


def load(model: LanguageModel, adapter: Adapter) -> None:
    """Puts an adapter from a file beside the weights of a model, which stay as they are."""
    weights = [p for p in model.config.parameters() if p.name in adapter.pairs]
    put_in(model, weights, adapter.rank, adapter.alpha, adapter.rank_stabilised)
    for name, (a, b) in adapter.pairs.items():
        layer = layer_of(model, name).adapter
        assert isinstance(layer, LowRank)
        layer.a.data, layer.b.data = (t.to(model.device, model.dtype) for t in (a, b))
