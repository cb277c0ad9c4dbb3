"""A decode step that is the same every time: fixed buffers, lengths on the device, and nothing asked of the host.

    tokens (B,) -> [model] -> logits (B, V) -> [choose] -> tokens (B,) -> …

`StaticDecoder` runs the two functions in brackets as they are, on any device. They read and write only memory that
never moves, and never look at a value, so a CUDA graph can record them: `CudaGraphDecoder` replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from llmfast.inference.cache import StaticKVCache
from llmfast.inference.decoders import eager
from llmfast.inference.decoders.protocol import Decoder
from llmfast.inference.finite import check_chosen
from llmfast.inference.sampling import Sampler, SamplingSettings, choose
from llmfast.models import LanguageModel


class StaticDecoder(Decoder):
    """`batch` sequences of up to `capacity` tokens, whose `generate` chooses on the device."""

    def __init__(self, model: LanguageModel, batch: int = 1, capacity: int | None = None):
        config, device = model.config, model.device
        self.model, self.batch = model, batch
        self.capacity = config.context if capacity is None else capacity
        self.cache = StaticKVCache(config, batch, self.capacity, device, model.dtype)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, config.vocab_size, dtype=torch.float32, device=device)
        # One number a token and row, drawn beforehand, and how many rows of them are used.
        self.uniform = torch.zeros(self.capacity + 1, batch, dtype=torch.float64, device=device)
        self.drawn = torch.zeros(1, dtype=torch.int64, device=device)
        # The tokens that a repetition penalty applies to; made when there is one.
        self.seen = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.give_back: Callable[[StaticDecoder], None] | None = None  # called by `close`

    # --- what is recorded: no sync, no size that varies, no tensor that leaves its place ---------------------------

    def _model_step(self) -> None:
        # A row whose logits were not finite has token -1, which the embedding must not see.
        hidden = self.model.hidden(self.tokens.clamp(min=0).unsqueeze(1), self.cache)
        self.logits.copy_(self.model.lm_head(hidden[:, -1]))

    def _choose_step(self, settings: SamplingSettings, vocabulary: int) -> None:
        uniform, seen = None, None
        if settings.temperature > 0:
            uniform = self.uniform.index_select(0, self.drawn).squeeze(0)
            self.drawn.add_(1)
        if settings.repetition_penalty != 1:
            seen = self.seen[:, :vocabulary]
        self.tokens.copy_(choose(self.logits[:, :vocabulary], settings, uniform, seen))
        if seen is not None:
            seen.scatter_(1, self.tokens.clamp(min=0).unsqueeze(1), True)

    # --- how it is run, which a subclass replaces -----------------------------------------------------------------

    def begin(self, sampler: Sampler) -> None:
        """Before a text's buffers are filled: what `_run_choose` does, and memory for what it marks."""
        self._settings, self._vocabulary = sampler.settings, sampler.vocabulary
        if sampler.seen is not None and self.seen.shape != sampler.seen.shape:
            self.seen = torch.zeros_like(sampler.seen)

    def _run_model(self) -> None:
        self._model_step()

    def _run_choose(self) -> None:
        self._choose_step(self._settings, self._vocabulary)

    # --- the protocol ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Starts over: prompts of any lengths, at least one token each -> logits (B, V)."""
        if len(prompts) != self.batch or not all(prompts):
            raise ValueError(f"prefill takes {self.batch} prompts of at least one token")
        self.cache.clear()
        ids = eager.pad_left(prompts, self.model.device)
        hidden = self.model.hidden(ids, self.cache, lengths=[len(prompt) for prompt in prompts])
        self.logits.copy_(self.model.lm_head(hidden[:, -1]))
        return self.logits.clone()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """One token more for every sequence: (B,) int64 -> logits (B, V)."""
        self.tokens.copy_(tokens)
        self._advance()
        return self.logits.clone()

    def _advance(self) -> None:
        if self.cache.longest >= self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {self.cache.longest} + 1 do not fit")
        self._run_model()
        self.cache.longest += 1

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], count: int, sampler: Sampler) -> Generator[Tensor, None, None]:
        """As `Decoder.generate`: tokens are fed back on the device, and the host reads them a step
        behind, while the next step runs."""
        longest = max(map(len, prompts))
        if longest + count - 1 > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {longest} + {count - 1} do not fit")
        self.begin(sampler)
        if sampler.seen is not None:
            self.seen.copy_(sampler.seen)
        if sampler.generators is not None:
            columns = [torch.rand(count, generator=g, dtype=torch.float64, device=g.device) for g in sampler.generators]
            self.uniform[:count].copy_(torch.stack(columns, dim=1))
            self.drawn.zero_()
        self.prefill(prompts)
        on_gpu = self.tokens.is_cuda
        arrived = torch.empty(count, self.batch, dtype=torch.int64, pin_memory=on_gpu)
        events: list[torch.cuda.Event] = []
        try:
            for step in range(count):
                if step:
                    self._advance()
                self._run_choose()
                arrived[step].copy_(self.tokens, non_blocking=True)
                if on_gpu:
                    events.append(torch.cuda.Event())
                    events[step].record()
                if step:
                    yield _when_there(arrived, events, step - 1)
            if count:
                yield _when_there(arrived, events, count - 1)
        finally:
            if events:
                events[-1].synchronize()  # the buffers' next user may be on another stream
            if sampler.seen is not None:
                sampler.seen.copy_(self.seen)

    def close(self) -> None:
        if self.give_back is not None:
            self.give_back(self)

    def describe(self, weights: str) -> str:
        return eager.describe(self.model, weights)


def _when_there(arrived: Tensor, events: list[torch.cuda.Event], step: int) -> Tensor:
    """A row of `arrived`, after its event if it comes from a GPU."""
    if events:
        events[step].synchronize()
    check_chosen(arrived[step])
    return arrived[step]
