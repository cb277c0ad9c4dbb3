"""WordPiece: trained by its score, split greedily, and BERT's rules and files as transformers has them."""

import json
from collections import Counter

import pytest
from conftest import STORY_TEXTS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmfast.tokenizers import Tokenizer, WordPieceTokenizer, load_tokenizer
from llmfast.tokenizers.protocol import END_OF_TEXT
from llmfast.tokenizers.wordpiece import split_words
from llmfast.tokenizers.wordpiece_training import learn_tokens

TEXTS = [*STORY_TEXTS, "Unaffable (naïve) café: 日本語, don't stop! “Yes” 12%"]
# Parts of Unicode that are as they were when BERT's libraries made their tables.
RANGES = [(0, 0x5FF), (0x2000, 0x2E4F), (0x3000, 0x9FFF), (0x1F300, 0x1F64F)]
CHARACTERS = [st.characters(min_codepoint=a, max_codepoint=b, exclude_categories=("Cn",)) for a, b in RANGES]
ANY_TEXT = st.text(st.one_of(CHARACTERS), max_size=40) | st.text("abé ,.(日\t\n12'", max_size=40)
WORDS = st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 9), max_size=8)


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.train(TEXTS, vocab_size=100)


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("wordpiece")
    tokenizer.save(directory)
    return directory


# --- training ---------------------------------------------------------------------------------------------------


