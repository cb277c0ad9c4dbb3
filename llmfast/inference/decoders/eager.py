"""The model itself, run a step at a time: with a KV cache, or computing everything again at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from llmfast.inference.cache import KVCache
from llmfast.models import LanguageModel


def pad_left(sequences: list[list[int]], device: torch.device) -> Tensor:
    """(B, longest) int64: the sequences with their ends aligned. Padding is token 0, and never looked at."""
    longest = max(map(len, sequences))
    return torch.tensor([[0] * (longest - len(s)) + s for s in sequences], dtype=torch.int64, device=device)


class EagerDecoder:
    """Prefill in one pass, then one token a step against the cache: O(T) work for the T-th token."""

    def __init__(self, model: LanguageModel, batch: int, capacity: int | None = None):
        self.model = model
        self.cache = KVCache(model.config, batch, capacity, device=model.device, dtype=model.dtype)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.cache.clear()
        ids = pad_left(prompts, self.model.device)
        return self._last_logits(self.model.hidden(ids, self.cache, lengths=[len(p) for p in prompts]))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        return self._last_logits(self.model.hidden(tokens.unsqueeze(1), self.cache))

    def _last_logits(self, hidden: Tensor) -> Tensor:
        """The head runs on the last position only: it is a third of GPT-2's work."""
        return self.model.lm_head(hidden[:, -1]).float()


class UncachedDecoder:
    """The whole text again for every token, O(T²) in all: what a cache saves, and a check on it."""

    def __init__(self, model: LanguageModel):
        self.model = model
        self.sequences: list[list[int]] = []

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.sequences = [list(prompt) for prompt in prompts]
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        return self._logits()

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        """Sequences of different lengths are padded on the right, where causal attention never looks."""
        longest = max(map(len, self.sequences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in self.sequences], device=self.model.device)
        last = torch.tensor([len(s) - 1 for s in self.sequences], device=self.model.device)
        hidden = self.model.hidden(ids)[torch.arange(len(self.sequences), device=ids.device), last]
        return self.model.lm_head(hidden).float()
