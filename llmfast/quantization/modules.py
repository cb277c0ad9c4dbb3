"""A GPT whose matrices stay in 8 and 4 bits, for inference on any device and backend.

    source = checkpoint.stream(path)
    model = QuantizedGPT(source.config, "int8", source.tensors(plan(source.config, "int8")), torch.bfloat16)

It is the GPT of `llmfast/models/gpt2.py` with two of its modules replaced: linear layers call `ops.quantized_linear`,
and the token embedding turns the rows looked up into floats. Position embedding, LayerNorms, biases and all
activations are in one dtype. (The native decoder of a CPU has packed weights of its own, and quantises activations
too.)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.models.config import GPTConfig
from llmfast.models.gpt2 import GPT
from llmfast.quantization.formats import QuantizedWeight, dequantize
from llmfast.weights import checkpoint


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


class QuantizedGPT(GPT):
    """A `GPT` from (name, tensor) pairs under `GPT.state_dict()`'s names, some of which are quantised.

    `precision` is what the whole is called, "int8", "int4" or "int4-all"; `dtype` that of everything not quantised. It
    takes no gradients. The tensors are copied, one at a time.
    """

    def __init__(
        self,
        config: GPTConfig,
        precision: str,
        tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        with torch.device("meta"):
            super().__init__(config)
        self.quantized_to = precision
        for name, tensor in tensors:
            path, _, part = name.rpartition(".")
            if isinstance(tensor, QuantizedWeight):
                kind = QuantizedEmbedding if path == "transformer.wte" else QuantizedLinear
                self.set_submodule(path, kind(_copied(tensor, device), dtype))
            else:
                copy = tensor.to(device, dtype, copy=True).contiguous()
                setattr(self.get_submodule(path), part, nn.Parameter(copy))
            del tensor  # before the next one is read
        self.tie_head()
        self.requires_grad_(False).eval()

    def tie_head(self) -> None:
        embedding = self.transformer.wte
        if not self.config.tie_word_embeddings or not isinstance(embedding, QuantizedEmbedding):
            return super().tie_head()
        head = QuantizedLinear(embedding.stored(), embedding.dtype)
        head.values, head.scale = embedding.values, embedding.scale  # the same parameters, wherever they are moved
        self.set_submodule("lm_head", head)

    @property
    def precision(self) -> str:
        return self.quantized_to

    def save_pretrained(self, path: str | Path, **metadata: Any) -> None:
        """Writes the model as `llmfast quantize` does: integers, scales, and the rest as it is."""
        modules = {name: module for name, module in self.named_modules() if isinstance(module, Quantized)}
        parts = {f"{name}.{part}" for name in modules for part in ("values", "scale")}
        state: dict[str, Tensor | QuantizedWeight] = {n: t for n, t in self.state_dict().items() if n not in parts}
        if self.config.tie_word_embeddings:
            modules.pop("lm_head", None)
        state |= {f"{name}.weight": module.stored() for name, module in modules.items()}
        checkpoint.save(path, self.config, state, tokenizer_from=self.source, precision=self.precision, **metadata)


def _copied(weight: QuantizedWeight, device: torch.device | str) -> QuantizedWeight:
    """On `device`, and no longer a part of the file that it was read from."""
    values, scale = (t.to(device, copy=True).contiguous() for t in (weight.values, weight.scale))
    return QuantizedWeight(weight.precision, values, scale, weight.shape)
