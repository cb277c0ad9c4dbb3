"""Decoders that keep what they hold: the bits of a prefill where that is asked for, and bounded memory."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from conftest import tiny_config

import llmfast
from llmfast.backends import cpp
from llmfast.inference.decoders import KeepingDecoder, NativeDecoder, NativeModel, PrefixCache
from llmfast.inference.decoders.keeping import same_bits, shared_beginning
from llmfast.inference.scoring import Window
from llmfast.models import Llama, LlamaConfig

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpp.why_not("linear", torch.device("cpu"), torch.float32) is not None, reason="no C++ kernels"),
]
PRECISIONS = ("fp32", "bf16", "int8", "int4")


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], NativeModel]:
    torch.manual_seed(3)
    gpt = llmfast.GPT(tiny_config(vocab_size=90, n_positions=1500, n_embd=64, n_head=2))
    llama = Llama(
        LlamaConfig(
            vocab_size=90,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1500,
        )  # fmt: skip
    )
    return {
        (name, precision): NativeModel(model.config, model.state_dict().items(), precision)
        for name, model in (("gpt2", gpt), ("llama", llama))
        for precision in PRECISIONS
    }


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(90), k=count)


def test_shared_beginning():
    assert shared_beginning([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_beginning([1, 2], [1, 2, 3]) == shared_beginning([1, 2, 3], [1, 2]) == 2
    assert shared_beginning([], [1]) == 0


@pytest.mark.parametrize(
    "kept, length, same",
    [
        (0, 1, 0), (63, 100, 0), (64, 100, 64), (64, 65, 0), (64, 80, 0), (64, 81, 64), (130, 144, 64), (130, 145, 128),
        (600, 600, 576), (512, 513, 512), (600, 592, 512), (600, 593, 576), (2000, 1025, 1024), (500, 505, 448),
    ],
)  # fmt: skip
def test_where_a_prefill_may_begin_again(kept, length, same):
    assert same_bits(kept, length) == same


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bits_are_those_of_a_prefill(models, family, precision):
    """Prompts that share beginnings of many lengths, one after the other in one decoder."""
    model, rng = models[family, precision], random.Random(5)
    decoder = KeepingDecoder(model, 1500)
    text, reused = tokens(1400, 0), 0
    for number, length in enumerate([70, 200, 81, 129, 145, 600, 530, 523, 1100, 1041, 90]):
        shared = rng.choice([length, length - 1, length // 2, 600])
        prompt = text[: min(shared, length)] + tokens(max(0, length - shared), number)
        fresh = NativeDecoder(model, 1, 1500)
        assert torch.equal(decoder.prefill([prompt]), fresh.prefill([prompt])), (number, decoder.kept)
        assert decoder.kept % 64 == 0
        reused += decoder.kept
        for token in (1, 2, 3):  # what follows is no part of a prefill
            assert torch.equal(decoder.step(torch.tensor([token])), fresh.step(torch.tensor([token])))
        text = prompt + text[len(prompt) :]
    assert reused > 1000


def test_tokens_that_came_one_by_one_are_not_taken_for_a_prefill(models):
    model = models["llama", "bf16"]
    decoder = KeepingDecoder(model, 1500)
    prompt = tokens(300, 1)
    decoder.prefill([prompt[:100]])
    for token in prompt[100:200]:
        decoder.step(torch.tensor([token]))
    assert decoder.tokens == prompt[:200]
    assert decoder.keepable(prompt, exact=True) == 64
    assert decoder.keepable(prompt, exact=False) == 200
    decoder.exact = False
    logits = decoder.prefill([prompt])
    assert decoder.kept == 200 and decoder.keepable(prompt, exact=True) == 64
    torch.testing.assert_close(logits, NativeDecoder(model, 1, 1500).prefill([prompt]), rtol=0.1, atol=0.1)


def test_another_number_of_threads_has_other_bits(models):
    decoder = KeepingDecoder(models["gpt2", "fp32"], 1500)
    prompt = tokens(200, 1)
    decoder.prefill([prompt])
    assert decoder.keepable([*prompt, 1], exact=True) == 192 - 64
    decoder.threads += 1
    assert decoder.keepable([*prompt, 1], exact=True) == 0
    decoder.prefill([prompt])
    assert decoder.kept == 0 and decoder.keepable([*prompt, 1], exact=True) > 0


def test_what_was_guessed_in_vain_is_forgotten(models):
    decoder = KeepingDecoder(models["gpt2", "fp32"], 1500)
    decoder.prefill([[1, 2, 3]])
    decoder.step_block(torch.tensor([4, 5, 6]))
    decoder.rewind(4)
    assert decoder.tokens == [1, 2, 3, 4]
    decoder.exact = False
    fresh = NativeDecoder(models["gpt2", "fp32"], 1, 1500)
    torch.testing.assert_close(decoder.prefill([[1, 2, 3, 4, 9]]), fresh.prefill([[1, 2, 3, 4, 9]]))
    assert decoder.kept == 4


# --- the cache --------------------------------------------------------------------------------------------------------


def used(cache: PrefixCache, model: NativeModel, prompt: list[int], exact: bool = False, capacity: int = 300) -> int:
    """Prefills a prompt in a decoder of the cache, and gives it back; how much of it was there."""
    decoder = cache.take(model, prompt, capacity, exact)
    decoder.prefill([prompt])
    decoder.close()
    return decoder.kept


def test_the_decoder_that_holds_most_of_a_prompt_is_taken(models):
    model, cache = models["llama", "fp32"], PrefixCache()
    first, second = tokens(200, 1), tokens(200, 2)
    assert used(cache, model, first) == used(cache, model, second) == 0
    assert used(cache, model, [*first, 1]) == 200
    assert used(cache, model, [*second[:150], 1, 2]) == 150
    assert used(cache, model, first, exact=True) == same_bits(200, 200)
    assert used(cache, model, first, capacity=1100) == 0  # a larger one


def test_a_short_prompt_does_not_cost_a_long_chat_what_it_holds(models):
    model, cache = models["llama", "fp32"], PrefixCache()
    chat = tokens(250, 1)
    used(cache, model, chat)
    assert used(cache, model, [*chat[:40], 7]) == 0
    assert used(cache, model, [*chat, 7]) == 250


def test_what_waits_is_bounded_and_the_longest_unused_goes(models):
    model = models["llama", "fp32"]
    one = KeepingDecoder(model, 1024)
    one.prefill([tokens(200, 0)])
    assert one.held_bytes == one.nbytes * 200 // 1024
    cache = PrefixCache(most_bytes=3 * one.held_bytes)
    prompts = [tokens(200, seed) for seed in range(5)]
    for prompt in prompts:
        used(cache, model, prompt)
        assert cache.nbytes <= cache.most_bytes
    assert [used(cache, model, prompt) for prompt in (prompts[4], prompts[3], prompts[2], prompts[0])] == [
        199,
        199,
        199,
        0,
    ]
    cache.clear()
    assert cache.nbytes == 0 and used(cache, model, prompts[4]) == 0


def test_other_weights_are_another_model(models):
    cache, prompt = PrefixCache(), tokens(100, 1)
    used(cache, models["llama", "fp32"], prompt)
    assert used(cache, models["llama", "bf16"], prompt) == 0
    assert used(cache, models["llama", "fp32"], prompt) == 0  # which the other has replaced


def test_one_user_at_a_time(models):
    model, cache, prompt = models["llama", "fp32"], PrefixCache(), tokens(200, 1)
    expected = NativeDecoder(model, 1, 300).prefill([prompt])
    results: list[torch.Tensor] = []

    def run() -> None:
        for _ in range(5):
            decoder = cache.take(model, prompt, 300, True)
            results.append(decoder.prefill([prompt]))
            decoder.close()
            decoder.close()  # a second time gives nothing back

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20 and all(torch.equal(result, expected) for result in results)
    assert len({id(decoder) for decoder in cache._waiting}) == len(cache._waiting) <= 4


# --- LLM --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> llmfast.LLM:
    torch.manual_seed(0)
    model = llmfast.GPT(tiny_config(vocab_size=90, n_positions=300, n_embd=64, n_head=2, bos_token_id=0))
    return llmfast.LLM(model, native=NativeModel(model.config, model.state_dict().items(), "fp32"))


@pytest.mark.parametrize("speculate", [0, 4])
def test_generate_gives_the_same_text_and_computes_less(llm, speculate, monkeypatch):
    kept, prefill = [], KeepingDecoder.prefill

    def noting(decoder, prompts):
        logits = prefill(decoder, prompts)
        kept.append(decoder.kept)
        return logits

    monkeypatch.setattr(KeepingDecoder, "prefill", noting)
    llm.runner.prefixes.clear()
    document = tokens(150, 0)
    prompts = [torch.tensor([*document, *tokens(20, number)]) for number in range(4)]
    texts = [llm.generate(prompt, max_new_tokens=10, seed=1, speculate=speculate) for prompt in prompts]
    assert kept == [0, 128, 128, 128]
    for prompt, text in zip(prompts, texts, strict=True):
        llm.runner.prefixes.clear()
        assert torch.equal(llm.generate(prompt, max_new_tokens=10, seed=1), text)


def test_text_that_outgrows_the_context(llm):
    prompt = torch.tensor(tokens(290, 3))
    llm.runner.prefixes.clear()
    with pytest.warns(UserWarning, match="outgrew"):
        first = llm.generate(prompt, max_new_tokens=30, seed=1)
    with pytest.warns(UserWarning, match="outgrew"):
        assert torch.equal(llm.generate(prompt, max_new_tokens=30, seed=1), first)


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many tokens go through the model, a number a step."""
    sizes, run = [], NativeDecoder._run

    def noting(decoder, ids, segments, all_rows=False):
        sizes.append(len(ids))
        return run(decoder, ids, segments, all_rows)

    monkeypatch.setattr(NativeDecoder, "_run", noting)
    return sizes


