"""The context: what the model sees of a text that outgrows it."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import PARROT_TEXT, tiny_config

import llmfast
from llmfast import GPT, LLM
from llmfast.tokenizers import BPETokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def greedy(llm: LLM, prompt, **settings):
    return llm.generate(prompt, temperature=0, **settings)


def test_a_prompt_longer_than_the_context_names_both_lengths(parrot):
    for call in (parrot.generate, parrot.stream):
        with pytest.raises(ValueError, match="the prompt has 65 tokens, the model's context only 64.*truncate=True"):
            call("x" * 65)
    with pytest.raises(ValueError, match="the prompt has 70 tokens"):
        parrot.generate(["x", "x" * 70])
    with pytest.raises(ValueError, match="the prompt has 65 tokens"):
        parrot.generate(torch.zeros(65, dtype=torch.int64))


def test_truncate_keeps_the_end_of_the_prompt(wanderer):
    ids = torch.arange(12)
    result = greedy(wanderer, ids, truncate=True, max_new_tokens=1)
    assert result[:12].tolist() == ids.tolist()  # what comes back is whole
    assert result[12] == greedy(wanderer, ids[5:], max_new_tokens=1)[-1]


def test_truncated_text_comes_back_whole(parrot):
    long = "x" * 100
    result = greedy(parrot, [long, "The "], truncate=True, max_new_tokens=1)
    assert result[0].startswith(long) and len(result[0]) > 100
    assert result[0][100:] == greedy(parrot, long[-64:], max_new_tokens=1)[64:]


def past_the_context(model: GPT, ids: list[int], new: int) -> list[int]:
    """The rule in its plainest form: a full window loses its oldest half before a token is added."""
    context, window, text = model.config.n_positions, list(ids), list(ids)
    for _ in range(new):
        with torch.inference_mode(), llmfast.use_backend("pytorch"):
            top = model(torch.tensor([window], device=model.device))[0, -1].topk(2)
        assert top.values[0] - top.values[1] > 1e-4, "a tie: choose another seed for this test"
        text.append(int(top.indices[0]))
        if len(window) == context:
            window = window[context // 2 :] if context > 1 else []
        window.append(text[-1])
    return text


@pytest.mark.filterwarnings("ignore:the text outgrew")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("context", [1, 2, 3, 7, 16])
def test_past_the_context_the_oldest_half_is_dropped(context, use_cache, fast_place):
    backend, device = fast_place
    torch.manual_seed(context)
    model = GPT(tiny_config(n_positions=context, initializer_range=0.6)).to(device).eval()
    llm = LLM(model, backend=backend)
    prompts = torch.randint(19, (3, context), device=device)
    expected = [past_the_context(model, row, 40) for row in prompts.tolist()]
    assert max(len(set(row)) for row in expected) > 3
    assert greedy(llm, prompts, max_new_tokens=40, use_cache=use_cache).tolist() == expected
    assert greedy(llm, prompts[1], max_new_tokens=40, use_cache=use_cache).tolist() == expected[1]


@pytest.mark.filterwarnings("ignore:the text outgrew")
def test_rows_of_different_lengths_pass_the_context_each_at_its_own_time(storyteller):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=storyteller.tokenizer.vocab_size, n_positions=20, initializer_range=0.9)
    tokenizer = BPETokenizer(storyteller.tokenizer.vocab, storyteller.tokenizer.merges, {})  # never ends
    llm = LLM(GPT(config), tokenizer)
    prompts = ["She", "The dog liked to run", "A bird sang a song"]
    for use_cache in (True, False):
        texts = greedy(llm, prompts, max_new_tokens=60, use_cache=use_cache)
        for prompt, text in zip(prompts, texts, strict=True):
            ids = tokenizer.encode(prompt)
            new = tokenizer.decode(past_the_context(llm.model, ids, 60)[len(ids) :])
            assert text == prompt + new == greedy(llm, prompt, max_new_tokens=60, use_cache=use_cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_outgrowing_the_context_warns_exactly_once(wanderer, use_cache):
    for prompt in (torch.arange(3), torch.arange(6).reshape(2, 3)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wanderer.generate(prompt, max_new_tokens=30, use_cache=use_cache)
        assert len(caught) == 1 and "outgrew the context of 7 tokens" in str(caught[0].message)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_that_just_fits_does_not_warn(wanderer, use_cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The last token is made, but never looked at: 3 + 5 = context + 1.
        assert wanderer.generate(torch.arange(3), max_new_tokens=5, use_cache=use_cache).shape == (8,)
    with pytest.warns(UserWarning, match="outgrew"):
        wanderer.generate(torch.arange(3), max_new_tokens=6, use_cache=use_cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_has_ended_does_not_outgrow_the_context(parrot, use_cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The first row ends at once; until the second does, both would grow by more tokens than fit.
        assert greedy(parrot, [PARROT_TEXT, "The "], use_cache=use_cache) == [PARROT_TEXT] * 2
