"""The weights of a run in float32, in one buffer, and the model that computes with them, in float32 or in fewer bits.

    masters (fp32)  --publish-->  model's parameters (fp32, bf16, fp16)  --forward, backward-->  their gradients
       ^                                                                                               |
       optimizer  <----------------------------  gradients (fp32)  <------------collect----------------+

Rounding an update to 8 bits of mantissa loses most of it, so the optimizer adds in float32 and forward and backward run
on a rounded copy (Micikevicius et al., 2017). One buffer for all weights and one for all gradients make clipping,
an element-wise optimizer and a sum over processes one operation each, where a small model spends its time on calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from llmfast.models import LanguageModel, ModelConfig
from llmfast.quantization.modules import Quantized
from llmfast.training.processes import Processes

KINDS = ("matrix", "adapter_a", "adapter_b", "embedding", "head", "vector")
MATRICES = KINDS[:3]  # of the blocks
ALIGNMENT = 16  # elements: every parameter begins where a cache line does


def kinds_of(config: ModelConfig) -> dict[str, str]:
    """Of each parameter by name: "matrix" of a block, "embedding" (or what makes logits), or "vector", a norm's or a
    bias. What fine-tuning adds has kinds of its own: an adapter's two matrices, and a classifier's "head"."""
    several = {p.name: "embedding" if p.block is None else "matrix" for p in config.parameters()}
    return several | {p.name: "vector" for p in config.parameters() if len(p.shape) < 2}


def rounded(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model with its floats in `dtype`, in place; what stands for quantised weights stays as it is."""
    parts = {part for module in model.modules() if isinstance(module, Quantized) for part in module.parts.values()}
    for parameter in model.parameters():
        if parameter not in parts:
            parameter.data = parameter.data.to(dtype)
    return model


class MasterWeights:
    """The float32 weights of `model`, whole in every process, whose parameters become views of one buffer in `dtype`.

    What takes no gradients is left out, and only rounded. A tied head is the embedding, under the embedding's name.
    `flat` hands out what an element-wise optimizer needs, `matrices` what one needs that knows rows and columns; both
    are parts of the same buffers.
    """

    gradient_scale = 1.0  # what the shares of the loss are multiplied by

    def __init__(
        self, model: LanguageModel, dtype: torch.dtype = torch.float32, kinds: Mapping[str, str] | None = None
    ):
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.kinds = kinds_of(model.config) if kinds is None else kinds
        named.sort(key=lambda item: KINDS.index(self.kinds[item[0]]))  # stable: within a kind in the model's order
        self.slices: dict[str, slice] = {}
        self.shapes: dict[str, torch.Size] = {}
        end = 0
        for name, parameter in named:
            self.slices[name], self.shapes[name] = slice(end, end + parameter.numel()), parameter.shape
            end += math.ceil(parameter.numel() / ALIGNMENT) * ALIGNMENT
        self.values = torch.zeros(end, device=model.device)
        self.gradients = torch.zeros(end, device=model.device)
        for name, parameter in named:
            self._view(self.values, name).copy_(parameter.detach())
        self._rounded = dtype != torch.float32
        self._copy = self.values.to(dtype)  # the same tensor where there is nothing to round
        self._copy_gradients = self.gradients.to(dtype)
        self.model = rounded(model, dtype)
        for name, parameter in named:
            parameter.data = self._view(self._copy, name)
            parameter.grad = self._view(self._copy_gradients, name)  # backward adds to it
        self._parts: dict[Tensor, list[str]] = {}

    def flat(self, *kinds: str) -> list[nn.Parameter]:
        """Everything of these kinds, neighbours in `KINDS`, as one vector; an empty list where the model has none."""
        names = [name for name in self.slices if self.kinds[name] in kinds]
        if not names:
            return []
        whole = slice(self.slices[names[0]].start, self.slices[names[-1]].stop)
        return [self._parameter(self.values[whole], self.gradients[whole], names)]

    def matrices(self, kind: str) -> list[nn.Parameter]:
        """Each matrix of one of `MATRICES` for itself."""
        names = [name for name in self.slices if self.kinds[name] == kind]
        return [self._parameter(self._view(self.values, n), self._view(self.gradients, n), [n]) for n in names]

    def named_parts(self, parameter: Tensor, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Cuts `tensor`, of the size of a parameter that was handed out, into the model's parameters, by name."""
        names = self._parts[parameter]
        first = self.slices[names[0]].start
        for name in names:
            part = self.slices[name]
            yield name, tensor.view(-1)[part.start - first : part.stop - first].view(self.shapes[name])

    def placed(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor as one process needs it."""
        return tensor

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def collect(self) -> None:
        """Adds the gradients of a rounded model to the float32 ones, after each backward."""
        if self._rounded:
            self.gradients.add_(self._copy_gradients)
            self._copy_gradients.zero_()

    def reduce(self, group: Processes) -> None:
        """Adds up the gradients of all processes: one message, whatever the number of parts and weights."""
        group.add_up(self.gradients)

    def clip(self, largest: float) -> Tensor:
        """The norm of the gradient before it is scaled down to at most `largest` (0: it is left as it is)."""
        norm = torch.linalg.vector_norm(self.gradients)
        if largest > 0:
            self.gradients.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def publish(self) -> None:
        """Gives the model the weights as they are now."""
        if self._rounded:
            self._copy.copy_(self.values)

    def state(self) -> dict[str, Tensor]:
        """The float32 weights by their names in the model's state dict, views of the buffer."""
        return {name: self._view(self.values, name) for name in self.slices}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name in self.slices:
            self._view(self.values, name).copy_(state[name])
        self.publish()

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        return buffer[self.slices[name]].view(self.shapes[name])

    def _parameter(self, values: Tensor, gradients: Tensor, names: list[str]) -> nn.Parameter:
        parameter = nn.Parameter(values)
        parameter.grad = gradients
        self._parts[parameter] = names
        return parameter
