"""Guessing ahead: the same text, in fewer steps where it repeats itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_inference_native import MODEL, packed, pytestmark, tokens  # noqa: F401  (pytestmark skips these, too)

import llmfast
from llmfast.inference import execution
from llmfast.inference.decoders import NativeDecoder, SpeculatingDecoder, speculating
from llmfast.inference.decoders.speculating import MOST_LOST, Account, PromptLookup


@given(text=st.lists(st.integers(0, 4), max_size=60), count=st.integers(0, 6), longest=st.integers(1, 4))
def test_a_guess_is_what_followed_the_longest_run_that_was_there_before(text, count, longest):
    expected: list[int] = []
    for n in range(min(longest, len(text)), 0, -1):
        run = text[-n:]
        places = [i for i in range(n, len(text)) if text[i - n : i] == run]
        if places:
            expected = text[places[-1] : places[-1] + count]
            break
    assert PromptLookup(text, longest).guess(count) == expected


def test_prompt_lookup_by_example():
    assert PromptLookup([1, 2, 3, 4, 1, 2]).guess(2) == [3, 4]
    assert PromptLookup([1, 2, 3]).guess(4) == []
    assert PromptLookup([]).guess(4) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_logits_have_the_same_bits_whatever_was_guessed(precision):
    weights = packed(MODEL, precision)
    prompt = [1, 2, 3, 4, 5, 1, 2]
    plain, guessing = NativeDecoder(weights, 1, 80), SpeculatingDecoder(NativeDecoder(weights, 1, 80), 5)
    assert torch.equal(plain.prefill([prompt]), guessing.prefill([prompt]))
    following = [3, 4, 5, 1, 2, 3, 4, 9, 1, 2, 3, 3, 3, 3, 3, *tokens(20), 1, 2, 3, 4, 5]  # some guesses come true
    for token in following:
        assert torch.equal(plain.step(torch.tensor([token])), guessing.step(torch.tensor([token])))
        assert torch.equal(plain.best, guessing.best)
    assert guessing.steps < len(following)


def test_guesses_stay_within_the_capacity():
    guessing = SpeculatingDecoder(NativeDecoder(packed(MODEL), 1, 12), 8)
    guessing.prefill([[1, 2, 1, 2, 1, 2]])
    for token in (1, 2, 1, 2, 1, 2):
        guessing.step(torch.tensor([token]))


@pytest.mark.parametrize(
    "settings", [dict(temperature=0), dict(seed=3), dict(seed=3, repetition_penalty=1.3, top_p=0.9)]
)
def test_the_text_is_the_same(settings):
    llm = llmfast.load("stories", precision="fp32")
    prompt = "The cat sat. The dog sat. The cat sat. The dog"
    plain = llm.generate(prompt, max_new_tokens=60, **settings)
    for guesses in (1, 4, 15):
        assert llm.generate(prompt, max_new_tokens=60, speculate=guesses, **settings) == plain
    assert "".join(llm.stream(prompt, max_new_tokens=60, speculate=4, **settings)) == plain.removeprefix(prompt)


def test_past_the_context_too():
    llm = llmfast.load("stories", precision="fp32")
    ids = torch.tensor(llm.tokenizer.encode("Once upon a time there was a cat. " * 60)[-500:])
    with pytest.warns(UserWarning, match="outgrew the context"):
        plain = llm.generate(ids, max_new_tokens=40, temperature=0)
    with pytest.warns(UserWarning, match="outgrew the context"):
        assert torch.equal(llm.generate(ids, max_new_tokens=40, temperature=0, speculate=6), plain)


@pytest.mark.parametrize(
    "prompt, settings, words",
    [
        ("The cat", dict(speculate=16), "speculate must be an integer from 0 to 15"),
        ("The cat", dict(speculate=-1), "speculate must be an integer from 0 to 15"),
        (["The cat", "A dog"], dict(speculate=2), "one sequence"),
        ("The cat", dict(speculate=2, use_cache=False), "native decoder and its cache"),
    ],
)
def test_what_cannot_be_is_said(prompt, settings, words):
    llm = llmfast.load("stories", precision="fp32")
    with pytest.raises(ValueError, match=words):
        llm.generate(prompt, **settings)
    with llmfast.use_backend("pytorch"), pytest.raises(ValueError, match="native decoder"):
        llm.generate("The cat", speculate=2)


# --- as many guesses as pay -------------------------------------------------------------------------------------------


class Clock:
    """Steps take what a test says: `fixed` seconds, and `each` more for every token."""

    def __init__(self, monkeypatch, fixed: float, each: float):
        self.now, self.sizes = 0.0, []
        monkeypatch.setattr(speculating.time, "perf_counter", lambda: self.now)
        block = NativeDecoder.step_block

        def step_block(decoder, tokens):
            self.now += fixed + each * len(tokens)
            self.sizes.append(len(tokens))
            return block(decoder, tokens)

        monkeypatch.setattr(NativeDecoder, "step_block", step_block)


def run(following: list[int]) -> SpeculatingDecoder:
    """Steps through a text, whatever the model says; every step's logits have the bits of a step alone."""
    weights = packed(MODEL)
    plain, guessing = NativeDecoder(weights, 1, 590), SpeculatingDecoder(NativeDecoder(weights, 1, 590), None)
    plain.prefill([[1, 2, 3]])
    guessing.prefill([[1, 2, 3]])
    for token in following:
        assert torch.equal(plain.step(torch.tensor([token])), guessing.step(torch.tensor([token])))
    return guessing