def score_anew(llm: llmfast.LLM, ids: list[int]) -> torch.Tensor:
    llm.runner.prefixes.clear()
    return llm.score(torch.tensor(ids)).log_probabilities


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_of_texts_that_begin_alike_have_the_same_bits(models, precision):
    packed = models["llama", precision]
    torch.manual_seed(1)
    llm = llmfast.LLM(Llama(packed.config), native=packed)
    document = tokens(700, 0)
    texts = [[*document[:length], *tokens(more, length)] for length, more in ((300, 40), (300, 5), (290, 60), (700, 9))]
    texts += [document[:300], document, tokens(30, 5), tokens(30, 5)]
    llm.runner.prefixes.clear()
    together = [llm.score(torch.tensor(ids)).log_probabilities for ids in texts]
    for ids, mine in zip(texts, together, strict=True):
        assert torch.equal(mine, score_anew(llm, ids))
    [(_, prediction)] = llm.predictions([Window([packed.config.bos_token_id, *document])])
    torch.testing.assert_close(together[5], prediction.log_probabilities, atol=0.05, rtol=0)


def test_only_what_is_new_is_computed(llm, read):
    document = tokens(200, 0)
    score_anew(llm, [*document, *tokens(20, 1)])
    read.clear()
    llm.score(torch.tensor([*document, *tokens(20, 2)]))
    assert sum(read) == 220 - 192  # from the start token to the last but one
    read.clear()
    llm.score(torch.tensor(tokens(40, 3)))  # nothing in common
    assert sum(read) == 40


