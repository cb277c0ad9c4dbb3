"""Character and word tokenizers: what they know round-trips, what they don't is named unknown, files are read."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.tokenizers import CharTokenizer, Tokenizer, WordTokenizer, load_tokenizer, train_tokenizer
from llmfast.tokenizers.protocol import END_OF_TEXT
from llmfast.tokenizers.word import SPLIT

KINDS = [CharTokenizer, WordTokenizer]
TEXTS = ["The cat, the hat.\n", "Don’t  stop: naïve 日本 12 ☃\t…", "the cat don't"]
ANY_TEXT = st.text(max_size=60) | st.text("ab c'.\n1", max_size=40)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.kind)
def kind(request):
    return request.param


@given(st.lists(ANY_TEXT, max_size=4))
def test_what_was_trained_on_round_trips(texts):
    for kind in KINDS:
        tokenizer = kind.train(texts)
        for text in [*texts, "".join(texts)[: len(texts[0]) if texts else 0]]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
            assert tokenizer.unknown not in ids


@given(ANY_TEXT)
def test_any_text_encodes_and_tokens_decode_one_by_one(text):
    for kind in KINDS:
        tokenizer = kind.train(TEXTS)
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.decode_bytes([i]) for i in ids)
        assert tokenizer.encode(text, allow_special=True) == ids or END_OF_TEXT in text


@given(ANY_TEXT)
def test_an_unknown_character_is_one_unknown_token_and_decodes_to_a_replacement_character(text):
    tokenizer = CharTokenizer.train(TEXTS)
    known = set("".join(TEXTS))
    assert [i == tokenizer.unknown for i in tokenizer.encode(text)] == [c not in known for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(c if c in known else "\ufffd" for c in text)


@given(ANY_TEXT)
def test_words_are_a_partition_of_the_text(text):
    assert "".join(SPLIT.findall(text)) == text


def test_words_keep_their_blank_and_their_apostrophe():
    assert SPLIT.findall("The cat, don't ’tis  12 3.5\n\nA") == [
        "The", " cat", ",", " don't", " ’", "tis", " ", " 12", " 3", ".", "5", "\n", "\n", "A",
    ]  # fmt: skip


def test_an_unknown_word_keeps_the_blank_before_it():
    tokenizer = WordTokenizer.train(TEXTS)
    assert tokenizer.decode(tokenizer.encode("The dog, the cat.")) == "The <unk>, the cat."
    assert tokenizer.decode(tokenizer.encode("dog")) == "<unk>"


def test_a_word_that_is_known_only_with_or_without_a_blank_is_known():
    tokenizer = WordTokenizer.train(["The cat, the hat.\n"])
    assert tokenizer.decode(tokenizer.encode("The hat, The cat")) == "The hat, The cat"  # a blank and the word
    assert tokenizer.decode(tokenizer.encode("cat\nhat")) == " cat\n hat"


def test_the_vocabulary_is_characters_in_their_order_or_words_by_frequency():
    assert CharTokenizer.train(["hello"]).tokens == ["e", "h", "l", "o", "<unk>", END_OF_TEXT]
    tokens = WordTokenizer.train(["b a a c c c", "a"]).tokens
    assert tokens == [" c", " a", "a", "b", " ", "<unk>", END_OF_TEXT]


def test_a_smaller_vocabulary_keeps_the_most_frequent(kind):
    text = "a a a b b c d e f"
    small = kind.train([text], vocab_size=6)
    assert small.vocab_size == 6 and small.end_of_text == 5
    kept = [token for token in small.tokens[:-2] if token != " "]
    counts = Counter(text.replace(" ", "") if kind is CharTokenizer else SPLIT.findall(text))
    least = min(counts[token] for token in kept)
    assert all(counts[other] <= least for other in counts.keys() - set(small.tokens))
    assert kind.train([text], vocab_size=1000).vocab_size < 20


def test_the_order_of_the_texts_does_not_matter(kind):
    assert kind.train(TEXTS).tokens == kind.train(TEXTS[::-1]).tokens


def test_end_of_text_is_ordinary_text_unless_allowed(kind):
    tokenizer = kind.train([*TEXTS, END_OF_TEXT])
    text = f"the cat{END_OF_TEXT}the cat"
    assert tokenizer.end_of_text not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    special = tokenizer.encode(text, allow_special=True)
    assert special.count(tokenizer.end_of_text) == 1 and tokenizer.decode(special) == text


def test_a_lone_surrogate_is_unknown(kind):
    tokenizer = kind.train(["a\ud800b"])
    assert tokenizer.unknown in tokenizer.encode("a\ud800b")
    tokenizer.decode(tokenizer.encode("a\ud800b")).encode()


def test_too_small_a_vocabulary_is_refused(kind):
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        kind.train(TEXTS, vocab_size=2)
    with pytest.raises(ValueError, match="no tokenizer of the kind 'klingon'.*char, word, bpe, wordpiece"):
        train_tokenizer("klingon", TEXTS)


@pytest.mark.parametrize("bad", [-1, 10**9])
def test_an_id_outside_the_vocabulary_is_named(kind, bad):
    tokenizer = kind.train(TEXTS)
    with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([0, bad])


def test_it_fits_the_protocol_and_comes_back_from_its_files(kind, tmp_path):
    tokenizer = kind.train(TEXTS)
    assert isinstance(tokenizer, Tokenizer)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is kind and loaded.tokens == tokenizer.tokens
    assert loaded.special_tokens == {END_OF_TEXT: tokenizer.end_of_text}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == kind.__name__ and config["eos_token"] == END_OF_TEXT


DAMAGE = ["", "{", "[1]", "{}", '{"a": 0}', '{"<unk>": 1}', '{"<unk>": "0"}', '{"<unk>": 0, "a": 0}', b"\xff\xff"]


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_file_is_a_value_error_naming_it(kind, tmp_path, content):
    kind.train(TEXTS).save(tmp_path)
    (tmp_path / "vocab.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="vocab.json") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_without_its_vocabulary_there_is_none(kind, tmp_path):
    kind.train(TEXTS).save(tmp_path)
    (tmp_path / "vocab.json").unlink()
    assert load_tokenizer(tmp_path) is None
