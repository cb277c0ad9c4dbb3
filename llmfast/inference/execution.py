"""How a model runs: the one place that decides, from its precision, the device, and the backends chosen around.

    on a CPU, all of its ops on the C++ kernels     natively: packed weights, one call a step
    on a GPU, all of its backends capturable        eagerly, its decode steps recorded as CUDA graphs
    elsewhere                                       eagerly: the module, op by op

`Execution` decides how a checkpoint is to run, before it is read; `Runner` who runs what was read, and `EncoderRunner`
who gives the vectors of texts.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llmfast.backends import resolve, use_backend
from llmfast.inference.decoders import (
    CudaGraphDecoder,
    Decoder,
    DecoderPool,
    EagerDecoder,
    EagerReader,
    KeepingDecoder,
    NativeAdapter,
    NativeDecoder,
    NativeModel,
    NativeReader,
    PrefixCache,
    Reader,
    SpeculatingDecoder,
    UncachedDecoder,
    beside,
    cuda_graph,
    native,
)
from llmfast.inference.encoders import EagerEncoder, Encoder, NativeEncoder
from llmfast.models import FLOATS, LanguageModel, ModelConfig
from llmfast.quantization.plan import PRECISIONS as QUANTIZED
from llmfast.weights.adapter import Adapter
from llmfast.weights.loading import encoder_of, in_formats, module_of
from llmfast.weights.stream import Stream

PRECISIONS = (*FLOATS, *QUANTIZED)
# Bytes of packed weights from which on guessing ahead is tried unasked. It takes 40 µs of Python a token, which are 1 %
# of a step of SmolLM2 (97 MB), and 12 % of one of `stories` (6 MB).
LARGE_ENOUGH_TO_GUESS = 32 << 20
Item = TypeVar("Item")


def chosen_backend(backend: str | Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """`use_backend`, but for "auto" whatever the surrounding context has chosen."""
    return contextlib.nullcontext() if backend == "auto" else use_backend(backend)


def each_under(using: Callable[[], contextlib.AbstractContextManager[None]], items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made under a context of its own, which does not reach what is done with them."""
    while True:
        with using():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@dataclass(frozen=True)
class Execution:
    """How a checkpoint is to run, which says what of it is read."""

    device: torch.device
    precision: str
    natively: bool  # packed for the native decoder

    @classmethod
    def of(cls, source: Stream, precision: str, device: torch.device) -> Execution:
        """`precision` "auto" is the best for the model and the device.

        `ValueError`, or `BackendUnavailable`, where the chosen backends can't run it there.
        """
        natively = source.bottlenecks is None and native.why_not(source.config, device) is None
        if precision == "auto":
            precision = best_precision(source, device, natively)
        made = cls(device, precision, natively)
        for op in (*source.config.ops, *(["quantized_linear"] if made.quantized else [])):
            # An unavailable backend is an error here, not at the first token.
            if resolve(op, device, made.dtype)[0] == "reference":
                raise ValueError("the reference backend computes in float64, to test single ops; it can't run a model")
        return made

    @property
    def quantized(self) -> bool:
        return self.precision in QUANTIZED

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's floats: all its weights, or what goes with quantised ones."""
        return FLOATS[fastest_float(self.device) if self.quantized else self.precision]


def check_precision(precision: str, device: torch.device) -> None:
    """`ValueError` for one that is not known, or not computed there."""
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; a CPU computes in fp32, bf16, int8 or int4")


def best_precision(source: Stream, device: torch.device, natively: bool) -> str:
    """What a model was quantised to, or its card recommends where it runs natively; else the device's best floats."""
    if device.type == "cuda":
        return source.precision or fastest_float(device)
    if not natively:
        return "fp32"
    return source.recommended_precision() or native.fastest_float()


def fastest_float(device: torch.device) -> str:
    """The floats that go with a module's quantised weights, or are best by themselves on a GPU."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def device_of(device: str | torch.device) -> torch.device:
    """ "auto" is a GPU where there is one. `ValueError` for a device that can't be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} can't be used: {str(error).splitlines()[0]}") from None
    return place


