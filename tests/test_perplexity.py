"""Perplexity against its definition, computed a document at a time."""

import math

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import llmfast
from llmfast.evaluation.perplexity import Perplexity, document_perplexity

pytestmark = pytest.mark.usefixtures("one_thread")

END = 18
DOCUMENTS = st.lists(st.tuples(st.lists(st.integers(0, 17), max_size=30), st.integers(1, 50)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model() -> llmfast.GPT:
    torch.manual_seed(0)
    return llmfast.GPT(tiny_config(n_positions=8, initializer_range=0.5)).eval()


def direct(model: llmfast.GPT, documents) -> tuple[float, int]:
    """Every document from an end-of-text to its own, in blocks of a context that share nothing but their border."""
    nats, tokens, context = 0.0, 0, model.config.n_positions
    for ids, _ in documents:
        sequence = [END, *ids, END]
        for start in range(0, len(sequence) - 1, context):
            block = sequence[start : start + context + 1]
            with torch.inference_mode(), llmfast.use_backend("pytorch"):
                logits = model(torch.tensor([block[:-1]]))[0].double()
            nats -= float(torch.log_softmax(logits, -1).gather(1, torch.tensor(block[1:])[:, None]).sum())
            tokens += len(block) - 1
    return nats, tokens


@settings(max_examples=30)
@given(DOCUMENTS, st.sampled_from([1, 20, 8192]))
def test_it_is_what_the_definition_says_however_the_blocks_are_batched(model, documents, tokens_per_batch):
    nats, tokens = direct(model, documents)
    result = document_perplexity(model, documents, END, tokens_per_batch)
    assert result.tokens == tokens == sum(len(ids) + 1 for ids, _ in documents)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.bytes == sum(length for _, length in documents)


def test_every_backend_measures_the_same(model, place):
    backend, device = place
    documents = [([1, 2, 3], 9), ([4] * 20, 30)]
    moved = llmfast.GPT(model.config).to(device).eval()
    moved.load_state_dict(model.state_dict())
    with llmfast.use_backend(backend):
        result = document_perplexity(moved, documents, END)
    assert result.nats == pytest.approx(direct(model, documents)[0], rel=1e-4)


def test_the_numbers_it_is_stated_by():
    measured = Perplexity(nats=20.0, tokens=10, bytes=40)
    assert measured.nats_per_token == 2.0
    assert measured.perplexity == pytest.approx(math.exp(2))
    assert measured.bits_per_byte == pytest.approx(20 / math.log(2) / 40)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = llmfast.GPT(tiny_config(initializer_range=1e-6)).eval()
    assert document_perplexity(model, [([1, 2, 3], 3)], END).perplexity == pytest.approx(19, rel=1e-3)


def test_a_trained_model_finds_its_text_less_surprising_than_noise(parrot):
    ids = parrot.tokenizer.encode("The ☃ said: naïve")
    text = document_perplexity(parrot.model, [(ids, 20)], parrot.tokenizer.end_of_text)
    noise = document_perplexity(parrot.model, [(ids[::-1], 20)], parrot.tokenizer.end_of_text)
    assert text.nats_per_token < 0.5 * noise.nats_per_token
