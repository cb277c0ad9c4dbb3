"""GPT-2 (Radford et al., 2019): token ids in, logits out.

    ids (B, T) -> wte[ids] + wpe[positions] -> n_layer × [attention, MLP] -> LayerNorm -> wteᵀ -> logits (B, T, V)

A pre-LN transformer decoder. Modules and parameters bear the checkpoint's names (`transformer.h.0.attn.c_attn` …).
All arithmetic worth a kernel goes through `llmfast.ops`, which picks the backend. Shapes: B sequences, T tokens,
C = n_embd channels, H heads of D = C / H channels, V tokens in the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.inference.cache import KVCache
from llmfast.models.config import GPTConfig
from llmfast.weights import checkpoint
from llmfast.weights.locate import locate_model

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Linear(nn.Linear):
    """x Wᵀ + b, with the activation fused in."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, activation)


class AddLayerNorm(nn.LayerNorm):
    """The residual step: adds a branch to the residual stream, and normalises the sum for the next branch."""

    def forward(self, branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if branch is None:
            return ops.layer_norm(residual, self.weight, self.bias, self.eps), residual
        return ops.add_layer_norm(branch, residual, self.weight, self.bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and the tokens before it, in H heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads at once
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D), S the tokens so far
        y = ops.causal_attention(
            q,
            k,
            v,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            kv_lengths=None if cache is None else cache.kv_lengths,
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token by itself: widen, GELU, narrow."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = "gelu_tanh" if config.gelu_approximate == "tanh" else "gelu"
        self.c_fc = Linear(config.n_embd, config.inner_dim)
        self.c_proj = Linear(config.inner_dim, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.c_fc(x, self.activation)))


class Block(nn.Module):
    """x = x + attention(ln_1(x)); x = x + mlp(ln_2(x)).

    Written so that every addition is fused with the LayerNorm after it: a block receives the branch not yet added
    and the residual stream, and hands on its own last branch and the stream.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = AddLayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = AddLayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, branch: Tensor | None, residual: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.ln_1(branch, residual)
        branch = self.attn(normed, cache, layer)
        normed, residual = self.ln_2(branch, residual)
        return self.mlp(normed), residual


class Transformer(nn.Module):
    """Everything below the head: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # where it stands
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = AddLayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, ids: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        residual = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        branch = None
        for layer, block in enumerate(self.h):
            branch, residual = block(branch, residual, cache, layer)
        return self.ln_f(branch, residual)[0]


class GPT(nn.Module):
    """A GPT-2-family language model.

    >>> model = GPT(GPTConfig.preset("gpt2"))
    >>> logits = model(ids)                      # (B, T) int64 -> (B, T, V)
    >>> loss = model.loss(ids, targets)          # mean nats a token, without holding the logits
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.source: Path | None = None  # the directory it was read from, whose tokenizer travels along
        self.tie_head()
        self.apply(self._init_weights)
        # The residual stream sums 2 · n_layer branches; their last layers start smaller by the root of that.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=config.initializer_range / (2 * config.n_layer) ** 0.5)

    def tie_head(self) -> None:
        """Makes the head and the token embedding one parameter, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position: (B, T) int64 -> (B, T, V)."""
        return self.lm_head(self.hidden(ids, cache))

    def hidden(self, ids: Tensor, cache: KVCache | None = None, lengths: list[int] | None = None) -> Tensor:
        """The last hidden states, after the final LayerNorm: (B, T) int64 -> (B, T, C).

        With a cache, `ids` continue the sequences it holds, and are added to it. `lengths` then allows rows of
        different lengths, padded on the left (see `KVCache.extend`).
        """
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be (B, T) int64, got {tuple(ids.shape)} {ids.dtype}")
        start = 0 if cache is None else cache.longest
        if start + ids.shape[1] > self.config.n_positions:
            raise ValueError(f"{start + ids.shape[1]} tokens do not fit the context of {self.config.n_positions}")
        if cache is None:
            if lengths is not None:
                raise ValueError("rows of different lengths need a cache, which removes their padding")
            positions = torch.arange(ids.shape[1], device=ids.device)
        else:
            positions = cache.extend(ids.shape[1], lengths)
        return self.transformer(ids, positions, cache)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` (B, T), -100 where not counted, given `ids` (B, T)."""
        return ops.linear_cross_entropy(self.hidden(ids), self.lm_head.weight, targets)

    @property
    def device(self) -> torch.device:
        return self.transformer.ln_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.ln_f.weight.dtype

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16; a quantised model (`llmfast/quantization/modules.py`) says int8, int4 or int4-all."""
        return next(name for name, dtype in FLOATS.items() if dtype == self.dtype)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> GPT:
        """Reads a GPT-2 checkpoint in Hugging Face's layout: a directory, a `.safetensors` or an old `.bin` file, the
        name of an embedded model, or a name on the hub (see `locate_model`).

        `FileNotFoundError` or `ValueError` with one line naming what is missing, surplus or wrongly shaped.
        """
        path = locate_model(path)
        config, tensors = checkpoint.load(path)
        with torch.device("meta"):  # no time spent on initial weights that are replaced at once
            model = cls(config)
        model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, assign=True)
        model.tie_head()
        model.source = path if path.is_dir() else path.parent
        return model.eval()

    def save_pretrained(self, path: str | Path, **metadata: Any) -> None:
        """Writes `config.json` and `model.safetensors` as Hugging Face's GPT-2 does, and the source's tokenizer."""
        checkpoint.save(path, self.config, self.state_dict(), tokenizer_from=self.source, **metadata)
