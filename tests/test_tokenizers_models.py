"""Models with each kind of tokenizer: they generate, stream and score, and their tokenizer travels with them."""

import pytest
import torch
from conftest import fit, tiny_config

import llmfast
from llmfast.tokenizers import BPETokenizer, CharTokenizer, WordPieceTokenizer, WordTokenizer, load_tokenizer
from llmfast.weights.saving import save

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "A naïve cat (☃) sat on the mat, and the cat said: hello!"
KINDS = {
    "char": lambda: CharTokenizer.train([TEXT]),
    "word": lambda: WordTokenizer.train([TEXT]),
    "bpe": lambda: BPETokenizer.train([TEXT], 270),
    "bpe-gpt4": lambda: BPETokenizer.train([TEXT], 270, split="gpt4", special_tokens=["<|user|>"]),
    "wordpiece": lambda: WordPieceTokenizer.train([TEXT], 80),
}


@pytest.fixture(scope="module", params=KINDS)
def llm(request) -> llmfast.LLM:
    """A model that knows TEXT by heart."""
    tokenizer = KINDS[request.param]()
    end = tokenizer.end_of_text
    config = tiny_config(vocab_size=tokenizer.vocab_size, n_positions=80, n_embd=32, n_head=2, initializer_range=0.05)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = tokenizer.encode(TEXT)
        model = fit(llmfast.GPT(config), [[end, *ids, end], [*ids, end]], 120, 1e-2)
    return llmfast.LLM(model, tokenizer)


@pytest.fixture
def directory(llm, tmp_path):
    llm.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def as_decoded(llm: llmfast.LLM) -> str:
    return llm.tokenizer.decode(llm.tokenizer.encode(TEXT))


def test_a_prompt_is_continued_to_the_end(llm):
    prompt = "A naïve cat"
    full = as_decoded(llm)
    assert llm.generate(prompt, temperature=0, max_new_tokens=79) == full
    assert llm.generate([prompt, "A"], temperature=0, max_new_tokens=79) == [full, full]
    pieces = list(llm.stream(prompt, temperature=0, max_new_tokens=79))
    assert prompt + "".join(pieces) == full
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 3


def test_stop_strings_reach_over_tokens(llm):
    assert (
        llm.generate("A naïve", temperature=0, max_new_tokens=79, stop="the mat") == as_decoded(llm).split("the mat")[0]
    )


def test_a_known_text_scores_better_than_another(llm):
    known, other = llm.score(TEXT), llm.score("hello the naïve cat sat A mat")
    assert known.ids == llm.tokenizer.encode(TEXT)
    assert known.total / len(known.ids) > other.total / len(other.ids) + 0.5


def test_the_tokenizer_travels_with_its_model(llm, directory, tmp_path):
    text = TEXT + " Unknown ☺ words\n"
    loaded = llmfast.load(directory, precision="fp32")
    assert type(loaded.tokenizer) is type(llm.tokenizer)
    assert loaded.tokenizer.encode(text) == llm.tokenizer.encode(text)
    assert loaded.tokenizer.special_tokens == llm.tokenizer.special_tokens
    assert loaded.generate("A naïve", temperature=0) == llm.generate("A naïve", temperature=0)
    save(tmp_path / "copy", llm.config, llm.model.state_dict(), tokenizer_from=directory)
    assert load_tokenizer(tmp_path / "copy").encode(text) == llm.tokenizer.encode(text)


def test_another_models_tokenizer_does_not_stay_behind(llm, directory):
    for make in KINDS.values():
        other = make()
        other.save(directory)
        loaded = load_tokenizer(directory)
        assert type(loaded) is type(other) and loaded.encode(TEXT) == other.encode(TEXT)
        assert loaded.special_tokens == other.special_tokens
