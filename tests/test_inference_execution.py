"""Who runs a model: the same text on every path, on the backend that was chosen."""

from __future__ import annotations

import threading
import types

import pytest
import torch
from conftest import BACKENDS, PARROT_TEXT, assert_same_greedy

import llmfast
from llmfast import LLM, ops
from llmfast.backends import OPS, _registry, cpp
from llmfast.inference.decoders import DecoderPool, NativeDecoder, StaticDecoder, cuda_graph
from llmfast.models import Llama, LlamaConfig

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["Once upon a time", "The dog", "A little girl went to the park. She", "She", "sun"]
CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    cpp.why_not("linear", CPU, torch.float32) is not None, reason="the C++ kernels are not built"
)


def greedy(llm: LLM, prompt, **settings):
    return llm.generate(prompt, temperature=0, **settings)


# --- the same text on every path --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_ids(storyteller) -> list[list[int]]:
    """50 greedy tokens of every prompt: PyTorch's ops, cached, alone."""
    llm = LLM(storyteller.model, storyteller.tokenizer, backend="pytorch")
    results = []
    for text in PROMPTS:
        results.append(greedy(llm, torch.tensor(llm.tokenizer.encode(text)), max_new_tokens=50).tolist())
    assert all(len(set(ids)) > 12 for ids in results), "degenerate text would prove little"
    return results


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_ids_agree_alone_and_in_a_batch(storyteller, storyteller_directory, expected_ids, fast_place, use_cache):
    backend, device = fast_place
    llm = llmfast.load(storyteller_directory, backend=backend, device=device, precision="fp32")
    where = f"{backend} on {device}, {'cached' if use_cache else 'uncached'}"
    for text, expected in zip(PROMPTS, expected_ids, strict=True):
        prompt = torch.tensor(storyteller.tokenizer.encode(text))
        actual = greedy(llm, prompt, max_new_tokens=50, use_cache=use_cache).tolist()
        assert_same_greedy(expected, actual, storyteller.model, len(prompt), f"{text!r}, {where}, alone")
    # A batch of ids has rows of one length: the first 5 tokens of three texts, continued.
    rows = [ids[:5] for ids in expected_ids[:3]]
    batch = greedy(llm, torch.tensor(rows), max_new_tokens=50, use_cache=use_cache).tolist()
    pytorch = LLM(storyteller.model, backend="pytorch")
    for row, actual in zip(rows, batch, strict=True):
        expected = greedy(pytorch, torch.tensor(row), max_new_tokens=50).tolist()
        assert_same_greedy(expected, actual, storyteller.model, 5, f"{row}, {where}, in a batch of ids")


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_text_agrees_in_a_ragged_batch(storyteller, storyteller_directory, expected_ids, fast_place, use_cache):
    backend, device = fast_place
    llm = llmfast.load(storyteller_directory, backend=backend, device=device, precision="fp32")
    texts = greedy(llm, PROMPTS, max_new_tokens=50, use_cache=use_cache)
    tokenizer = storyteller.tokenizer
    for prompt, expected, actual in zip(PROMPTS, expected_ids, texts, strict=True):
        start = len(tokenizer.encode(prompt))
        ends = [i for i, token in enumerate(expected) if token == tokenizer.end_of_text]
        length = ends[0] if ends else len(expected)
        if actual == tokenizer.decode(expected[:length]):
            continue
        same = max(n for n in range(start, length + 1) if actual.startswith(tokenizer.decode(expected[:n])))
        with torch.inference_mode(), llmfast.use_backend("pytorch"):
            top = storyteller.model(torch.tensor([expected[:same]]))[0, -1].topk(2).values
        gap = float(top[0] - top[1])
        assert gap <= 1e-4, f"{prompt!r} with {backend}, {use_cache=}: token {same} differs, the top logits {gap} apart"


def test_bfloat16_runs_and_stays_near(storyteller_directory, fast_place):
    backend, device = fast_place
    if fast_place == ("triton", "cpu"):
        pytest.skip("Triton's interpreter does not multiply bfloat16 matrices")
    llm = llmfast.load(storyteller_directory, backend=backend, device=device, precision="bf16")
    assert llm.model.dtype == torch.bfloat16
    text = greedy(llm, "Once upon a time", max_new_tokens=10)
    assert text.startswith("Once upon a time there was")
    assert llm.generate(["The", "A little"], seed=0, max_new_tokens=5)[1].startswith("A little")
    wide = llmfast.load(storyteller_directory, backend=backend, device=device, precision="fp32")
    text = "The cat liked to sleep in the sun."
    assert llm.score(text).total == pytest.approx(wide.score(text).total, rel=0.05)


# --- natively ---------------------------------------------------------------------------------------------------------


@needs_native
def test_loading_for_a_cpu_packs_the_weights_and_reads_the_module_only_when_asked(storyteller_directory):
    llm = llmfast.load(storyteller_directory, device="cpu", precision="fp32")
    text = llm.generate("Once upon", temperature=0, max_new_tokens=20)
    assert llm.native() is not None and isinstance(llm.decoder(), NativeDecoder)
    assert llm.runner._model is None
    module = llm.model
    assert llm.model is module and llm.generate("Once upon", temperature=0, max_new_tokens=20) == text


