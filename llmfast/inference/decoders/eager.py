"""The model itself, run a step at a time: any architecture, on any device and backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from llmfast.backends import resolve
from llmfast.inference.cache import KVCache
from llmfast.inference.decoders.protocol import Decoder, precision_label
from llmfast.models import LanguageModel, ModelConfig, float_name


def backends_of(model: LanguageModel) -> tuple[str, ...]:
    """The backend of each op of the model, under the current choice. `BackendUnavailable` where one has none."""
    ops = (*model.config.ops, *([] if model.quantized_to is None else ["quantized_linear"]))
    return tuple(resolve(op, model.device, model.dtype, model.config.head_dim)[0] for op in ops)


def describe(model: LanguageModel, weights: str) -> str:
    """`Decoder.describe` of what runs the module: its backends, its precision, its device or number of threads."""
    backends = " and ".join(dict.fromkeys(backends_of(model)))
    where = f"{torch.get_num_threads()} threads" if model.device.type == "cpu" else str(model.device)
    return f"{backends}, {precision_label(weights, float_name(model.dtype))}, {where}"


def pad_left(sequences: list[list[int]], device: torch.device) -> Tensor:
    """(B, longest) int64: the sequences with their ends aligned. Padding is token 0, and never looked at."""
    longest = max(map(len, sequences))
    return torch.tensor([[0] * (longest - len(s)) + s for s in sequences], dtype=torch.int64, device=device)


def pad_right(sequences: list[list[int]], device: torch.device) -> Tensor:
    """(B, longest) int64: the sequences with their starts aligned, and token 0 where causal attention never looks."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [0] * (longest - len(s)) for s in sequences], dtype=torch.int64, device=device)


class EagerDecoder(Decoder):
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

    def describe(self, weights: str) -> str:
        return describe(self.model, weights)


class EagerReader:
    """A `Reader` that runs the module, without dropout even while it is being trained."""

    def __init__(self, model: LanguageModel):
        self.model = model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @torch.inference_mode()
    def read(self, sequences: list[list[int]], skip: list[int], rows: int) -> Iterator[Tensor]:
        model = self.model
        ids = pad_right(sequences, model.device)
        wanted = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (sequence, first) in enumerate(zip(sequences, skip, strict=True)):
            wanted[row, first : len(sequence)] = True
        with evaluating(model):
            hidden = model.hidden(ids)[wanted.to(model.device)]  # (n, C): the head is for these alone
            for some in hidden.split(rows):
                yield model.lm_head(some).float()

    def replay(self, prompts: list[list[int]], following: list[Tensor]) -> Tensor:
        """As `Reader.replay`, without any cache."""
        new = torch.stack(following, dim=1).tolist() if following else [[]] * len(prompts)
        sequences = [prompt + tokens for prompt, tokens in zip(prompts, new, strict=True)]
        return torch.cat([*self.read(sequences, [len(s) - 1 for s in sequences], len(sequences))])

    def describe(self, weights: str) -> str:
        return describe(self.model, weights)


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode in which it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
