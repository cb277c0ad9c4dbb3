"""`load`: what is read of a model, and what is wrong with it."""

from __future__ import annotations

import json
import shutil
import types

import pytest
import torch

import llmfast
from llmfast import GPT, LLM, ops
from llmfast.backends import _registry, cpp
from llmfast.inference.decoders import native

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    cpp.why_not("linear", CPU, torch.float32) is not None, reason="the C++ kernels are not built"
)


def greedy(llm: LLM, prompt, **settings):
    return llm.generate(prompt, temperature=0, **settings)


def test_load_reads_a_directory_or_a_file(storyteller, storyteller_directory):
    expected = greedy(storyteller, "The dog")
    for path in (storyteller_directory, str(storyteller_directory), storyteller_directory / "model.safetensors"):
        llm = llmfast.load(path, device="cpu")
        assert llm.config == storyteller.config
        assert llm.tokenizer.vocab == storyteller.tokenizer.vocab
        assert not llm.model.training
        assert greedy(llm, "The dog") == expected


def test_auto_precision_on_a_cpu_is_what_it_multiplies_fastest(storyteller_directory):
    expected = native.fastest_float() if cpp.why_not("linear", CPU, torch.float32) is None else "fp32"
    assert llmfast.load(storyteller_directory, device="cpu").precision == expected
    assert llmfast.load(storyteller_directory, device="cpu", backend="pytorch").precision == "fp32"


def test_auto_precision_is_what_the_configuration_recommends(storyteller_directory, tmp_path):
    shutil.copytree(storyteller_directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"llmfast_precision": "int8"}))
    expected = "int8" if cpp.why_not("linear", CPU, torch.float32) is None else "fp32"
    assert llmfast.load(tmp_path / "model", device="cpu").precision == expected
    assert llmfast.load(tmp_path / "model", device="cpu", precision="fp32").precision == "fp32"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"llmfast_precision": "int3"}))
    with pytest.raises(ValueError, match="recommends llmfast_precision 'int3'"):
        llmfast.load(tmp_path / "model", device="cpu")


def test_a_model_without_a_tokenizer_takes_ids_and_explains_itself_for_text(wanderer, tmp_path):
    wanderer.save_pretrained(tmp_path)
    llm = llmfast.load(tmp_path, device="cpu")
    assert llm.tokenizer is None
    assert llm.generate(torch.tensor([1, 2]), max_new_tokens=3).shape == (5,)
    assert llm.score(torch.tensor([1, 2])).log_probabilities.shape == (2,)
    for call in (llm.generate, llm.stream, llm.score, lambda text: llm.generate([text])):
        with pytest.raises(ValueError, match="this model has no tokenizer: give token ids"):
            call("text")


def test_a_tokenizer_larger_than_the_embedding_is_an_error_with_both_sizes(parrot, wanderer, tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model's embedding only 19"):
        LLM(wanderer.model, parrot.tokenizer)
    wanderer.model.save_pretrained(tmp_path)
    parrot.tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="257 tokens.*only 19"):
        llmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"backend": "cuda++"}, "unknown backend 'cuda\\+\\+'; known: auto, .*pytorch"),
        ({"backend": {"attention": "pytorch"}}, "unknown op 'attention'"),
        ({"precision": "int3"}, "precision must be auto, fp32, .*, int4-all, .*got 'int3'"),
        ({"precision": "fp16", "device": "cpu"}, "precision fp16 needs a GPU"),
        ({"device": "abacus"}, "device 'abacus' can't be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' can't be used"),
    ],
)
def test_load_names_what_is_wrong_with_its_arguments(storyteller_directory, settings, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        llmfast.load(storyteller_directory, **{"device": "cpu"} | settings)
    assert "\n" not in str(error.value)


def test_a_backend_that_can_not_run_is_an_error_when_loading(storyteller_directory, monkeypatch):
    monkeypatch.setitem(_registry, "lonely", types.SimpleNamespace(gelu=ops.gelu))
    with pytest.raises(llmfast.BackendUnavailable, match="'lonely' can't run causal_attention"):
        llmfast.load(storyteller_directory, backend="lonely", device="cpu")


def test_a_missing_model_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        llmfast.load(tmp_path / "gone")


def test_a_damaged_tokenizer_is_an_error_not_a_model_without_one(storyteller_directory, tmp_path):
    GPT.from_pretrained(storyteller_directory).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="vocab.json"):
        llmfast.load(tmp_path)


def test_a_loaded_model_saves_and_loads_again(storyteller, tmp_path):
    storyteller.save_pretrained(tmp_path / "a")
    llmfast.load(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert greedy(llmfast.load(tmp_path / "b", device="cpu"), "She") == greedy(storyteller, "She")


def test_the_reference_backend_is_for_ops_not_models(storyteller_directory):
    with pytest.raises(ValueError, match="can't run a model"):
        llmfast.load(storyteller_directory, backend="reference")


def test_the_embedded_model_tells_a_story():
    text = llmfast.generate("Once upon a time", max_new_tokens=60, seed=0)
    assert text.startswith("Once upon a time") and len(text.split()) > 25
    assert llmfast.generate(["One day", "The cat"], max_new_tokens=5, seed=0)[1].startswith("The cat")


def test_the_embedded_model_is_loaded_for_the_backends_of_the_call():
    for backend in ("pytorch", "auto"):  # in float32, and as its card recommends: their stories part at the end
        with llmfast.use_backend(backend):
            told = llmfast.generate("Once upon a time", temperature=0, stop="\n")
            assert told == greedy(llmfast.load("stories"), "Once upon a time", stop="\n")