@needs_native
def test_the_native_text_and_score_are_the_modules(storyteller_directory):
    llm = llmfast.load(storyteller_directory, device="cpu", precision="fp32")
    prompts = ["Once upon a time", "The cat", "A little girl went"]
    texts = llm.generate(prompts, temperature=0, max_new_tokens=40)
    with llmfast.use_backend("pytorch"):
        assert llm.native() is None
        expected = llm.generate(prompts, temperature=0, max_new_tokens=40)
        score = llm.score(prompts[0])
    assert texts == expected
    torch.testing.assert_close(llm.score(prompts[0]).log_probabilities, score.log_probabilities, rtol=1e-4, atol=1e-5)


@needs_native
def test_sampling_draws_the_same_tokens_natively(storyteller_directory):
    llm = llmfast.load(storyteller_directory, device="cpu", precision="fp32")
    for settings in (
        dict(),
        dict(top_k=3),
        dict(top_p=0.7),
        dict(min_p=0.2, temperature=1.5),
        dict(top_k=9, top_p=0.5),
    ):
        text = llm.generate("The", seed=5, max_new_tokens=30, **settings)
        with llmfast.use_backend("pytorch"):
            assert llm.generate("The", seed=5, max_new_tokens=30, **settings) == text


@needs_native
def test_changed_parameters_are_packed_again(storyteller_directory):
    llm = llmfast.load(storyteller_directory, device="cpu", precision="fp32")
    before = llm.native()
    with torch.no_grad():
        llm.model.transformer.ln_f.weight.mul_(-1)
    changed = llm.generate("Once upon", temperature=0, max_new_tokens=10)
    assert llm.native() is not before
    with llmfast.use_backend("pytorch"):
        assert llm.generate("Once upon", temperature=0, max_new_tokens=10) == changed


@needs_native
@pytest.mark.parametrize("precision", ["int8", "int4", "int4-all"])
def test_a_quantised_module_has_the_weights_that_run_natively(storyteller_directory, precision, tmp_path):
    llm = llmfast.load(storyteller_directory, device="cpu", precision=precision)
    assert llm.precision == precision
    text = "Once upon a time there was a little cat."
    with llmfast.use_backend("pytorch"):
        eager = llm.score(text).total
    plain = llmfast.load(storyteller_directory, device="cpu", precision="fp32").score(text).total
    assert llm.score(text).total == pytest.approx(eager, abs=max(0.1, abs(eager - plain)))


@pytest.mark.parametrize("settings", [dict(backend="pytorch"), dict(backend={"linear": "pytorch"})])
def test_integers_run_without_the_native_decoder_too(storyteller_directory, settings):
    llm = llmfast.load(storyteller_directory, device="cpu", precision="int8", **settings)
    assert llm.native() is None and llm.precision == "int8" and llm.model.dtype == torch.float32
    assert llm.generate("The", temperature=0, max_new_tokens=5).startswith("The")


# --- backends ---------------------------------------------------------------------------------------------------------


def chosen_backend() -> str:
    return llmfast.explain("gelu", torch.zeros(1)).backend


@pytest.fixture
def counting():
    """A backend that is PyTorch's and counts the calls of every op."""
    from llmfast.backends import pytorch

    calls: dict[str, int] = {}

    def counted(op):
        def run(*args, **kwargs):
            calls[op] = calls.get(op, 0) + 1
            return getattr(pytorch, op)(*args, **kwargs)

        return run

    llmfast.register_backend("counting", types.SimpleNamespace(**{op: counted(op) for op in OPS}))
    yield calls
    del _registry["counting"]


def test_a_model_runs_on_the_backend_it_was_given(parrot, counting):
    llm = LLM(parrot.model, parrot.tokenizer, backend="counting")
    assert greedy(llm, "The ") == PARROT_TEXT
    assert {"causal_attention", "layer_norm", "add_layer_norm", "linear"} <= set(counting)
    counting.clear()
    assert "".join(llm.stream("The ", temperature=0)) == PARROT_TEXT[4:]
    assert counting["linear"] > 0
    counting.clear()
    llm.score("The ")
    assert counting["linear"] > 0
    counting.clear()
    greedy(parrot, "The ", max_new_tokens=3)
    assert not counting


def test_a_backend_for_one_op_leaves_the_others(parrot, counting):
    llm = LLM(parrot.model, parrot.tokenizer, backend={"causal_attention": "counting"})
    assert greedy(llm, "The ") == PARROT_TEXT
    assert set(counting) == {"causal_attention"}


def test_auto_follows_the_context_around_it(parrot, counting):
    with llmfast.use_backend("counting"):
        greedy(parrot, "The ", max_new_tokens=2)
    assert counting["linear"] > 0


