"""The models that are measured: what `load` finds, or one of the shapes of this package with random weights.

Random weights are as fast as trained ones, and nothing has to be downloaded; "gpt2" is GPT-2 124M's shape.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import llmfast
from llmfast import LLM
from llmfast.backends import OPS, backends
from llmfast.benchmarking.comparison import Entry, WrongResult
from llmfast.benchmarking.peers.counting import Formats
from llmfast.benchmarking.peers.models import prompt_ids
from llmfast.inference.decoders import EagerDecoder
from llmfast.inference.execution import PRECISIONS
from llmfast.models import FLOATS, PRESETS, ModelConfig, create
from llmfast.quantization.plan import PRECISIONS as QUANTISED
from llmfast.weights.checkpoint import stream
from llmfast.weights.locate import EMBEDDED, locate_model

EXACT = 1e-3  # how far float32 logits may be from PyTorch's, relative to the largest
# Of other precisions' logits with float32's.
CORRELATION = dict.fromkeys(PRECISIONS, 0.99) | dict.fromkeys(("int4", "int4-all", "q4_1", "q4_k"), 0.9)

# How a precision stores the blocks, the head, the cache and the vectors, and which limit bounds its products.
FORMATS = {
    "fp32": Formats("f32", "f32", "f32"),
    "bf16": Formats("bf16", "bf16", "bf16"),
    "fp16": Formats("f16", "f16", "f16"),
    "int8": Formats("int8", "int8", "bf16"),
    "int4": Formats("int4", "int8", "bf16"),
    "int4-all": Formats("int4", "int4", "bf16"),
    "q8_0": Formats("q8_0", "q8_0", "bf16"),
    "q4_1": Formats("q4_1", "q8_0", "bf16"),
    "q4_k": Formats("q4_k", "q8_0", "bf16"),
}
ARITHMETIC = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"} | dict.fromkeys(QUANTISED, "int8")


@functools.cache
def path_of(model: str) -> Path:
    """Where a model's files are. Those of a shape with random weights are made, for as long as this process lives."""
    if model not in PRESETS or model in EMBEDDED:
        return locate_model(model)
    folder = tempfile.TemporaryDirectory(prefix=f"llmfast-{model}-")
    atexit.register(folder.cleanup)
    torch.manual_seed(0)
    create(PRESETS[model]).save_pretrained(folder.name)
    return Path(folder.name)


def config_of(model: str) -> ModelConfig:
    return PRESETS[model] if model in PRESETS else stream(locate_model(model)).config


@functools.lru_cache(maxsize=8)
def llm_of(model: str, entry: Entry, device: str) -> LLM:
    """The model as a competitor runs it; kept, since several comparisons in a row need the same."""
    return llmfast.load(path_of(model), ops_of(entry.backend, device), entry.precision, device)


def ops_of(backend: str, device: str) -> str | dict[str, str]:
    """The backend for the ops that it has: a user's kernel for one op is measured with the others around it."""
    able = {row.op for row in backends() if (row.backend, row.device) == (backend, device) and row.available}
    return backend if len(able) in (0, len(OPS)) else dict.fromkeys(able, backend)


def competitors(precisions: Sequence[str], device: str = "cpu", chosen: Sequence[str] = ()) -> tuple[Entry, ...]:
    """Who can run a model here: PyTorch's operators first, in floats, then the backends `chosen`, or this device's."""
    own = "triton" if device == "cuda" else "cpp"
    there = any((row.backend, row.device) == (own, device) and row.available for row in backends())
    names = dict.fromkeys(["pytorch", *(chosen or [own] * there)])
    quantising = {r.backend for r in backends() if (r.op, r.device) == ("quantized_linear", device) and r.available}
    able = {name: {*FLOATS, *QUANTISED} for name in names if name in quantising and name != "pytorch"}
    floats = set(FLOATS) - ({"fp16"} if device == "cpu" else set())
    return tuple(Entry(n, p) for n in names for p in precisions if p in able.get(n, floats))


@functools.lru_cache(maxsize=32)
def expected_logits(model: str, tokens: int, device: str) -> Tensor:
    """(V,) float32: what PyTorch's operators say in float32 after the first `tokens` of the common prompt."""
    llm = llm_of(model, Entry("pytorch", "fp32"), device)
    ids = prompt_ids(tokens, llm.config.vocab_size)
    with llm.using_backend():
        return EagerDecoder(llm.model, 1, tokens).prefill([ids])[0].cpu()


def check_logits(found: Tensor, expected: Tensor, precision: str) -> float:
    """How wrong (V,) logits are, in units of what the precision allows; `WrongResult` where that is more than 1."""
    found = found.float().cpu()
    if precision == "fp32":
        off = float((found - expected).abs().max()) / (EXACT * max(1.0, float(expected.abs().max())))
    else:
        off = (1 - float(torch.corrcoef(torch.stack([found, expected]))[0, 1])) / (1 - CORRELATION[precision])
    if not off <= 1:
        raise WrongResult(f"wrong, so not timed: its logits differ from PyTorch's in float32 {off:.3g} times too much")
    return round(off, 4)