def naive_tokens(words: dict[str, int], alphabet: list[str], num_tokens: int, min_count: int | None) -> list[str]:
    """Counts every token and pair of the whole corpus anew for each join."""
    thresholds = None if min_count is None else [min_count]
    tokens = list(alphabet)
    spelled = [([word[0], *("##" + c for c in word[1:])], count) for word, count in words.items()]
    while len(tokens) < len(alphabet) + num_tokens:
        singles: Counter[str] = Counter()
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in spelled:
            for token in word:
                singles[token] += count
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        if thresholds is None:
            most = max(pairs.values(), default=0)
            thresholds = [most // 2**i for i in range(1, 20) if most // 2**i >= 2]
        while thresholds and not any(pairs[pair] >= thresholds[0] for pair in pairs):
            thresholds.pop(0)
        if not thresholds:
            break
        frequent = [pair for pair in pairs if pairs[pair] >= thresholds[0]]
        best = min(
            frequent,
            key=lambda p: (-(pairs[p] / (singles[p[0]] * singles[p[1]])), tokens.index(p[0]), tokens.index(p[1])),
        )
        joined = best[0] + best[1].removeprefix("##")
        tokens.append(joined)
        for word, _ in spelled:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [joined]
                i += 1
    return tokens[len(alphabet) :]


@settings(max_examples=150)
@given(WORDS, st.integers(0, 30), st.sampled_from([None, 1, 2, 5]))
def test_training_makes_the_tokens_of_the_naive_algorithm(words, num_tokens, min_count):
    alphabet = [form for c in "abc" for form in (c, f"##{c}")]
    assert learn_tokens(words, alphabet, num_tokens, min_count) == naive_tokens(words, alphabet, num_tokens, min_count)


def test_a_pair_that_hardly_occurs_apart_is_joined_before_a_frequent_one():
    seen = []
    words = {"the": 90, "ten": 40, "tea": 40, "quit": 5, "hen": 30, "hit": 20}
    alphabet = sorted({f for w in words for f in [w[0], *("##" + c for c in w)]})
    learn_tokens(words, alphabet, 1, min_count=2, on_merge=lambda *event: seen.append(event))
    assert seen == [(0, ("q", "##u"), 5 / (5 * 5))]


def test_the_vocabulary_is_specials_then_alphabet_then_pieces(tokenizer):
    assert tokenizer.tokens[:2] == ["[UNK]", END_OF_TEXT] and tokenizer.vocab_size == 100
    assert {"c", "##c", "日", ","} <= set(tokenizer.tokens)
    assert "##日" not in tokenizer.vocab and "##," not in tokenizer.vocab  # these stand alone


def test_training_does_not_depend_on_the_order_of_the_texts():
    assert WordPieceTokenizer.train(TEXTS, 150).tokens == WordPieceTokenizer.train(TEXTS[::-1], 150).tokens


def test_a_small_corpus_gives_a_smaller_vocabulary_and_a_small_vocabulary_the_commonest_characters():
    assert WordPieceTokenizer.train(["ab ab"], 1000, min_count=2).tokens[2:] == ["##a", "##b", "a", "b", "ab"]
    assert WordPieceTokenizer.train(["aab aac"], 5).tokens[2:] == ["##a", "a"]
    with pytest.raises(ValueError, match="vocab_size must be at least 4"):
        WordPieceTokenizer.train(TEXTS, 3)


# --- text and ids -----------------------------------------------------------------------------------------------


def test_the_longest_word_that_is_split_has_a_hundred_characters():
    tokenizer = WordPieceTokenizer.train(["ab" * 50, "ab" * 50], 20)
    assert "".join(tokenizer.tokens[i].removeprefix("##") for i in tokenizer.encode("ab" * 50)) == "ab" * 50
    assert tokenizer.encode("ab" * 50 + "a") == [tokenizer.unknown]
    learned = WordPieceTokenizer.train(["a" * 100, "b" * 101], 10).tokens  # from what encoding splits alone
    assert "##aa" in learned and not any("bb" in token for token in learned)


def test_a_word_is_split_greedily_the_longest_piece_first():
    tokens = ["[UNK]", END_OF_TEXT, "un", "##aff", "##able", "a", "##b", "ab", "##c", "abc", "##d"]
    made = WordPieceTokenizer(tokens)
    assert [tokens[i] for i in made.encode("unaffable abcd abd")] == [
        "un",
        "##aff",
        "##able",
        "abc",
        "##d",
        "ab",
        "##d",
    ]
    assert made.encode("abx") == [0] and made.encode("a" + "b" * 200) == [0]  # a word is unknown as a whole
    assert made.decode(made.encode("unaffable, abc")) == "unaffable [UNK] abc"


@given(st.lists(st.text("Thecatsdogruniplw", min_size=1, max_size=12), max_size=8))
def test_words_of_known_characters_round_trip_but_for_blanks(tokenizer, words):
    assert tokenizer.decode(tokenizer.encode("  ".join(words) + "\n")) == " ".join(words)


@given(ANY_TEXT)
def test_ids_round_trip_where_all_is_known(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    if tokenizer.unknown not in ids:
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


@given(st.lists(st.integers(0, 99), max_size=20))
def test_tokens_decode_one_by_one_and_the_first_blank_is_left_out(tokenizer, ids):
    content = b"".join(tokenizer.decode_bytes([i]) for i in ids)
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.decode(ids) == content.decode().removeprefix(" ")


def test_punctuation_comes_back_where_it_stood():
    text = "The cat (a dog) said: stop, now! 12% “Yes”."
    made = WordPieceTokenizer.train([text], 100)
    assert made.decode(made.encode(text)) == "The cat ( a dog) said: stop, now! 12% “ Yes”."


def test_end_of_text_is_ordinary_text_unless_allowed(tokenizer):
    special = tokenizer.encode(f"the cat{END_OF_TEXT}the", allow_special=True)
    assert special.count(tokenizer.end_of_text) == 1
    assert tokenizer.decode(special) == f"the cat{END_OF_TEXT} the"
    assert tokenizer.end_of_text not in tokenizer.encode(END_OF_TEXT)


def test_an_id_outside_the_vocabulary_is_named(tokenizer):
    with pytest.raises(ValueError, match="token id 100 is not in the vocabulary of 100"):
        tokenizer.decode([100])


def test_lowercase_takes_off_capitals_and_accents(tmp_path):
    made = WordPieceTokenizer.train(TEXTS, 150, lowercase=True)
    assert not any(c.isupper() for token in made.tokens[2:] for c in token)
    assert made.encode("NAÏVE Café") == made.encode("naive cafe")
    made.save(tmp_path)
    assert load_tokenizer(tmp_path).lowercase


# --- BERT's rules and files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face(directory):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


@settings(max_examples=200)
@given(ANY_TEXT)
@example(END_OF_TEXT)
def test_transformers_reads_the_files_and_agrees(tokenizer, hugging_face, text):
    ids = tokenizer.encode(text, allow_special=True)  # as transformers does
    assert hugging_face(text, add_special_tokens=False).input_ids == ids


@settings(max_examples=200)
@given(ANY_TEXT, st.booleans())
def test_words_are_split_as_bert_splits_them(text, lowercase):
    tokenizers = pytest.importorskip("tokenizers")
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    pieces = tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normalizer.normalize_str(text))
    assert list(split_words(text, lowercase)) == [piece for piece, _ in pieces]


def test_transformers_knows_the_special_tokens(tokenizer, hugging_face):
    assert hugging_face.eos_token_id == tokenizer.end_of_text and hugging_face.unk_token_id == tokenizer.unknown
    text = f"a cat{END_OF_TEXT}the dog"
    assert hugging_face(text, add_special_tokens=False).input_ids == tokenizer.encode(text, allow_special=True)


def test_it_fits_the_protocol_and_comes_back_from_its_files(tokenizer, directory):
    assert isinstance(tokenizer, Tokenizer)
    loaded = load_tokenizer(directory)
    assert type(loaded) is WordPieceTokenizer and loaded.tokens == tokenizer.tokens and not loaded.lowercase


def test_a_vocabulary_without_a_configuration_is_read(directory, tokenizer, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((directory / "vocab.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).tokens == tokenizer.tokens


@pytest.mark.parametrize("content", [b"", b"a\nb\n", b"[UNK]\na\na\n", b"\xff\n"])
def test_a_damaged_file_is_a_value_error_naming_it(directory, tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_bytes((directory / "tokenizer_config.json").read_bytes())
    with pytest.raises(ValueError, match="vocab.txt") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_configuration_is_named(directory, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((directory / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert load_tokenizer(tmp_path).lowercase  # BERT's default
