"""A model whose matrices stay in 8 and 4 bits, on any device and backend. They are not trained themselves; gradients
flow through them.

Its linear layers call `ops.quantized_linear`, and the token embedding turns the rows looked up into floats. Position
embeddings, norms, biases and all activations are in one dtype. (The native decoder of a CPU has packed weights of its
own, and quantises activations too.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.adapting import Adaptable
from llmfast.quantization.formats import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from llmfast.models.language_model import LanguageModel

Model = TypeVar("Model", bound="LanguageModel")


class Quantized(nn.Module):
    """A weight (N, K) whose parts (`values`, `scale`, …) are parameters, never trained, and a dtype to compute in."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype):
        super().__init__()
        self.precision, self.shape, self.dtype = weight.precision, weight.shape, dtype
        self.part_names = tuple(weight.parts)
        for name, part in weight.parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.part_names}

    @property
    def weight(self) -> Tensor:
        """The weight as floats, made anew, some rows at a time."""
        return self.stored().dequantize(self.dtype)

    def stored(self) -> QuantizedWeight:
        return QuantizedWeight(self.precision, self.shape, {name: part.detach() for name, part in self.parts.items()})


class QuantizedLinear(Adaptable, Quantized):
    """x Wᵀ + b, with the activation fused in."""

    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype):
        super().__init__(weight, dtype)
        self.register_parameter("bias", None)
        self.register_module("adapter", None)

    def product(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.quantized_linear(x, **self.parts, bias=self.bias, activation=activation)


class QuantizedEmbedding(Quantized):
    """Rows of the weight: ids (...) -> (..., K)."""

    def forward(self, ids: Tensor) -> Tensor:
        return dequantize({name: part[ids] for name, part in self.parts.items()}, self.shape[1]).to(self.dtype)


def fill(
    model: Model,
    precision: str,
    tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Model:
    """Gives a model made on the meta device its weights: (name, tensor) pairs under the state dict's names, some of
    them quantised, copied one at a time. It takes no gradients.

    `precision` is what the whole is called, one of `plan.PRECISIONS`; `dtype` that of everything not quantised.
    """
    embedding = next(name for name, module in model.named_modules() if module is model.token_embedding)
    for name, tensor in tensors:
        path, _, part = name.rpartition(".")
        if isinstance(tensor, QuantizedWeight):
            kind = QuantizedEmbedding if path == embedding else QuantizedLinear
            quantized = kind(_copied(tensor, device), dtype)
            bias = getattr(model.get_submodule(path), "bias", None)
            if bias is not None:  # read before its weight
                quantized.bias = bias
            model.set_submodule(path, quantized)
        else:
            setattr(model.get_submodule(path), part, nn.Parameter(tensor.to(device, dtype, copy=True).contiguous()))
        del tensor  # before the next one is read
    model.quantized_to = precision
    tied = model.token_embedding
    if model.config.tie_word_embeddings and isinstance(tied, QuantizedEmbedding):
        model.lm_head = QuantizedLinear(tied.stored(), tied.dtype)
        for part in tied.part_names:  # the same parameters, wherever they are moved
            setattr(model.lm_head, part, getattr(tied, part))
    else:
        model.tie_head()
    return model.requires_grad_(False).eval()


def stored_state(model: LanguageModel) -> dict[str, Tensor | QuantizedWeight]:
    """The state dict with each quantised weight as one entry, under the name of the weight."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    parts = {f"{name}.{part}" for name, module in modules.items() for part in module.part_names}
    state: dict[str, Tensor | QuantizedWeight] = {n: t for n, t in model.state_dict().items() if n not in parts}
    return state | {f"{name}.weight": module.stored() for name, module in modules.items()}


def _copied(weight: QuantizedWeight, device: torch.device | str) -> QuantizedWeight:
    """On `device`, and no longer a part of the file that it was read from."""
    parts = {name: part.to(device, copy=True).contiguous() for name, part in weight.parts.items()}
    return QuantizedWeight(weight.precision, weight.shape, parts)
