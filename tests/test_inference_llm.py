"""`LLM`: kinds in and out, chance, and scores."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import PARROT_TEXT, tiny_config

import llmfast
from llmfast import GPT, LLM, GPTConfig
from llmfast.tokenizers import BPETokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["Once upon a time", "The dog", "A little girl went to the park. She", "She", "sun"]


def greedy(llm: LLM, prompt, **settings):
    return llm.generate(prompt, temperature=0, **settings)


# --- kinds in, kinds out ----------------------------------------------------------------------------------------------


def test_a_string_gives_a_string_that_begins_with_it(parrot):
    assert greedy(parrot, "The ") == PARROT_TEXT


def test_a_list_gives_a_list(parrot):
    prompts = ["The ☃ sa", "The ", "The ☃ said: naïve 日"]
    assert greedy(parrot, prompts) == [PARROT_TEXT] * 3
    assert greedy(parrot, ["The "]) == [PARROT_TEXT]
    assert greedy(parrot, tuple(prompts)) == [PARROT_TEXT] * 3


def test_an_empty_list_gives_an_empty_list(parrot):
    assert parrot.generate([]) == []
    assert parrot.generate([], num_return_sequences=3) == []


def test_an_empty_prompt_starts_from_end_of_text(parrot):
    assert greedy(parrot, "") == PARROT_TEXT
    assert greedy(parrot, ["", "The "]) == [PARROT_TEXT, PARROT_TEXT]
    assert "".join(parrot.stream("", temperature=0)) == PARROT_TEXT


def test_an_empty_prompt_without_an_end_of_text_token_is_an_error(parrot):
    tokenizer = BPETokenizer(parrot.tokenizer.vocab, [], {})
    with pytest.raises(ValueError, match="the prompt is empty"):
        LLM(parrot.model, tokenizer).generate("")


def test_ids_give_ids_of_the_same_rank(parrot):
    ids = torch.tensor(parrot.tokenizer.encode("The "))
    one = greedy(parrot, ids, max_new_tokens=9)
    assert one.shape == (13,) and one.dtype == torch.int64
    assert parrot.tokenizer.decode_bytes(one.tolist()) == PARROT_TEXT.encode()[:13]
    two = greedy(parrot, torch.stack([ids, ids]), max_new_tokens=9)
    assert two.tolist() == [one.tolist()] * 2
    assert torch.equal(two[:, :4], torch.stack([ids, ids]))


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_ids_of_any_integer_type_are_taken(parrot, dtype):
    ids = torch.tensor(parrot.tokenizer.encode("The ")).to(getattr(torch, dtype))
    assert parrot.tokenizer.decode_bytes(greedy(parrot, ids, max_new_tokens=3).tolist()) == PARROT_TEXT.encode()[:7]


def test_ids_run_on_past_end_of_text(parrot):
    ids = torch.tensor(parrot.tokenizer.encode(PARROT_TEXT))
    new = greedy(parrot, ids, max_new_tokens=5)[len(ids) :].tolist()
    assert len(new) == 5 and new[0] == parrot.tokenizer.end_of_text


def test_the_prompt_tensor_is_not_changed(parrot):
    ids = torch.tensor([[84, 104]])
    parrot.generate(ids, max_new_tokens=5)
    assert ids.tolist() == [[84, 104]]


def test_several_sequences_of_each_kind(storyteller):
    settings = {"max_new_tokens": 8, "num_return_sequences": 3, "seed": 5}
    text = storyteller.generate("The", **settings)
    assert len(text) == 3 and len(set(text)) > 1 and all(t.startswith("The") for t in text)
    texts = storyteller.generate(["The", "A little"], **settings)
    assert [len(group) for group in texts] == [3, 3]
    assert all(t.startswith(p) for p, group in zip(["The", "A little"], texts, strict=True) for t in group)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    rows = storyteller.generate(ids, **settings)
    assert rows.shape == (6, 12) and torch.equal(rows[:, :4], ids.repeat_interleave(3, dim=0))
    assert storyteller.generate(ids[0], **settings).shape == (3, 12)


def test_greedy_sequences_are_all_the_same(parrot):
    assert greedy(parrot, "The ", num_return_sequences=2) == [PARROT_TEXT] * 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_new_tokens_give_the_prompt(parrot, use_cache):
    settings = {"max_new_tokens": 0, "use_cache": use_cache}
    assert parrot.generate("The ☃", **settings) == "The ☃"
    assert parrot.generate(["a", ""], **settings) == ["a", ""]
    assert parrot.generate(torch.tensor([[1, 2]]), **settings).tolist() == [[1, 2]]
    assert parrot.generate(torch.tensor([1, 2]), num_return_sequences=2, **settings).tolist() == [[1, 2]] * 2
    assert list(parrot.stream("The ", **settings)) == []


@pytest.mark.parametrize(
    "prompt",
    [
        torch.tensor([1.0]),
        torch.tensor([1j]),
        torch.tensor([True]),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.tensor(3),
    ],
    ids=["float", "complex", "bool", "empty", "3d", "0d"],
)
def test_a_tensor_that_is_not_ids_is_an_error(parrot, prompt):
    with pytest.raises(ValueError, match=r"token ids must be integers of shape \(T,\) or \(B, T\)"):
        parrot.generate(prompt)


@pytest.mark.parametrize("wrong", [-1, 257, 10**6])
def test_ids_outside_the_vocabulary_are_named(parrot, wrong):
    with pytest.raises(ValueError, match=f"token id {wrong} is not in the vocabulary of 257"):
        parrot.generate(torch.tensor([3, wrong]))


def test_an_id_that_no_other_integer_type_holds_is_named():
    llm = LLM(GPT(tiny_config()))
    with pytest.raises(ValueError, match=f"token id {2**64 - 1} is not in the vocabulary of 19"):
        llm.score(torch.tensor([2**64 - 1], dtype=torch.uint64))


@pytest.mark.parametrize(
    "prompt, kind", [(["a", 5], "int"), ([None], "NoneType"), (None, "NoneType"), (b"bytes", "bytes"), (5, "int")]
)
def test_a_prompt_that_is_not_text_is_an_error(parrot, prompt, kind):
    with pytest.raises(ValueError, match=f"a prompt must be a string.*, got {kind}"):
        parrot.generate(prompt)


# --- chance -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text(storyteller):
    texts = [storyteller.generate("The", temperature=1.5, seed=seed, max_new_tokens=20) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_texts_differ_and_torchs_seed_repeats_them(storyteller):
    def three():
        return [storyteller.generate("The", temperature=1.5, max_new_tokens=20) for _ in range(3)]

    torch.manual_seed(0)
    first = three()
    torch.manual_seed(0)
    assert three() == first and len(set(first)) == 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_rows_text_does_not_depend_on_its_neighbours(storyteller, use_cache):
    settings = {"temperature": 1.2, "max_new_tokens": 25, "use_cache": use_cache}
    together = storyteller.generate(PROMPTS, seed=7, **settings)
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == storyteller.generate(prompt, seed=7 + row, **settings)
    several = storyteller.generate(PROMPTS[0], seed=7, num_return_sequences=3, **settings)
    assert several == [storyteller.generate(PROMPTS[0], seed=7 + row, **settings) for row in range(3)]


def test_the_largest_seed_works_for_several_rows(storyteller):
    largest = 2**63 - 1
    assert len(storyteller.generate(["a", "b"], seed=largest, max_new_tokens=2)) == 2
    for wrong in (-1, largest + 1):
        with pytest.raises(ValueError, match="seed must be an integer from 0"):
            storyteller.generate("a", seed=wrong)


def test_top_k_of_one_is_greedy_at_any_temperature(storyteller):
    assert storyteller.generate("The", temperature=5.0, top_k=1, max_new_tokens=20) == greedy(
        storyteller, "The", max_new_tokens=20
    )


def test_a_repetition_penalty_reaches_prompt_and_new_tokens(wanderer):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rows = greedy(wanderer, ids, max_new_tokens=5, repetition_penalty=1e9)
    assert all(len(set(row)) == 8 for row in rows.tolist())  # nothing comes twice


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("temperature", None),
        ("top_k", 0),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", "most"),
        ("min_p", 2),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("repetition_penalty", "1"),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", "many"),
        ("max_new_tokens", None),
        ("num_return_sequences", 0),
        ("num_return_sequences", 1.0),
        ("seed", 1.5),
        ("seed", "one"),
        ("speculate", 0.5),
        ("speculate", -1),
        ("stop", 5),
        ("stop", {"a": 1}),
    ],
)
def test_an_invalid_setting_is_named(parrot, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be") as error:
        parrot.generate("The ", **{name: value})
    assert "\n" not in str(error.value)
    if name != "num_return_sequences":
        with pytest.raises(ValueError, match=f"^{name} must be"):
            parrot.stream("The ", **{name: value})


def test_numpys_numbers_are_numbers(storyteller):
    as_numpy = dict(max_new_tokens=np.int64(8), seed=np.int32(3), top_k=np.int64(5), temperature=np.float32(1.5))
    plain = {name: value.item() for name, value in as_numpy.items()}
    assert storyteller.generate("The", **as_numpy) == storyteller.generate("The", **plain)


def test_an_unknown_setting_is_an_error(parrot):
    with pytest.raises(TypeError, match="beam_size"):
        parrot.generate("The ", beam_size=4)


# --- score ------------------------------------------------------------------------------------------------------------


def log_probabilities(model: GPT, ids: list[int]) -> torch.Tensor:
    """Of ids[1:], each given all before it."""
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        logits = model(torch.tensor([ids[:-1]]))[0]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).float()


def test_score_is_the_log_probability_of_every_token_from_end_of_text_on(storyteller):
    text = "The cat liked to sleep."
    score = storyteller.score(text)
    assert score.ids == storyteller.tokenizer.encode(text)
    expected = log_probabilities(storyteller.model, [storyteller.tokenizer.end_of_text, *score.ids])
    torch.testing.assert_close(score.log_probabilities, expected, rtol=1e-4, atol=1e-4)
    assert score.total == pytest.approx(float(expected.sum()), rel=1e-4)
    ids = storyteller.score(torch.tensor(score.ids))
    assert ids.ids == score.ids and torch.equal(ids.log_probabilities, score.log_probabilities)


def test_a_text_known_by_heart_scores_higher(parrot):
    assert parrot.score(PARROT_TEXT).total > parrot.score(PARROT_TEXT[::-1]).total + 50


def test_without_an_end_of_text_the_first_token_is_nan(wanderer):
    score = wanderer.score(torch.tensor([3, 1, 4]))
    assert score.log_probabilities[0].isnan()
    torch.testing.assert_close(
        score.log_probabilities[1:], log_probabilities(wanderer.model, [3, 1, 4]), rtol=1e-4, atol=1e-5
    )
    assert score.total == pytest.approx(float(score.log_probabilities[1:].sum()), rel=1e-5)


def test_empty_text_scores_nothing(parrot):
    score = parrot.score("")
    assert score.ids == [] and score.log_probabilities.shape == (0,) and score.total == 0


@pytest.mark.parametrize("context", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
def test_in_a_long_text_every_token_sees_at_least_half_a_context(context, length):
    torch.manual_seed(0)
    llm = LLM(GPT(tiny_config(n_positions=context, bos_token_id=0)))
    ids = torch.randint(19, (length,))
    sequence = [0, *ids.tolist()]
    values = llm.score(ids).log_probabilities
    assert values.shape == (length,)
    for i, value in enumerate(values, start=1):
        # Which of the allowed amounts of context it saw is not ours to say.
        least, most = min(i, max(1, context // 2)), min(i, context)
        allowed = [log_probabilities(llm.model, sequence[i - n : i + 1])[-1] for n in range(least, most + 1)]
        assert any(torch.isclose(value, a, rtol=1e-4, atol=1e-5) for a in allowed), (i, value, allowed)


def test_ids_to_score_must_be_a_row_of_the_vocabulary(wanderer):
    with pytest.raises(ValueError, match="token id 19"):
        wanderer.score(torch.tensor([19]))


# --- at the edges -----------------------------------------------------------------------------------------------------


def test_an_embedding_larger_than_the_tokenizer_never_yields_a_padding_token():
    tokenizer = BPETokenizer.train(["ab"], 257)
    model = GPT(GPTConfig(vocab_size=400, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100  # the padding is what an unmasked sampler would choose
    llm = LLM(model, tokenizer)
    assert llm.generate("ab", 20, temperature=1.0, seed=0).startswith("ab")
    assert "".join(llm.stream("ab", 20, temperature=0, repetition_penalty=1.3)) is not None


def test_score_takes_one_text(parrot):
    with pytest.raises(ValueError, match=r"ids of shape \(T,\)"):
        parrot.score(torch.zeros(2, 3, dtype=torch.int64))


def test_a_checkpoint_of_gpt2s_vocabulary_without_files_gets_gpt2s_tokenizer(monkeypatch):
    model = GPT(GPTConfig(vocab_size=50257, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    vocabulary = BPETokenizer.train(["hello hello"], 260)
    monkeypatch.setattr("llmfast.inference.llm.gpt2_tokenizer", lambda: vocabulary)
    assert LLM(model).generate("hello", 2, temperature=0).startswith("hello")

    def offline():
        raise FileNotFoundError("GPT-2's vocabulary is neither here nor there")

    monkeypatch.setattr("llmfast.inference.llm.gpt2_tokenizer", offline)
    with pytest.raises(ValueError, match="give token ids .* neither here nor there"):
        LLM(model).generate("hello")


def test_a_model_left_in_training_mode_generates_without_dropout(storyteller):
    text = torch.tensor(storyteller.tokenizer.encode("Once upon a time"))
    expected = storyteller.score(text).total
    storyteller.model.train()
    assert storyteller.score(text).total == expected
    storyteller.model.train()
    storyteller.generate("Once", 2)
    assert not storyteller.model.training


@pytest.mark.parametrize("backend", ["pytorch", "auto"])
def test_a_decoder_of_a_model_in_training_has_no_dropout(backend):
    torch.manual_seed(0)
    model = GPT(tiny_config(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    llm = LLM(model, backend=backend)
    expected = llm.decoder().prefill([[1, 2, 3]])
    model.train()
    decoder = llm.decoder()
    assert torch.equal(decoder.prefill([[1, 2, 3]]), expected)
    assert torch.equal(decoder.prefill([[1, 2, 3]]), expected)


def test_repr_says_which_model_in_which_precision_on_which_backend(storyteller, storyteller_directory):
    size = f"{storyteller.config.num_parameters:,} parameters"
    assert repr(storyteller) == f"LLM(GPT, {size}, BPETokenizer, fp32, backend 'auto' on cpu)"
    llm = llmfast.load(storyteller_directory, backend="pytorch", precision="int8", device="cpu")
    assert repr(llm) == f"LLM(GPT, {size}, BPETokenizer, int8, backend 'pytorch' on cpu)"
    assert "no tokenizer" in repr(LLM(storyteller.model))


def test_a_deep_copy_has_weights_of_its_own(storyteller_directory):
    for settings in (dict(precision="int8"), dict(precision="fp32"), dict(backend="pytorch")):
        llm = llmfast.load(storyteller_directory, device="cpu", **settings)
        text = greedy(llm, "The cat", max_new_tokens=10)
        unread = copy.deepcopy(llm)
        assert greedy(unread, "The cat", max_new_tokens=10) == text
        llm.model.transformer.ln_f.weight.data[0] += 0  # the module is read
        copied = copy.deepcopy(llm)
        with torch.no_grad():
            copied.model.transformer.ln_f.weight.mul_(-1)
        assert greedy(copied, "The cat", max_new_tokens=10) != text
        assert greedy(llm, "The cat", max_new_tokens=10) == text
        # The copy of a model whose weights changed since they were packed has the changed ones.
        with torch.no_grad():
            llm.model.transformer.ln_f.weight.mul_(-1)
        changed = copy.deepcopy(llm)
        assert greedy(changed, "The cat", max_new_tokens=10) == greedy(copied, "The cat", max_new_tokens=10)


def test_a_shallow_copy_shares_them_and_a_pickle_says_why_not(storyteller):
    assert copy.copy(storyteller).model is storyteller.model
    with pytest.raises(TypeError, match="can't be pickled: save it, and load it where it is needed"):
        pickle.dumps(storyteller)


def test_score_without_a_tokenizer_survives_a_start_token_outside_the_vocabulary():
    model = GPT(GPTConfig(vocab_size=50, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=50256))
    scored = LLM(model).score(torch.tensor([1, 2, 3])).log_probabilities
    assert scored[0].isnan() and bool((scored[1:] < 0).all())