class Runner:
    """One model's weights in the forms in which they run, and the choice of who runs them.

    `model` is the module, put into evaluation mode, or a function that reads it when it is first needed; `packed` the
    same weights for the native decoder. A module whose parameters change in place, or are replaced, is packed again
    (changes through `parameter.data`, which PyTorch does not count, go unnoticed). Every method decides under the
    backends that are chosen around its call. Safe for several threads.
    """

    def __init__(self, model: LanguageModel | Callable[[], LanguageModel], packed: NativeModel | None = None):
        self._model = model.eval() if isinstance(model, LanguageModel) else None
        self._read_model = model
        self._packed = packed
        self._packed_from = _fingerprint(self._model)
        self._lock = threading.Lock()  # around reading and packing
        self._recorded = DecoderPool()
        self.prefixes = PrefixCache()
        self.adapters: dict[str, Adapter] = {}
        self._native_adapters: dict[str, tuple[Adapter, NativeAdapter, PrefixCache]] = {}

    @property
    def model(self) -> LanguageModel:
        """The PyTorch module."""
        with self._lock:
            if self._model is None:
                assert not isinstance(self._read_model, LanguageModel)
                with torch.inference_mode(False):  # parameters that can be trained, wherever this is called
                    self._model = self._read_model().eval()
                self._packed_from = _fingerprint(self._model)
            return self._model

    @property
    def config(self) -> ModelConfig:
        return self._packed.config if self._packed is not None else self.model.config

    @property
    def precision(self) -> str:
        return self._packed.precision if self._packed is not None else self.model.precision

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._model is None else self._model.device

    def packed(self) -> NativeModel | None:
        """The packed weights, where they run natively; else None."""
        if self._packed is None or native.why_not(self.config, self.device) is not None:
            return None
        with self._lock:
            return self._packed_now()

    def _packed_now(self) -> NativeModel | None:
        """With the lock held: the packed weights, after packing those that changed."""
        if self._packed is not None and (now := _fingerprint(self._model)) != self._packed_from:
            assert self._model is not None
            self._packed = NativeModel(self._packed.config, self._model.state_dict().items(), self._packed.precision)
            self._packed_from = now
        return self._packed

    def why_not_cuda_graph(self) -> str | None:
        """Why generating does not replay CUDA graphs, or None where it does."""
        if self.packed() is not None:
            return "it runs natively, on the CPU"
        return cuda_graph.why_not(self.model)

    def decoder(
        self,
        batch: int,
        capacity: int,
        use_cache: bool = True,
        speculate: int | None = 0,
        keep_recorded: bool = False,
        prompt: list[int] | None = None,
        exact: bool = True,
        constrained: bool = False,
        recordable: bool = True,
        adapters: Sequence[str | None] | None = None,
    ) -> Decoder:
        """A decoder for `batch` sequences of up to `capacity` tokens.

        `speculate` guesses so many tokens ahead, None as many as pay, where it can. With `keep_recorded` a recorded
        decoder is kept for a later use: of at least the capacity, and until its `close`. A decoder of one sequence may
        hold what its `prompt` begins with: with `exact` only as far as its bits are those of a prefill. `constrained`
        texts must have a form; not `recordable` is a choice of tokens that asks Python. `adapters` has a name, or None,
        for every sequence. `ValueError` for what can't be combined.
        """
        if adapters is not None and not any(adapters):
            adapters = None
        if speculate and (not use_cache or self.packed() is None):
            raise ValueError("speculate needs the native decoder and its cache: a CPU, and the C++ backend")
        if not use_cache:
            return UncachedDecoder(self.reader(adapters))
        packed = self.packed()
        if packed is not None:
            chosen = [self._native_adapter(packed, name) if name else (None, self.prefixes) for name in adapters or ()]
            if batch == 1 and prompt is not None:
                prefixes = chosen[0][1] if chosen else self.prefixes
                decoder: NativeDecoder = prefixes.take(packed, prompt, capacity, exact)
            else:
                decoder = NativeDecoder(packed, batch, capacity)
                if chosen:
                    decoder.adapt([adapter for adapter, _ in chosen])
            guessing = speculate is None and packed.nbytes >= LARGE_ENOUGH_TO_GUESS
            wanted = speculate or (batch == 1 and (constrained or guessing))
            return SpeculatingDecoder(decoder, speculate) if wanted else decoder
        model = self.model.eval()  # training it meanwhile has left dropout on
        if adapters is not None:
            return EagerDecoder(beside(model, self._named(adapters)), batch, capacity)
        if not recordable or cuda_graph.why_not(model) is not None:
            return EagerDecoder(model, batch, capacity)
        return (
            self._recorded.take(model, batch, capacity) if keep_recorded else CudaGraphDecoder(model, batch, capacity)
        )

    def scorer(self, sequence: list[int], step: int) -> KeepingDecoder | None:
        """A native decoder that may hold what `sequence` begins with, or None; until its `close`."""
        packed = self.packed()
        return None if packed is None else self.prefixes.take_to_score(packed, sequence, step)

    def reader(self, adapters: Sequence[str | None] | None = None) -> Reader:
        """What runs the model over tokens that are given; with `adapters`, over as many sequences as there are."""
        packed = self.packed()
        if packed is not None:
            chosen = [self._native_adapter(packed, name)[0] if name else None for name in adapters or ()]
            return NativeReader(packed, chosen or None)
        return EagerReader(self.model if adapters is None else beside(self.model, self._named(adapters)))

    def _named(self, names: Sequence[str | None]) -> list[Adapter | None]:
        return [None if name is None else self.adapters[name] for name in names]

    def _native_adapter(self, packed: NativeModel, name: str) -> tuple[NativeAdapter, PrefixCache]:
        """The adapter of this name, packed for the weights as they are now, and what texts with it keep."""
        with self._lock:
            adapter = self.adapters[name]
            known = self._native_adapters.get(name)
            if known is None or known[0] is not adapter or known[1].model is not packed:
                made = NativeAdapter(packed, adapter)
                known = self._native_adapters[name] = adapter, made, PrefixCache(adapter=made)
            return known[1:]

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        with self._lock:
            packed = self._packed_now()  # which never changes, and is shared
            made = Runner(self._read_model if self._model is None else copy.deepcopy(self._model, memo), packed)
            made.adapters = dict(self.adapters)
            return made

    def __reduce__(self) -> Any:
        raise TypeError("a model that is ready to run can't be pickled: save it, and load it where it is needed")


