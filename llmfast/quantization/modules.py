"""A model whose matrices stay in 8 and 4 bits, for inference on any device and backend.

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
from llmfast.quantization.formats import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from llmfast.models.language_model import LanguageModel

Model = TypeVar("Model", bound="LanguageModel")


class Quantized(nn.Module):
    """A weight (N, K) as two parameters that are never trained, `values` and `scale`, and a dtype to compute in."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype):
        super().__init__()
        self.precision, self.shape, self.dtype = weight.precision, weight.shape, dtype
        self.values = nn.Parameter(weight.values, requires_grad=False)
        self.scale = nn.Parameter(weight.scale, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight as floats, made anew."""
        return dequantize(self.values, self.scale, self.shape[1]).to(self.dtype)

    def stored(self) -> QuantizedWeight:
        return QuantizedWeight(self.precision, self.values.detach(), self.scale.detach(), self.shape)


class QuantizedLinear(Quantized):
    """x Wᵀ + b, with the activation fused in."""

    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype):
        super().__init__(weight, dtype)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.quantized_linear(x, self.values, self.scale, self.bias, activation)


class QuantizedEmbedding(Quantized):
    """Rows of the weight: ids (...) -> (..., K)."""

    def forward(self, ids: Tensor) -> Tensor:
        return dequantize(self.values[ids], self.scale[ids], self.shape[1]).to(self.dtype)


def fill(
    model: Model,
    precision: str,
    tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Model:
    """Gives a model made on the meta device its weights: (name, tensor) pairs under the state dict's names, some of
    them quantised, copied one at a time. It takes no gradients.

    `precision` is what the whole is called, "int8", "int4" or "int4-all"; `dtype` that of everything not quantised.
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
        # The same parameters, wherever they are moved.
        model.lm_head.values, model.lm_head.scale = tied.values, tied.scale
    else:
        model.tie_head()
    return model.requires_grad_(False).eval()


def stored_state(model: LanguageModel) -> dict[str, Tensor | QuantizedWeight]:
    """The state dict with each quantised weight as one entry, under the name of the weight."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    parts = {f"{name}.{part}" for name in modules for part in ("values", "scale")}
    state: dict[str, Tensor | QuantizedWeight] = {n: t for n, t in model.state_dict().items() if n not in parts}
    return state | {f"{name}.weight": module.stored() for name, module in modules.items()}


def _copied(weight: QuantizedWeight, device: torch.device | str) -> QuantizedWeight:
    """On `device`, and no longer a part of the file that it was read from."""
    values, scale = (t.to(device, copy=True).contiguous() for t in (weight.values, weight.scale))
    return QuantizedWeight(weight.precision, values, scale, weight.shape)
