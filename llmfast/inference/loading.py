"""From a model's name to an `LLM`: where its weights are, in which precision they are to run, and who runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmfast.backends import resolve
from llmfast.inference.decoders import NativeModel, native
from llmfast.inference.generation import LLM, chosen_backend
from llmfast.models import FLOATS
from llmfast.quantization.plan import PRECISIONS as QUANTIZED
from llmfast.quantization.plan import plan
from llmfast.tokenizers import load_tokenizer
from llmfast.weights.checkpoint import Stream, stream
from llmfast.weights.config_file import recommended_precision
from llmfast.weights.loading import module_of, quantized_module, stored_formats
from llmfast.weights.locate import locate_model

PRECISIONS = (*FLOATS, *QUANTIZED)


def load(
    name: str | Path = "stories",
    backend: str | Mapping[str, str] = "auto",
    precision: str = "auto",
    device: str | torch.device = "auto",
) -> LLM:
    """A model ready to generate: `name` is an embedded model, a directory, a weight file, or a name on the hub.

    `backend` as in `use_backend`; "auto" leaves the choice to the surrounding context. `device` is "auto" (a GPU where
    there is one), "cpu", "cuda", …. `precision` is one of

    - "fp32", "bf16", and on a GPU "fp16"
    - "int8", "int4", "int4-all" (see `quantization/plan.py`): the weights. Activations have 8 bits too where the native
      decoder runs, on a CPU with the C++ kernels; elsewhere they are floats, on a GPU of 16 bits and on a CPU of 32
    - "auto": what the model was quantised to, or its card recommends; else bf16 where the device multiplies it faster
      (on a GPU without it fp16), and fp32 elsewhere.

    On a CPU the weights are packed for the native decoder, and `LLM.model` is read only when somebody asks for it.
    """
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, got {precision!r}")
    place = _device(device)
    if precision == "fp16" and place.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; a CPU computes in fp32, bf16, int8 or int4")
    path = locate_model(name)
    source = stream(path)
    with chosen_backend(backend):
        why_not_native = native.why_not(source.config, place)
    if precision == "auto":
        precision = _best_precision(source, place, why_not_native is None)
    quantized = precision in QUANTIZED
    dtype = FLOATS[_fastest_float(place) if quantized else precision]
    with chosen_backend(backend):
        for op in (*source.config.ops, *(["quantized_linear"] if quantized else [])):
            # An unavailable backend is an error here, not at the first token.
            if resolve(op, place, dtype)[0] == "reference":
                raise ValueError("the reference backend computes in float64, to test single ops; it can't run a model")
    tokenizer = load_tokenizer(source.directory)
    planned = plan(source.config, precision) if quantized else {}
    if why_not_native is not None:
        if quantized:
            return LLM(quantized_module(source, precision, dtype, place), tokenizer, backend)
        return LLM(module_of(source, dtype).to(place), tokenizer, backend)
    packed = NativeModel(source.config, source.tensors(planned), precision, stored_formats(source, precision))
    return LLM(lambda: module_of(source, dtype, precision if quantized else None), tokenizer, backend, packed)


def _best_precision(source: Stream, device: torch.device, natively: bool) -> str:
    if device.type == "cuda":
        return source.precision or _fastest_float(device)
    if not natively:
        return "fp32"
    return recommended_precision(source.path) or native.fastest_float()


def _fastest_float(device: torch.device) -> str:
    """The floats that go with a module's quantised weights, or are best by themselves on a GPU."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} can't be used: {str(error).splitlines()[0]}") from None
    return place


def generate(prompt: Any, **settings: Any) -> Any:
    """`load("stories").generate(prompt, ...)`: text from the embedded model, which is loaded once."""
    global _embedded
    if _embedded is None:
        _embedded = load("stories")
    return _embedded.generate(prompt, **settings)


_embedded: LLM | None = None
