"""What every language model of the house can do, whatever its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.adapting import Adaptable
from llmfast.models.architecture import ModelConfig
from llmfast.quantization.modules import stored_state

if TYPE_CHECKING:
    from typing_extensions import Self

    from llmfast.inference.cache import KVCache

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def float_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16; of another dtype PyTorch's name."""
    return next((name for name, own in FLOATS.items() if own == dtype), str(dtype))


class LanguageModel(nn.Module):
    """Token ids in, logits out.

    An architecture's class defines `token_embedding`, `final_norm`, `block_modules`, `lm_head` and `decode`; its
    parameters are those that its configuration states.
    """

    config_class: ClassVar[type[ModelConfig]]
    config: ModelConfig
    lm_head: Any

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # what it was read from, whose tokenizer travels along
        self.quantized_to: str | None = None  # int8, int4, …, where its matrices were replaced

    @property
    def token_embedding(self) -> Any:
        raise NotImplementedError

    @property
    def final_norm(self) -> Any:
        raise NotImplementedError

    @property
    def block_modules(self) -> nn.ModuleList:
        raise NotImplementedError

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        """The last hidden states, ready for the head: ids (B, T), positions (T,) or (B, T) -> (B, T, C)."""
        raise NotImplementedError

    def tie_head(self) -> None:
        """Makes the head and the token embedding one parameter, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position: (B, T) int64 -> (B, T, V)."""
        return self.lm_head(self.hidden(ids, cache))

    def hidden(self, ids: Tensor, cache: KVCache | None = None, lengths: list[int] | None = None) -> Tensor:
        """The last hidden states, which the head turns into logits: (B, T) int64 -> (B, T, C).

        With a cache, `ids` continue the sequences it holds, and are added to it. `lengths` then allows rows of
        different lengths, padded on the left (see `KVCache.extend`).
        """
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be (B, T) int64, got {tuple(ids.shape)} {ids.dtype}")
        start = 0 if cache is None else cache.longest
        if start + ids.shape[1] > self.config.context:
            raise ValueError(f"{start + ids.shape[1]} tokens do not fit the context of {self.config.context}")
        if cache is None:
            if lengths is not None:
                raise ValueError("rows of different lengths need a cache, which removes their padding")
            positions = torch.arange(ids.shape[1], device=ids.device)
        else:
            positions = cache.extend(ids.shape[1], lengths)
        return self.decode(ids, positions, cache)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` (B, T), -100 where not counted, given `ids` (B, T)."""
        return ops.linear_cross_entropy(self.hidden(ids), self.lm_head.weight, targets)

    @property
    def device(self) -> torch.device:
        return self.final_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.final_norm.weight.dtype

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16; int8, int4, … of a quantised model (`llmfast/quantization/plan.py`)."""
        return self.quantized_to or float_name(self.dtype)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Reads a checkpoint in Hugging Face's layout: a directory, a `.safetensors` or an old `.bin` file, the name of
        an embedded model, or a name on the hub (see `locate_model`).

        `FileNotFoundError` or `ValueError` with one line naming what is missing, surplus or wrongly shaped, or that the
        model is of another family (`llmfast.models.from_pretrained` reads any).
        """
        from llmfast.weights.loading import read_model  # files know the models, so this looks up one floor

        return read_model(path, dtype, cls)

    def save_pretrained(self, path: str | Path, **metadata: Any) -> None:
        """Writes `config.json` and `model.safetensors` as Hugging Face's classes do, and the source's tokenizer.

        Quantised weights are written as `llmfast quantize` writes them. `ValueError` where adapters are beside them,
        which would be lost.
        """
        if any(isinstance(module, Adaptable) and module.adapter is not None for module in self.modules()):
            raise ValueError("the model has adapters beside its weights, which a checkpoint of it would lose")
        from llmfast.weights.saving import save

        save(path, self.config, stored_state(self), self.source, self.quantized_to, **metadata)
