"""Logits that are not finite: one error type on every path, at the token where they begin, and never a number."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from click.testing import CliRunner
from conftest import STORY_TEXTS, tiny_config

import llmfast
from llmfast import GPT, LLM, NonFiniteLogits
from llmfast.backends import cpp
from llmfast.cli import cli
from llmfast.evaluation.minimal_pairs import MinimalPair, minimal_pair_outcomes
from llmfast.evaluation.perplexity import documents_perplexity, text_perplexity
from llmfast.inference.decoders import DecoderPool, NativeModel, StaticDecoder, cuda_graph
from llmfast.inference.finite import are_finite, check_chosen
from llmfast.tokenizers import BPETokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

NATIVE = cpp.why_not("linear", torch.device("cpu"), torch.float32) is None
FLOATS = ("fp32", "bf16")
PATHS = ["pytorch", "static", *(["cpp", *FLOATS, "int8", "int4"] if NATIVE else [])]
IDS = torch.tensor([1, 2, 3])
LAST = 5  # the position from which the model below is broken


@pytest.fixture(scope="module")
def sound() -> GPT:
    torch.manual_seed(0)
    return GPT(tiny_config(n_embd=24, tie_word_embeddings=False, initializer_range=0.3)).eval()


def broken(model: GPT, name: str, index: tuple[int, ...], value: float = math.nan) -> GPT:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter(name)[index] = value
    return model


@pytest.fixture(params=PATHS)
def llm_of(request, monkeypatch):
    """Makes an `LLM` of a module that runs in one of the ways."""

    def make(model: GPT, tokenizer=None) -> LLM:
        if request.param in ("pytorch", "cpp"):
            return LLM(model, tokenizer, backend=request.param)
        if request.param == "static":
            monkeypatch.setattr(cuda_graph, "why_not", lambda model: None)
            monkeypatch.setattr("llmfast.inference.execution.DecoderPool", lambda: DecoderPool(StaticDecoder))
            return LLM(model, tokenizer, backend="pytorch")
        made = LLM(model, tokenizer, native=NativeModel(model.config, model.state_dict().items(), request.param))
        assert made.native() is not None
        return made

    return make


GENERATING = {
    "greedy": dict(temperature=0),
    "sampled": dict(seed=0),
    "filtered": dict(seed=0, top_k=5, top_p=0.9, min_p=0.01),
    "penalised": dict(temperature=0, repetition_penalty=1.2),
    "uncached": dict(temperature=0, use_cache=False),
}


@pytest.mark.parametrize("settings", GENERATING.values(), ids=GENERATING)
def test_generating_stops_where_they_begin(sound, llm_of, settings):
    llm = llm_of(broken(sound, "transformer.wpe.weight", (LAST, 0)))
    assert llm.generate(IDS, LAST - 2, **settings).shape == (LAST + 1,)  # the last token's own logits are never asked
    for prompt in (IDS, torch.stack([IDS, IDS])):
        with pytest.raises(NonFiniteLogits, match="the model's logits are not finite: no token can be chosen"):
            llm.generate(prompt, LAST - 1, **settings)
    assert llm.generate(IDS, LAST - 2, **settings).shape == (LAST + 1,)


@pytest.mark.skipif(not NATIVE, reason="the C++ kernels are not built")
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(seed=0)])
def test_guessing_ahead_stops_too(sound, settings):
    model = broken(sound, "transformer.wpe.weight", (LAST, 0))
    llm = LLM(model, native=NativeModel(model.config, model.state_dict().items(), "fp32"))
    ids = torch.tensor([1, 1, 1])  # a guess is made
    with pytest.raises(NonFiniteLogits):
        llm.generate(ids, LAST - 1, speculate=4, **settings)


WEIGHTS = [
    ("transformer.wpe.weight", (0, 3)),
    ("transformer.h.0.ln_1.weight", (5,)),
    ("transformer.h.0.attn.c_attn.bias", (2,)),  # a query, a key, a value
    ("transformer.h.0.attn.c_attn.bias", (26,)),
    ("transformer.h.0.attn.c_attn.bias", (50,)),
    ("transformer.h.1.attn.c_proj.bias", (0,)),
    ("transformer.h.1.mlp.c_fc.bias", (1,)),
    ("transformer.h.1.mlp.c_proj.bias", (23,)),
    ("transformer.ln_f.bias", (23,)),
]


@pytest.mark.parametrize("name, index", WEIGHTS)
def test_a_nan_reaches_the_logits_from_wherever_it_is(sound, llm_of, name, index, request):
    query_or_key = name.endswith("c_attn.bias") and index < (48,)
    if query_or_key and request.node.callspec.params["llm_of"] in ("pytorch", "static"):
        pytest.skip("PyTorch's own attention on a CPU answers zeros where all scores are NaN")
    llm = llm_of(broken(sound, name, index))
    with pytest.raises(NonFiniteLogits):
        llm.generate(IDS, 1, temperature=0)
    with pytest.raises(NonFiniteLogits):
        llm.generate(IDS.repeat(6)[:16], 1, temperature=0)
    with pytest.raises(NonFiniteLogits, match="they give no probabilities"):
        llm.score(IDS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_is_enough(sound, llm_of, value, request):
    if request.node.callspec.params["llm_of"] in ("int8", "int4"):
        with pytest.raises(ValueError, match="the weight holds infinities or NaN"):
            llm_of(broken(sound, "lm_head.weight", (18,), value))
        return
    llm = llm_of(broken(sound, "lm_head.weight", (18,), value))
    for settings in GENERATING.values():
        with pytest.raises(NonFiniteLogits):
            llm.generate(IDS, 1, **settings)
    with pytest.raises(NonFiniteLogits):
        llm.score(IDS)


def test_what_lies_beyond_the_vocabulary_is_never_asked(llm_of, request):
    """An embedding may be larger than its tokenizer; only the tokenizer's tokens are chosen from."""
    torch.manual_seed(0)
    model = GPT(tiny_config(vocab_size=300, tie_word_embeddings=False, initializer_range=0.3)).eval()
    if request.node.callspec.params["llm_of"] not in ("int8", "int4"):
        model = broken(model, "lm_head.weight", (299,))
    llm = llm_of(model, BPETokenizer.train(["ab"], 257))
    for settings in GENERATING.values():
        assert llm.generate("ab", 3, **settings).startswith("ab")