def test_the_backend_of_a_stream_is_not_seen_between_its_pieces_nor_after_it(parrot, counting):
    outside = chosen_backend()
    llm = LLM(parrot.model, parrot.tokenizer, backend="counting")
    assert outside != "counting"
    for _ in llm.stream("The ", temperature=0, max_new_tokens=6):
        assert chosen_backend() == outside
    assert chosen_backend() == outside
    abandoned = llm.stream("The ", temperature=0)
    next(abandoned)
    with llmfast.use_backend("pytorch"):
        next(abandoned)
        assert chosen_backend() == "pytorch"
    del abandoned
    greedy(llm, "The ", max_new_tokens=2)
    llm.score("The ")
    assert chosen_backend() == outside


def test_the_backend_is_restored_when_generation_fails(parrot, counting, monkeypatch):
    outside = chosen_backend()
    llm = LLM(parrot.model, parrot.tokenizer, backend="counting")
    monkeypatch.setattr(ops, "causal_attention", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate("The ")
    assert chosen_backend() == outside


def test_two_threads_generate_at_once_each_on_its_backend(parrot, counting):
    names = [name for name, device in BACKENDS if device == "cpu" and name != "triton"] + ["counting"]
    results: dict[tuple[int, str], list] = {}
    start = threading.Barrier(2 * len(names))

    def work(number: int, name: str) -> None:
        llm = LLM(parrot.model, parrot.tokenizer, backend=name)
        start.wait()
        own = []
        for use_cache in (True, False):
            own.append(greedy(llm, ["The ", "The ☃ sa"], use_cache=use_cache))
            own.append("".join(llm.stream("The ", temperature=0, use_cache=use_cache)))
        results[number, name] = own

    threads = [threading.Thread(target=work, args=(i, name)) for i in range(2) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = [[PARROT_TEXT] * 2, PARROT_TEXT[4:]] * 2
    assert results == {(i, name): expected for i in range(2) for name in names}


# --- another family ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the text outgrew")
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(seed=3, top_p=0.9, repetition_penalty=1.1)], ids=str)
def test_grouped_key_heads_and_rotary_positions_run_on_every_path(settings, monkeypatch):
    torch.manual_seed(0)
    shape = dict(vocab_size=23, hidden_size=24, intermediate_size=40, num_hidden_layers=2, initializer_range=0.4)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=20, **shape)
    llm = LLM(Llama(config), backend="pytorch")
    rows = torch.randint(23, (3, 5))
    settings = dict(max_new_tokens=40, **settings)
    expected = llm.generate(rows, **settings)
    assert len(set(expected[0].tolist())) > 8
    assert torch.equal(llm.generate(rows, use_cache=False, **settings), expected)
    assert torch.equal(llm.generate(rows[:1], **settings)[0], expected[0])
    monkeypatch.setattr(cuda_graph, "why_not", lambda model: None)
    llm.runner._recorded = DecoderPool(StaticDecoder)
    assert torch.equal(llm.generate(rows, **settings), expected)


# --- what is said of it -----------------------------------------------------------------------------------------------


@pytest.fixture
def native_steps(monkeypatch) -> list[int]:
    """Grows by a number with every native step."""
    steps: list[int] = []
    run = NativeDecoder._run
    monkeypatch.setattr(NativeDecoder, "_run", lambda self, *a, **k: (steps.append(1), run(self, *a, **k))[1])
    return steps


@needs_native
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "loaded, around, label",
    [
        ({}, "auto", f"native ({cpp.isa()}), int8, 1 threads"),
        ({}, "pytorch", "pytorch, int8 weights in fp32, 1 threads"),
        ({"backend": "pytorch"}, "auto", "pytorch, int8 weights in fp32, 1 threads"),
        ({"backend": {"layer_norm": "pytorch"}}, "auto", "cpp and pytorch, int8 weights in fp32, 1 threads"),
        ({"precision": "bf16"}, "pytorch", "pytorch, bf16, 1 threads"),
    ],
)
def test_a_stream_says_who_ran(storyteller_directory, native_steps, loaded, around, label, use_cache):
    llm = llmfast.load(storyteller_directory, **{"device": "cpu", "precision": "int8"} | loaded)
    with llmfast.use_backend(around):
        stream = llm.stream("The", temperature=0, max_new_tokens=3, use_cache=use_cache)
        list(stream)
    assert stream.how == label + ("" if use_cache else ", no cache")
    assert bool(native_steps) == label.startswith("native")


@needs_native
def test_a_stream_says_that_it_guesses_ahead(storyteller_directory):
    llm = llmfast.load(storyteller_directory, device="cpu", precision="fp32")
    assert llm.stream("The", speculate=3).how.endswith("fp32, 1 threads, up to 3 tokens guessed")
    with pytest.raises(ValueError, match="speculate needs the native decoder and its cache"):
        llm.stream("The", speculate=3, use_cache=False)


@needs_native
@pytest.mark.parametrize("precision", ["int8", "int4", "int4-all"])
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(seed=1)])
def test_without_a_cache_the_same_integers_are_multiplied(precision, settings):
    llm = llmfast.load("stories", device="cpu", precision=precision)
    prompts = ["Once upon a time", "The dog saw a bird.", "One day, a girl"]
    for prompt in (*prompts, prompts):
        text = llm.generate(prompt, max_new_tokens=40, **settings)
        assert llm.generate(prompt, max_new_tokens=40, use_cache=False, **settings) == text
    assert llm.runner._model is None  # no floats were read