def test_a_text_that_repeats_takes_few_steps(monkeypatch):
    clock = Clock(monkeypatch, fixed=1.0, each=0.05)
    run(list(range(20)) * 10)
    assert len(clock.sizes) < 60 and max(clock.sizes) == 16
    assert clock.now < 0.45 * 200 * 1.05


def test_a_text_that_does_not_repeat_is_not_guessed(monkeypatch):
    clock = Clock(monkeypatch, fixed=1.0, each=0.05)
    run(torch.randperm(95, generator=torch.Generator().manual_seed(0)).tolist())
    assert set(clock.sizes) == {1}


@pytest.mark.parametrize("period", [3, 4, 7])
def test_guesses_that_fail_are_given_up(monkeypatch, period):
    """A text that misleads: what was there before goes on otherwise, always after some tokens that were right, and a
    step costs as much for each token. At most a hundredth is lost, and the last guess."""
    clock = Clock(monkeypatch, fixed=0.0, each=1.0)
    following = [token for i in range(500 // period) for token in [*range(period), 20 + i % 80]][:500]
    run(following)
    assert max(clock.sizes) > 1
    assert clock.now <= len(following) * (1 + MOST_LOST) + 16


def test_an_account():
    account = Account()
    assert not account.allows_guesses  # before a step alone was timed
    account.note(2.0, 0, 0)
    assert account.allows_guesses and account.single == 2.0
    account.note(50.0, 0, 0)  # the processor was away
    assert account.single == pytest.approx(6.8)
    account.note(2.0, 0, 0)
    assert account.single == 2.0
    account.note(3.0, 4, 2)  # three tokens for the price of one and a half
    assert account.gained == pytest.approx(3.0)
    account.note(9.0, 4, 0)
    assert account.gained == pytest.approx(-4.0) and not account.allows_guesses
    account.note(400.0, 0, 0)
    assert account.allows_guesses  # a hundredth of all is more by now


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(seed=3), dict(seed=3, repetition_penalty=1.1)])
def test_by_default_the_text_is_the_same_and_steps_are_fewer(settings, monkeypatch):
    llm = llmfast.load("stories", precision="fp32")
    prompt = "The cat sat on the mat. The dog sat on the mat. " * 4
    plain = llm.generate(prompt, max_new_tokens=80, speculate=0, **settings)
    clock = Clock(monkeypatch, fixed=1.0, each=0.05)
    assert llm.generate(prompt, max_new_tokens=80, **settings) == plain
    if "temperature" in settings:
        assert len(clock.sizes) < 60


def test_guessing_unasked_is_for_models_whose_steps_are_long(monkeypatch):
    runner = llmfast.load("stories", precision="int8").runner
    assert type(runner.decoder(1, 20, speculate=None)) is NativeDecoder
    monkeypatch.setattr(execution, "LARGE_ENOUGH_TO_GUESS", 0)
    assert type(runner.decoder(1, 20, speculate=None)) is SpeculatingDecoder
    assert type(runner.decoder(1, 20, speculate=0)) is NativeDecoder
    assert type(runner.decoder(2, 20, speculate=None)) is NativeDecoder
