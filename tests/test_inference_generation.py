"""generate, stream, load and score: kinds in and out, where text ends, and the same text on every path."""

import json
import shutil
import threading
import types
import warnings

import pytest
import torch
from conftest import BACKENDS, PARROT_TEXT, assert_same_greedy, tiny_config

import llmfast
from llmfast import GPT, LLM, GPTConfig, ops
from llmfast.backends import OPS, _registry, cpp
from llmfast.inference.decoders import NativeDecoder, native
from llmfast.tokenizers import BPETokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    cpp.why_not("linear", CPU, torch.float32) is not None, reason="the C++ kernels are not built"
)
PROMPTS = ["Once upon a time", "The dog", "A little girl went to the park. She", "She", "sun"]


@pytest.fixture(scope="module")
def wanderer() -> LLM:
    """A random model with a context of 7, and no tokenizer."""
    torch.manual_seed(1)
    return LLM(GPT(tiny_config(n_positions=7, initializer_range=0.6)))


def greedy(llm: LLM, prompt, **settings):
    return llm.generate(prompt, temperature=0, **settings)


# --- kinds in, kinds out ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_ids_of_any_integer_type_are_taken(parrot, dtype):
    ids = torch.tensor(parrot.tokenizer.encode("The "), dtype=dtype)
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
    [torch.tensor([1.0]), torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64), torch.tensor(3)],
    ids=["float", "empty", "3d", "0d"],
)
def test_a_tensor_that_is_not_ids_is_an_error(parrot, prompt):
    with pytest.raises(ValueError, match=r"token ids must be integers of shape \(T,\) or \(B, T\)"):
        parrot.generate(prompt)


@pytest.mark.parametrize("wrong", [-1, 257, 10**6])
def test_ids_outside_the_vocabulary_are_named(parrot, wrong):
    with pytest.raises(ValueError, match=f"token id {wrong} is not in the vocabulary of 257"):
        parrot.generate(torch.tensor([3, wrong]))


def test_a_prompt_that_is_not_text_is_an_error(parrot):
    with pytest.raises(ValueError, match="a prompt must be a string, got int"):
        parrot.generate(["a", 5])


# --- where text ends --------------------------------------------------------------------------------------------


def test_text_ends_at_end_of_text_which_is_left_out(parrot):
    assert greedy(parrot, "The ", max_new_tokens=64 - 4) == PARROT_TEXT
    stream = parrot.stream("The ", temperature=0, max_new_tokens=60)
    assert "".join(stream) == PARROT_TEXT[4:]
    assert stream.tokens == len(PARROT_TEXT.encode()) - 4 + 1  # with end-of-text itself


def test_text_ends_after_max_new_tokens(parrot):
    assert greedy(parrot, "The ", max_new_tokens=8) == "The ☃ said"  # three of the tokens are ☃


@pytest.mark.parametrize(
    "stop, end",
    [
        ("said", "The ☃ "),  # four tokens
        (["xyz", "naïve", "ok"], "The ☃ said: "),  # the first that comes
        ("ï", "The ☃ said: na"),  # one character of two tokens
        ("日本", "The ☃ said: naïve "),  # two characters of three tokens each
        ("本語, ", "The ☃ said: naïve 日"),
        (["e!", "Bye!"], PARROT_TEXT[:-4]),  # both complete with the same token: the earlier one counts
        ("saint", PARROT_TEXT),  # begins, but does not come
        ("Bye!?", PARROT_TEXT),  # held back until the very end
        (["T"], PARROT_TEXT),  # only in the prompt
        ([], PARROT_TEXT),
    ],
)
def test_text_ends_before_a_stop_string(parrot, stop, end):
    assert greedy(parrot, "The ", stop=stop) == end
    assert greedy(parrot, ["The ", "The ☃ s"], stop=stop)[0] == end
    pieces = list(parrot.stream("The ", temperature=0, stop=stop))
    assert "".join(pieces) == end[4:]


def test_the_stream_ends_with_the_stop_string_and_makes_no_more_tokens(parrot):
    stream = parrot.stream("The ", temperature=0, stop="said")
    assert "".join(stream) == "☃ "
    assert stream.tokens == len("☃ said".encode())
    with pytest.raises(StopIteration):
        next(stream)


def test_what_may_become_a_stop_string_is_held_back(parrot):
    pieces = list(parrot.stream("The ☃ ", temperature=0, stop="sailor"))
    assert pieces[0] == "said"  # not s, a, i
    assert "".join(pieces) == PARROT_TEXT[6:]


@pytest.mark.parametrize("stop", ["", ["ok", ""], [5], [None]])
def test_an_empty_stop_string_is_an_error(parrot, stop):
    with pytest.raises(ValueError, match="stop must be non-empty strings"):
        parrot.generate("x", stop=stop)
    with pytest.raises(ValueError, match="stop must be non-empty strings"):
        parrot.stream("x", stop=stop)


def test_stop_strings_with_ids_are_an_error(parrot):
    with pytest.raises(ValueError, match="stop strings need a text prompt"):
        parrot.generate(torch.tensor([1]), stop="x")


# --- streaming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "T", "The ", "The ☃ said: na", "The ☃ said: naïve 日本語, ok "])
def test_pieces_are_whole_characters_and_together_what_generate_adds(parrot, prompt):
    pieces = list(parrot.stream(prompt, temperature=0))
    assert prompt + "".join(pieces) == greedy(parrot, prompt) == PARROT_TEXT
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(PARROT_TEXT) - len(prompt)  # a piece a character, as soon as it is whole