def test_evaluation_stops(storyteller):
    llm = LLM(broken(storyteller.model, "transformer.ln_f.bias", (0,)), storyteller.tokenizer)
    for call in (
        lambda: text_perplexity(llm, STORY_TEXTS[0]),
        lambda: documents_perplexity(llm, STORY_TEXTS),
        lambda: minimal_pair_outcomes(llm, [MinimalPair("The cat was happy.", "The cat were happy.")]),
    ):
        with pytest.raises(NonFiniteLogits):
            call()


def test_the_commands_say_so_in_one_line(storyteller, tmp_path, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the commands replace
    LLM(broken(storyteller.model, "transformer.ln_f.bias", (0,)), storyteller.tokenizer).save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(STORY_TEXTS[0])
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "The cat was.", "sentence_bad": "The cat were."}\n')
    model = str(tmp_path / "m")
    for arguments in (
        ["generate", "The", "-t", "0", "-m", model],
        ["generate", "The", "--json", "-m", model],
        ["eval", "perplexity", model, str(tmp_path / "text.txt")],
        ["eval", "blimp", model, str(tmp_path / "pairs.jsonl")],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2 and "llmfast: the model's logits are not finite" in result.stderr, result.output


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(3))
def test_are_finite(wrong, place):
    logits = torch.tensor([[1.0, 2.0, 3.0], [1e30, -1e30, 0.0]])
    assert are_finite(logits).tolist() == [True, True]
    logits[0, place] = wrong
    assert are_finite(logits).tolist() == [False, True]


def test_check_chosen():
    check_chosen(torch.tensor([0, 5]))
    check_chosen(torch.tensor([], dtype=torch.int64))
    with pytest.raises(NonFiniteLogits):
        check_chosen(torch.tensor([3, -1, 2]))
    assert issubclass(NonFiniteLogits, ValueError) and llmfast.NonFiniteLogits is NonFiniteLogits