def test_scoring_and_generating_share_what_is_held(llm, read):
    document = tokens(220, 7)
    with_start = [llm.start_token, *document]
    generated = llm.generate(torch.tensor(with_start), max_new_tokens=5, temperature=0)
    score = score_anew(llm, document)
    read.clear()
    assert torch.equal(llm.generate(torch.tensor(with_start), max_new_tokens=5, temperature=0), generated)
    assert read[0] == len(with_start) - 192  # what was scored has the bits of a prefill
    assert torch.equal(llm.score(torch.tensor(document)).log_probabilities, score)  # generated with since then


def test_a_decoder_that_has_no_scores_is_none_to_score_with(llm, read):
    document = tokens(200, 8)
    expected = score_anew(llm, document)
    llm.runner.prefixes.clear()
    llm.generate(torch.tensor([llm.start_token, *document]), max_new_tokens=2, temperature=0)
    read.clear()
    assert torch.equal(llm.score(torch.tensor(document)).log_probabilities, expected)
    assert sum(read) == 200


def test_what_scoring_holds_is_bounded(llm):
    llm.runner.prefixes.clear()
    for seed in range(30):
        llm.score(torch.tensor(tokens(100, seed)))
    assert len(llm.runner.prefixes._waiting) <= 16
    small = PrefixCache(most_bytes=1)
    decoder = small.take_to_score(llm.native(), tokens(100, 0), 512)
    for _ in decoder.read_on(tokens(100, 0), 512)[1]:
        pass
    decoder.close()
    assert small.nbytes == 0


def test_one_token_and_none(llm):
    assert llm.score(torch.tensor([5])).log_probabilities.shape == (1,)
    assert score_anew(llm, [5, 6]).shape == (2,)