class EncoderRunner:
    """An encoder, or a language model whose last hidden states are taken, and the choice of who runs it.

    `precision` is "fp32" or "bf16", on a GPU "fp16", and where an encoder runs natively one of integers, too. `encoder`
    decides under the backends that are chosen around its call. `ValueError` for a precision that is not computed there.
    """

    def __init__(self, source: Stream, precision: str, device: torch.device):
        self.config, self.precision, self.device = source.config, precision, device
        self._source = source
        self._packed: NativeModel | None = None
        self._eager: EagerEncoder | None = None
        self._lock = threading.Lock()
        if precision == "auto" or precision not in (*FLOATS, *QUANTIZED):
            raise ValueError(f"precision must be fp32, bf16, int8 or on a GPU fp16, got {precision!r}")
        self.encoder()  # read now, so that what is wrong with it is said now

    def why_not_native(self) -> str | None:
        if self.config.generates:
            return "it is a language model, which is read for its hidden states by its module"
        return native.why_not(self.config, self.device)

    def encoder(self) -> Encoder:
        reason = self.why_not_native()
        with self._lock:
            if reason is None and self.precision != "fp16":
                if self._packed is None:
                    self._packed = NativeModel(self.config, in_formats(self._source, {}), self.precision)
                return NativeEncoder(self._packed)
            if self.precision not in FLOATS or (self.precision == "fp16" and self.device.type == "cpu"):
                raise ValueError(f"precision {self.precision} is not computed here: {reason or 'a CPU has no fp16'}")
            if self._eager is None:
                self._eager = EagerEncoder(self._hidden(), self.device)
            return self._eager

    def _hidden(self) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
        if not self.config.generates:
            return encoder_of(self._source, FLOATS[self.precision]).to(self.device)
        decoder = module_of(self._source, FLOATS[self.precision]).to(self.device)
        return lambda ids, _: decoder.hidden(ids)  # no token sees the padding after it


def _fingerprint(model: LanguageModel | None) -> list[tuple[int, int]]:
    """Differs when parameters were replaced or changed in place."""
    if model is None:
        return []
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