@pytest.mark.parametrize("seed", range(4))
def test_sampled_pieces_together_are_what_generate_adds(storyteller, seed):
    settings = {"temperature": 1.5, "seed": seed, "max_new_tokens": 40, "stop": ["e s", "."]}
    text = storyteller.generate("The", **settings)
    assert "The" + "".join(storyteller.stream("The", **settings)) == text


def test_a_character_cut_off_by_max_new_tokens_is_the_same_streamed_and_not(parrot):
    for n in range(1, 12):
        pieces = parrot.stream("The ", temperature=0, max_new_tokens=n)
        assert "The " + "".join(pieces) == greedy(parrot, "The ", max_new_tokens=n)


def test_arguments_are_checked_at_once_not_at_the_first_piece(parrot):
    for wrong in ({"temperature": -1}, {"max_new_tokens": -1}, {"seed": -1}, {"top_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            parrot.stream("The ", **wrong)
    with pytest.raises(ValueError, match="context"):
        parrot.stream("x" * 99)


def test_pieces_come_while_the_text_is_made(parrot):
    stream = parrot.stream("The ", temperature=0)
    assert stream.tokens == 0
    assert next(stream) == "☃" and stream.tokens == 3
    assert next(stream) == " " and stream.tokens == 4


# --- the context ------------------------------------------------------------------------------------------------


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


# --- chance -----------------------------------------------------------------------------------------------------


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
        with pytest.raises(ValueError, match="seed must be in"):
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
        ("top_k", 0),
        ("top_p", 0),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("max_new_tokens", -1),
        ("num_return_sequences", 0),
    ],
)
def test_an_invalid_setting_is_named(parrot, name, value):
    with pytest.raises(ValueError, match=name):
        parrot.generate("The ", **{name: value})


def test_an_unknown_setting_is_an_error(parrot):
    with pytest.raises(TypeError, match="beam_size"):
        parrot.generate("The ", beam_size=4)


# --- the same text on every path --------------------------------------------------------------------------------


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


# --- backends ---------------------------------------------------------------------------------------------------


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


# --- load -------------------------------------------------------------------------------------------------------


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


@needs_native
def test_loading_for_a_cpu_packs_the_weights_and_reads_the_module_only_when_asked(storyteller_directory):
    llm = llmfast.load(storyteller_directory, device="cpu", precision="fp32")
    text = llm.generate("Once upon", temperature=0, max_new_tokens=20)
    assert llm.native() is not None and isinstance(llm.decoder(), NativeDecoder)
    assert llm._model is None
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
        ({"precision": "int3"}, "precision must be auto, fp32, .*, int4-all, got 'int3'"),
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


# --- score ------------------------------------------------------------------------------------------------------


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


# --- at the edges ---------------------------------------------------------------------------------------------------


def test_an_embedding_larger_than_the_tokenizer_never_yields_a_padding_token():
    tokenizer = BPETokenizer.train(["ab"], 257)
    model = GPT(GPTConfig(vocab_size=400, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100  # the padding is what an unmasked sampler would choose
    llm = LLM(model, tokenizer)
    assert llm.generate("ab", 20, temperature=1.0, seed=0).startswith("ab")
    assert "".join(llm.stream("ab", 20, temperature=0, repetition_penalty=1.3)) is not None


def test_a_character_cut_off_by_the_length_is_left_out(parrot):
    whole = parrot.generate(PARROT_TEXT[:4], len(PARROT_TEXT.encode()), temperature=0)
    for length in range(1, len(PARROT_TEXT.encode())):
        assert "\ufffd" not in parrot.generate(PARROT_TEXT[:4], length, temperature=0)
    assert "\ufffd" not in whole


def test_score_takes_one_text(parrot):
    with pytest.raises(ValueError, match=r"ids of shape \(T,\)"):
        parrot.score(torch.zeros(2, 3, dtype=torch.int64))


def test_the_reference_backend_is_for_ops_not_models(storyteller_directory):
    with pytest.raises(ValueError, match="can't run a model"):
        llmfast.load(storyteller_directory, backend="reference")


def test_the_embedded_model_tells_a_story():
    text = llmfast.generate("Once upon a time", max_new_tokens=60, seed=0)
    assert text.startswith("Once upon a time") and len(text.split()) > 25
    assert llmfast.generate(["One day", "The cat"], max_new_tokens=5, seed=0)[1].startswith("The cat")


def test_a_checkpoint_of_gpt2s_vocabulary_without_files_gets_gpt2s_tokenizer(monkeypatch):
    model = GPT(GPTConfig(vocab_size=50257, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    vocabulary = BPETokenizer.train(["hello hello"], 260)
    monkeypatch.setattr("llmfast.inference.generation.gpt2_tokenizer", lambda: vocabulary)
    assert LLM(model).generate("hello", 2, temperature=0).startswith("hello")

    def offline():
        raise FileNotFoundError("GPT-2's vocabulary is neither here nor there")

    monkeypatch.setattr("llmfast.inference.generation.gpt2_tokenizer", offline)
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


def test_score_without_a_tokenizer_survives_a_start_token_outside_the_vocabulary():
    model = GPT(GPTConfig(vocab_size=50, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=50256))
    scored = LLM(model).score(torch.tensor([1, 2, 3])).log_probabilities
    assert scored[0].isnan() and bool((scored[1:] < 0).all())
