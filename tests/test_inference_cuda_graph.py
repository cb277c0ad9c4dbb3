"""The decode step that a CUDA graph records: the eager decoder's text, and nothing in it that can't be recorded.

Without a GPU the step runs unrecorded on the CPU, and what recording does is tested on graphs that only call it.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS, assert_same_greedy, slow_in_the_interpreter, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llmfast
from llmfast import GPT, LLM
from llmfast.backends import _registry, pytorch
from llmfast.inference.cache import StaticKVCache
from llmfast.inference.decoders import CudaGraphDecoder, DecoderPool, EagerDecoder, StaticDecoder, cuda_graph
from llmfast.inference.sampling import Sampler, SamplingSettings
from llmfast.quantization.formats import quantize
from llmfast.quantization.modules import fill
from llmfast.quantization.plan import plan

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingSettings(temperature=0)
EVERYTHING = SamplingSettings(1.1, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(3)
    return GPT(tiny_config(n_positions=24, initializer_range=0.5)).eval()


def quantized(model: GPT, precision: str) -> GPT:
    formats = plan(model.config, precision)
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    weights = ((name, quantize(t, formats[name]) if name in formats else t) for name, t in state.items())
    with torch.device("meta"):
        empty = GPT(model.config)
    return fill(empty, precision, weights, torch.float32)


def generated(decoder: StaticDecoder, count: int, settings: SamplingSettings = GREEDY, prompts=PROMPTS, **others):
    """(rows, count) tokens."""
    prompts = [list(prompt) for prompt in prompts]
    return torch.stack([*decoder.generate(prompts, count, Sampler(settings, decoder.logits.shape[1], **others))], dim=1)


# --- the same as the eager decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [slow_in_the_interpreter(place) for place in BACKENDS if place[0] != "cpp"])
def test_its_logits_are_the_eager_decoders(model, place):
    backend, device = place
    model = copy.deepcopy(model).to(device)
    static, eager = StaticDecoder(model, 3, 16), EagerDecoder(model, 3, 16)
    with llmfast.use_backend(backend):
        for _ in range(2):  # prefill starts over
            torch.testing.assert_close(static.prefill(PROMPTS), eager.prefill(PROMPTS))
            for token in range(6):
                tokens = torch.tensor([token, token + 3, 18 - token], device=device)
                torch.testing.assert_close(static.step(tokens), eager.step(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_models_too(model, precision):
    model = quantized(model, precision)
    static, eager = StaticDecoder(model, 3, 16), EagerDecoder(model, 3, 16)
    with llmfast.use_backend("pytorch"):
        torch.testing.assert_close(static.prefill(PROMPTS), eager.prefill(PROMPTS))
        tokens = torch.tensor([4, 5, 6])
        for _ in range(4):
            torch.testing.assert_close(static.step(tokens), eager.step(tokens), rtol=1e-4, atol=1e-4)


@pytest.fixture
def static_llm(monkeypatch):
    """Makes an LLM that decodes with the steps that a graph would record."""

    def make(llm: LLM, backend: str = "pytorch") -> LLM:
        monkeypatch.setattr(cuda_graph, "why_not", lambda model: None)
        made = LLM(llm.model, llm.tokenizer, backend)
        made.runner._recorded = DecoderPool(StaticDecoder)
        return made

    return make


@pytest.mark.parametrize("place", [slow_in_the_interpreter(place) for place in BACKENDS if place == ("triton", "cpu")])
def test_greedy_text_on_the_triton_kernels_is_the_eager_decoders(storyteller, static_llm, place):
    ids = torch.tensor(storyteller.tokenizer.encode("The dog"))
    eager = LLM(storyteller.model, storyteller.tokenizer, place[0]).generate(ids, max_new_tokens=6, temperature=0)
    static = static_llm(storyteller, place[0]).generate(ids, max_new_tokens=6, temperature=0)
    assert_same_greedy(eager.tolist(), static.tolist(), storyteller.model, len(ids), "triton")


@pytest.mark.parametrize("prompts", [["Once upon a time"], ["The dog", "A little girl went to the park. She", "sun"]])
@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0),
        dict(temperature=0, stop="cat"),
        dict(temperature=0, repetition_penalty=1.3),
        dict(seed=7),
        dict(seed=7, top_k=5, top_p=0.8, min_p=0.05, temperature=1.3, repetition_penalty=1.2),
        dict(seed=7, num_return_sequences=2),
    ],
    ids=str,
)
def test_text_is_the_eager_decoders(storyteller, static_llm, prompts, settings):
    eager = LLM(storyteller.model, storyteller.tokenizer, "pytorch")
    expected = eager.generate(prompts, max_new_tokens=40, **settings)
    static = static_llm(storyteller)
    assert static.generate(prompts, max_new_tokens=40, **settings) == expected
    assert static.generate(prompts, max_new_tokens=40, **settings) == expected  # the decoder used before


@pytest.mark.filterwarnings("ignore:the text outgrew")
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(seed=1, repetition_penalty=1.1)], ids=str)
def test_past_the_context_too(model, static_llm, settings):
    eager, ids = LLM(model, backend="pytorch"), torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = eager.generate(ids, max_new_tokens=70, **settings)
    assert torch.equal(static_llm(eager).generate(ids, max_new_tokens=70, **settings), expected)
    for count in (20, 21, 22, 23):  # up to the end of the context, and a little over it
        assert torch.equal(static_llm(eager).generate(ids, count, **settings), expected[:, : 3 + count])


def test_streams_that_are_left_and_streams_at_once(storyteller, static_llm):
    static = static_llm(storyteller)
    expected = static.generate("Once upon a time", temperature=0)
    first, second = (static.stream("Once upon a time", temperature=0) for _ in range(2))
    pieces = [(next(first), next(second)) for _ in range(3)]
    assert all(a == b for a, b in pieces)
    del first  # in the middle
    assert "Once upon a time" + "".join(b for _, b in pieces) + "".join(second) == expected
    assert static.generate("Once upon a time", temperature=0) == expected


def test_logits_that_are_not_finite_are_an_error_and_no_index(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.h[0].mlp.c_fc.bias[0] = torch.nan
    with llmfast.use_backend("pytorch"), pytest.raises(llmfast.NonFiniteLogits):
        generated(StaticDecoder(broken, 3, 16), 5, SamplingSettings(), generators=[torch.Generator()] * 3)


def test_more_than_the_capacity_is_an_error(model):
    decoder = StaticDecoder(model, 1, 4)
    with llmfast.use_backend("pytorch"):
        with pytest.raises(ValueError, match=r"the cache holds 4 tokens, 3 \+ 2 do not fit"):
            generated(decoder, 3, prompts=[[1, 2, 3]])
        decoder.prefill([[1, 2, 3, 4]])
        with pytest.raises(ValueError, match=r"the cache holds 4 tokens, 4 \+ 1 do not fit"):
            decoder.step(torch.tensor([1]))
        with pytest.raises(ValueError, match="prefill takes 1 prompts of at least one token"):
            decoder.prefill([[]])
    with pytest.raises(ValueError, match="one token a step, got 2"):
        StaticKVCache(model.config, 1, 8).extend(2)


# --- nothing in it that can't be recorded -----------------------------------------------------------------------------


class Recordable(TorchDispatchMode):
    """Raises at what a CUDA graph can't hold: reading a value on the host, or a tensor that comes from there."""

    READ_ON_THE_HOST = ("_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero", "masked_select", "unique")

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.calls = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.READ_ON_THE_HOST, f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            # A number alone may come from the host: it is passed by value.
            if isinstance(tensor, torch.Tensor) and tensor.ndim:
                assert tensor.device.type == self.device.type, f"{func} has a tensor on {tensor.device}"
        self.calls += 1
        return result


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(), EVERYTHING], ids=["greedy", "plain", "everything"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_step_never_looks_at_a_value_nor_takes_one_from_the_host(model, precision, settings):
    # Tensors on the meta device have no values at all: what looks at one fails.
    step_model = (copy.deepcopy(model) if precision == "fp32" else quantized(model, precision)).to("meta")
    decoder = StaticDecoder(step_model, 2, 16)
    decoder.seen = torch.zeros(2, model.config.vocab_size, dtype=torch.bool, device="meta")
    with torch.inference_mode(), llmfast.use_backend("pytorch"), Recordable(torch.device("meta")) as mode:
        decoder._model_step()
        decoder._choose_step(settings, model.config.vocab_size - 1)
    assert mode.calls > 50


def test_the_test_above_notices(model):
    decoder = StaticDecoder(copy.deepcopy(model).to("meta"), 1, 8)
    with Recordable(torch.device("meta")):
        with pytest.raises(AssertionError, match="tensor on cpu"):
            decoder.tokens.copy_(torch.tensor([1]))
        with pytest.raises(AssertionError, match="waits for the device"):
            decoder.tokens[0].item()


def test_the_launches_of_a_step_look_at_sizes_alone():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("record_decode_step.py")
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert {"attention_decoding.decoding", "attention_decoding.merge", "layer_norm.forward", "matmul.multiply",
            "quantized_linear.quantized_linear", "quantized_linear.sum_parts"} <= set(report["kernels"])  # fmt: skip
    assert report["further"] == []  # batch sizes up to 16 share their kernels


def test_every_buffer_keeps_its_place(model):
    decoder = StaticDecoder(model, 3, 16)
    buffers = {n: t for n, t in [*vars(decoder).items(), *vars(decoder.cache).items()] if isinstance(t, torch.Tensor)}
    buffers.pop("_positions")  # made anew in each step, for that step alone
    places = {name: tensor.data_ptr() for name, tensor in buffers.items() if tensor.numel()}
    assert {"tokens", "logits", "uniform", "drawn", "keys", "values", "lengths"} <= places.keys()
    with llmfast.use_backend("pytorch"):
        generated(decoder, 5)
        generated(decoder, 5, SamplingSettings(), generators=[torch.Generator() for _ in range(3)])
        decoder.step(torch.tensor([1, 2, 3]))
    now = {name: getattr(decoder, name, getattr(decoder.cache, name, None)).data_ptr() for name in places}
    assert now == places


# --- what is recorded, and when ---------------------------------------------------------------------------------------


class CallingGraph:
    """In place of a CUDA graph: `replay` calls what was recorded."""

    def __init__(self, run):
        self.replay = torch.inference_mode()(run)


@pytest.fixture
def recordings(monkeypatch) -> list[str]:
    """The names of what `CudaGraphDecoder` records; warming up and recording run as they would."""
    names: list[str] = []

    def record(self, run):
        names.append("choose" if "lambda" in run.__name__ else run.__name__)
        for _ in range(3):
            run()
        return CallingGraph(run)

    monkeypatch.setattr(CudaGraphDecoder, "_record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return names


def test_the_model_is_recorded_once_and_the_choice_for_each_way_to_sample(model, recordings):
    decoder, eager = CudaGraphDecoder(model, 3, 16), StaticDecoder(model, 3, 16)
    seeded = SamplingSettings(temperature=1.0)

    def generators():
        return [torch.Generator().manual_seed(row) for row in range(3)]

    with llmfast.use_backend("pytorch"):
        for _ in range(2):
            assert torch.equal(generated(decoder, 6), generated(eager, 6))
        assert recordings == ["_model_step", "choose"]
        for _ in range(2):
            drawn = generated(decoder, 6, seeded, generators=generators())
            assert torch.equal(drawn, generated(eager, 6, seeded, generators=generators()))
        assert recordings == ["_model_step", "choose", "choose"]
        torch.testing.assert_close(decoder.prefill(PROMPTS), eager.prefill(PROMPTS))
        torch.testing.assert_close(decoder.step(torch.tensor([1, 2, 3])), eager.step(torch.tensor([1, 2, 3])))
        assert len(recordings) == 3


def test_a_repetition_penalty_starts_from_the_prompt_however_the_recording_left_it(model, recordings):
    settings = SamplingSettings(temperature=0, repetition_penalty=3.0)
    seen = torch.zeros(3, model.config.vocab_size, dtype=torch.bool)
    seen[:, :5] = True
    with llmfast.use_backend("pytorch"):
        expected = generated(StaticDecoder(model, 3, 16), 8, settings, seen=seen.clone())
        assert torch.equal(generated(CudaGraphDecoder(model, 3, 16), 8, settings, seen=seen), expected)


def test_it_records_again_where_weights_or_backends_are_others(model, recordings, monkeypatch):
    monkeypatch.setitem(_registry, "another", pytorch)
    model = copy.deepcopy(model)
    decoder = CudaGraphDecoder(model, 3, 16)
    with llmfast.use_backend("pytorch"):
        generated(decoder, 4)
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(-1)  # in place: the recording reads it there
        assert torch.equal(generated(decoder, 4), generated(StaticDecoder(model, 3, 16), 4))
        assert len(recordings) == 2
        model.transformer.ln_f.weight = torch.nn.Parameter(model.transformer.ln_f.weight.clone())
        generated(decoder, 4)
        assert len(recordings) == 4
    with llmfast.use_backend("another"):
        generated(decoder, 4)
    assert len(recordings) == 6


def test_a_pool_hands_a_decoder_to_one_user_at_a_time(model):
    pool = DecoderPool(StaticDecoder)
    first = pool.take(model, 1, 5)
    assert first.capacity == model.config.n_positions  # rounded up
    assert pool.take(model, 1, 5) is not first
    first.close()
    assert pool.take(model, 2, 5) is not first
    assert pool.take(model, 1, 7) is first
    first.close()
    assert pool.take(copy.deepcopy(model), 1, 5) is not first
    assert pool.take(copy.deepcopy(model).double(), 1, 5).cache.keys.dtype == torch.float64


def test_why_not(model, monkeypatch, storyteller):
    assert cuda_graph.why_not(model) == "it runs on a GPU, not on cpu"
    assert LLM(model, backend="pytorch").why_not_cuda_graph() == "it runs on a GPU, not on cpu"
    on_gpu = type(
        "OnGPU", (), dict(device=torch.device("cuda"), dtype=torch.float32, config=model.config, quantized_to=None)
    )()
    with llmfast.use_backend("pytorch"):
        assert cuda_graph.why_not(on_gpu) is None
        monkeypatch.setenv("LLMFAST_CUDA_GRAPH", "0")
        assert cuda_graph.why_not(on_gpu) == "LLMFAST_CUDA_GRAPH is 0"
        monkeypatch.delenv("LLMFAST_CUDA_GRAPH")
    with llmfast.use_backend({"linear": "reference"}):
        assert "'reference' does not say that it is capturable" in str(cuda_graph.why_not(on_gpu))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["pytorch", "triton"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_replayed_text_is_the_eager_decoders(storyteller_directory, monkeypatch, backend, precision):
    llm = llmfast.load(storyteller_directory, backend=backend, precision=precision, device="cuda")
    assert isinstance(llm.decoder(), CudaGraphDecoder)
    prompts = ["The dog", "A little girl went to the park. She", "sun"]
    rows = torch.tensor([llm.tokenizer.encode("The dog")]).repeat(2, 1)
    for settings in (dict(temperature=0), dict(seed=3), dict(seed=3, top_k=9, top_p=0.9, repetition_penalty=1.1)):
        monkeypatch.setenv("LLMFAST_CUDA_GRAPH", "1")
        first, again = (llm.generate(prompts, max_new_tokens=40, **settings) for _ in range(2))
        ids = llm.generate(rows, max_new_tokens=40, **settings)
        monkeypatch.setenv("LLMFAST_CUDA_GRAPH", "0")
        assert not isinstance(llm.decoder(), CudaGraphDecoder)
        assert first == again
        eager = llm.generate(rows, max_new_tokens=40, **settings)
        if precision == "fp32" and settings == dict(temperature=0):
            assert_same_greedy(eager[0].tolist(), ids[0].tolist(), llm.model, rows.shape[1], f"{backend} {precision}")
