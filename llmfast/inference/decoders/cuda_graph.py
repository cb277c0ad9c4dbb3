"""A decode step as CUDA graphs: recorded once, and replayed with one launch for the model and one for the choice.

A step of GPT-2 124M is about 130 kernels of a microsecond or two each, and launching one from Python takes many times
that. A graph (CUDA's "stream capture") launches all of them at once. The two functions of `StaticDecoder` are recorded
apart: the model's once for a batch size and capacity, the choice again for other sampling settings.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from llmfast.backends import BackendUnavailable, capturable
from llmfast.inference.decoders.eager import backends_of
from llmfast.inference.decoders.static import StaticDecoder
from llmfast.inference.sampling import Sampler
from llmfast.models import LanguageModel

WARM_UPS = 2  # the first run of a kernel may compile, load and allocate, which a recording may not
SMALLEST_CAPACITY = 256
KEPT = 4  # decoders that wait for their next use
_one_at_a_time = threading.Lock()  # a recording begins with waiting for the GPU, which another one would not survive


def why_not(model: LanguageModel) -> str | None:
    """Why a decode step of this model can't be recorded under the current choice of backends, or None."""
    if model.device.type != "cuda":
        return f"it runs on a GPU, not on {model.device}"
    if os.environ.get("LLMFAST_CUDA_GRAPH", "1") == "0":
        return "LLMFAST_CUDA_GRAPH is 0"
    try:
        names = backends_of(model)
    except BackendUnavailable as error:
        return str(error)
    unsafe = [name for name in dict.fromkeys(names) if not capturable(name)]
    return f"backend {unsafe[0]!r} does not say that it is capturable" if unsafe else None


class CudaGraphDecoder(StaticDecoder):
    """A `StaticDecoder` that replays its steps. It records them when it is first used, and again when the model's
    parameters lie elsewhere or other backends are chosen (a change of their values in place needs no new recording).
    """

    def __init__(self, model: LanguageModel, batch: int = 1, capacity: int | None = None):
        super().__init__(model, batch, capacity)
        self._recorded_from: tuple[object, ...] = ()
        self._model_graph: torch.cuda.CUDAGraph | None = None
        self._choose_graph: torch.cuda.CUDAGraph | None = None
        self._chosen_by: tuple[object, ...] = ()

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        self._record_model()
        return super().prefill(prompts)

    def _record_model(self) -> None:
        now = (*backends_of(self.model), *(p.data_ptr() for p in self.model.parameters()))
        if now == self._recorded_from:
            return
        self._model_graph = self._choose_graph = None  # their memory first
        self._chosen_by = ()
        # The two graphs share memory for what lives only within each: they never run at the same time.
        self._pool = torch.cuda.graph_pool_handle()
        self.cache.clear()
        self._model_graph = self._record(self._model_step)
        self.cache.longest = WARM_UPS  # so much it holds of warming up, which the next `clear` removes
        self._recorded_from = now

    def begin(self, sampler: Sampler) -> None:
        super().begin(sampler)
        self._record_model()
        settings, vocabulary = sampler.settings, sampler.vocabulary
        now = (settings, vocabulary, self.seen.data_ptr())
        if now != self._chosen_by:
            self._choose_graph = None
            self._choose_graph = self._record(lambda: self._choose_step(settings, vocabulary))
            self._chosen_by = now

    def _record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Runs it a few times on a stream of its own, then records it."""
        with _one_at_a_time, torch.cuda.device(self.model.device):
            self.drawn.zero_()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # On the stream that warmed up, which is this device's. Another thread may go on using the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                run()
        return graph

    def _run_model(self) -> None:
        assert self._model_graph is not None, "prefill comes before step"
        self._model_graph.replay()

    def _run_choose(self) -> None:
        assert self._choose_graph is not None
        self._choose_graph.replay()

    def describe(self, weights: str) -> str:
        return f"{super().describe(weights)}, CUDA graph"


class DecoderPool:
    """Recorded decoders of one model that wait for their next use, because recording takes longer than short texts.

    A decoder that is taken has one user, until its `close`. Capacities are rounded up, so that few sizes are recorded.
    """

    def __init__(self, kind: type[StaticDecoder] = CudaGraphDecoder):
        self._kind = kind
        self._lock = threading.Lock()
        self._waiting: list[StaticDecoder] = []  # the last used at the end

    def take(self, model: LanguageModel, batch: int, capacity: int) -> StaticDecoder:
        capacity = min(model.config.context, max(SMALLEST_CAPACITY, 1 << (capacity - 1).bit_length()))
        decoder = self._waiting_one(model, batch, capacity) or self._kind(model, batch, capacity)
        decoder.give_back = self._give_back
        return decoder

    def _waiting_one(self, model: LanguageModel, batch: int, capacity: int) -> StaticDecoder | None:
        with self._lock:
            for decoder in reversed(self._waiting):
                if (decoder.batch, decoder.capacity) == (batch, capacity) and _fits(decoder, model):
                    self._waiting.remove(decoder)
                    return decoder
        return None

    def _give_back(self, decoder: StaticDecoder) -> None:
        decoder.give_back = None  # which held the pool: while it waits, only the pool holds it
        with self._lock:
            self._waiting = [*self._waiting, decoder][-KEPT:]


def _fits(decoder: StaticDecoder, model: LanguageModel) -> bool:
    """Whether the decoder's buffers are still where, and of what type, the model is."""
    cache = decoder.cache.keys
    return decoder.model is model and (cache.device, cache.dtype) == (model.device, model.dtype)
