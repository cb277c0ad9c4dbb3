"""From a model's name to an `LLM`: where its weights are, and what of them is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmfast.backends import chosen
from llmfast.inference.decoders import NativeModel
from llmfast.inference.execution import Execution, check_precision, chosen_backend, device_of
from llmfast.inference.llm import LLM
from llmfast.tokenizers import load_tokenizer
from llmfast.weights.checkpoint import stream
from llmfast.weights.config_file import end_tokens
from llmfast.weights.folding import adapted
from llmfast.weights.loading import formats_of, module_of, quantized_module
from llmfast.weights.locate import locate_model


def load(
    name: str | Path = "stories",
    backend: str | Mapping[str, str] = "auto",
    precision: str = "auto",
    device: str | torch.device = "auto",
    adapter: str | Path | None = None,
) -> LLM:
    """A model ready to generate: `name` is an embedded model, one that `llmfast get` has brought, a directory, a weight
    file (.safetensors, .bin, .gguf), or a name on the hub. An `adapter`, a directory that `llmfast finetune` or peft
    wrote, is added to its weights; a `name` may also be such a directory, which says of what model it is.

    `backend` as in `use_backend`; "auto" leaves the choice to the surrounding context. `device` is "auto" (a GPU where
    there is one), "cpu", "cuda", …. `precision` is one of

    - "fp32", "bf16", and on a GPU "fp16"
    - "int8", "int4", "int4-all", "q8_0", "q4_1", "q4_k" (see `quantization/plan.py`): the weights. Activations have 8
      bits too where the native decoder runs, on a CPU with the C++ kernels; elsewhere they are floats, on a GPU of 16
      bits and on a CPU of 32
    - "auto": what the model was quantised to, or its card recommends; else bf16 where the device multiplies it faster
      (on a GPU without it fp16), and fp32 elsewhere.

    On a CPU the weights are packed for the native decoder, and `LLM.model` is read only when it is asked for.
    """
    place = device_of(device)
    check_precision(precision, place)
    source = stream(locate_model(name))
    if not source.config.generates:
        raise ValueError(f"{name} is an encoder, which turns text into vectors and writes none: see llmfast.Embedder")
    if adapter is not None:
        source = adapted(source, Path(adapter))
    with chosen_backend(backend):
        run = Execution.of(source, precision, place)
    tokenizer, ends = load_tokenizer(source.path), end_tokens(source.path)
    if run.natively:
        formats = formats_of(source, run.precision) if run.quantized else {}
        packed = NativeModel(source.config, source.tensors(formats), run.precision, formats)
        rounded = run.precision if run.quantized else None
        return LLM(lambda: module_of(source, run.dtype, rounded), tokenizer, backend, packed, ends)
    if run.quantized:
        return LLM(quantized_module(source, run.precision, run.dtype, place), tokenizer, backend, None, ends)
    return LLM(module_of(source, run.dtype).to(place), tokenizer, backend, None, ends)


def generate(prompt: Any, **settings: Any) -> Any:
    """`load("stories").generate(prompt, ...)`: text from the embedded model, loaded once for a choice of backends."""
    return _embedded(chosen()).generate(prompt, **settings)


@functools.cache
def _embedded(backends: frozenset[tuple[str, str]]) -> LLM:
    """What `load` makes of it depends on the backends chosen: packed or not, and in which precision."""
    return load("stories")
