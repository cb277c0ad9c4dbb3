"""Tokenizers from GGUF metadata: against llama.cpp's vectors, against transformers, and from hostile files."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.tokenizers import BPETokenizer, load_tokenizer
from llmfast.tokenizers.byte_letters import printable
from llmfast.tokenizers.gguf import tokenizer_of
from llmfast.weights.gguf import GGUFFile

tokenizers = pytest.importorskip("tokenizers")
VECTORS = Path(__file__).parents[2] / "shared" / "vocab"
SEPARATOR = "\n__ggml_vocab_test__\n"

# --- vocabularies -----------------------------------------------------------------------------------------------------

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(split: str, corpus: str = "the cat sat on the mats, 1234 times; it's we'll Ｈｅ", **changes) -> dict:
    """Metadata of a small vocabulary, trained here, with control tokens before it and a user-defined one behind."""
    own = BPETokenizer.train([corpus] * 3, 300)
    ordinary = [printable(token) for token, _ in sorted(own.vocab.items(), key=lambda item: item[1])]
    tokens = [*CHAT_TOKENS, *ordinary, "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * len(ordinary) + [4],
        "tokenizer.ggml.merges": [f"{printable(left)} {printable(right)}" for left, right in own.merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2**32 - 1,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def pieces(**changes) -> dict:
    """Metadata of a small SentencePiece vocabulary, with the scores that its trainer would give: by their order."""
    joined = ["▁t", "he", "▁the", "▁a", "at", "▁▁", "aa", "aaa", "▁the▁", "é"]
    letters = [*"▁thecasnoimdu", "e\u0301"[1]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *letters, "<user>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(joined) + len(letters))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(joined) + len(letters)) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


# --- llama.cpp's vectors ----------------------------------------------------------------------------------------------


def vectors(name: str) -> list[tuple[str, list[int]]]:
    texts = (VECTORS / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    lines = (VECTORS / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    cases = list(zip(texts.split(SEPARATOR), [[int(i) for i in line.split()] for line in lines], strict=True))
    assert len(cases) == 47
    return cases


@pytest.mark.skipif(not VECTORS.exists(), reason="llama.cpp's vocabularies are not at hand")
@pytest.mark.parametrize("name", ["gpt-2", "starcoder", "refact", "llama-spm", "phi-3"])
def test_llama_cpps_vectors(name):
    tokenizer = tokenizer_of(GGUFFile(VECTORS / f"ggml-vocab-{name}.gguf").metadata)
    for text, ids in vectors(name):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def of_ranks(lines: bytes, split: str) -> dict:
    """The metadata of a vocabulary in tiktoken's form, a token and its rank a line: its merges, where there are any."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines.splitlines())}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            first = min(range(len(joined)), key=joined.__getitem__)
            if joined[first] >= rank:
                break  # one that only `ignore_merges` makes
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        merges += [f"{printable(parts[0])} {printable(parts[1])}"] if len(parts) == 2 else []
    tokens = [printable(token) for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }


@pytest.mark.slow
@pytest.mark.skipif(not VECTORS.exists(), reason="llama.cpp's vectors are not at hand")
@pytest.mark.parametrize(
    "name, package, file",
    [
        ("llama-bpe", "llama_models", "llama3/tokenizer.model"),
        ("qwen2", "dashscope", "resources/qwen.tiktoken"),
    ],
)
def test_llama_cpps_vectors_with_vocabularies_of_other_packages(name, package, file):
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"the package {package} is not installed, which carries the vocabulary")
    ranks = (Path(found.submodule_search_locations[0]) / file).read_bytes()
    tokenizer = tokenizer_of(of_ranks(ranks, name))
    for text, ids in vectors(name):
        assert tokenizer.encode(text) == ids, text


# --- against transformers ---------------------------------------------------------------------------------------------


def in_their_words(split: str):
    """How the families' own tokenizer.json split a text."""
    t = tokenizers.pre_tokenizers
    digits = t.Sequence([t.Digits(individual_digits=True), t.ByteLevel(add_prefix_space=False)])
    if split in ("smollm", "starcoder", "refact"):
        return digits
    if split == "gpt-2":
        return t.ByteLevel(add_prefix_space=False)
    numbers = r"\p{N}{1,3}" if split == "llama-bpe" else r"\p{N}"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return t.Sequence(
        [t.Split(tokenizers.Regex(pattern), "isolated"), t.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@pytest.fixture(scope="module", params=["gpt-2", "starcoder", "refact", "smollm", "llama-bpe", "qwen2"])
def both(request):
    """One of ours, and transformers' with the same vocabulary, put together by hand."""
    transformers = pytest.importorskip("transformers")
    metadata = byte_level(request.param)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab, merges, ignore_merges=request.param == "llama-bpe")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = in_their_words(request.param)
    if request.param == "qwen2":
        raw.normalizer = tokenizers.normalizers.NFC()
    raw.decoder = tokenizers.decoders.ByteLevel()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)
    theirs.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    theirs.add_tokens(["<tool>"])
    return tokenizer_of(metadata), theirs


TEXTS = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from(
            ["the cat", " sat", "it's", "WE'LL", " ", "\n", "\r\n ", "\t", "123456", "½²", "<tool>", "e\u0301"]
        ),
    )
).map("".join)


@settings(max_examples=150)
@given(text=TEXTS)
def test_text_gives_transformers_ids(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids)
    assert b"".join(ours.decode_bytes([i]) for i in ids) == ours.decode_bytes(ids)


@settings(max_examples=60)
@given(parts=st.lists(st.one_of(TEXTS, st.sampled_from(CHAT_TOKENS))))
def test_with_special_tokens_too(both, parts):
    ours, theirs = both
    assert ours.encode("".join(parts), allow_special=True) == theirs.encode("".join(parts), add_special_tokens=False)


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [byte_level("smollm"), byte_level("llama-bpe"), pieces()], ids=["bpe", "l", "spm"])
@given(
    parts=st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*CHAT_TOKENS, "<s>", "</s>", "<unk>", "<0x41>"])))
)
def test_text_never_becomes_a_control_token(metadata, parts):
    tokenizer = tokenizer_of(metadata)
    text = "".join(parts)
    ids = tokenizer.encode(text)
    kinds = metadata["tokenizer.ggml.token_type"]
    assert not any(kinds[i] == 3 for i in ids)
    assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_a_control_token_that_is_one_word_is_spelled_by_its_letters():
    """With `ignore_merges` a chunk that is a token is this token; a control token must be none of these."""
    tokens = [printable(bytes([byte])) for byte in range(256)]
    metadata = byte_level("llama-bpe", tokens=[*tokens, "STOP"], token_type=[1] * 256 + [3], merges=[])
    tokenizer = tokenizer_of(metadata)
    assert tokenizer.encode("STOP it") == [*b"STOP it"]
    assert tokenizer.encode("STOP it", allow_special=True) == [256, *b" it"]


def test_special_tokens_are_made_where_they_are_allowed():
    tokenizer = tokenizer_of(byte_level("smollm"))
    text = "<|im_start|>user\n<|im_end|><|im_end|>"
    plain = tokenizer.encode("<|im_end|>")
    assert tokenizer.encode(text, [(0, 12), (27, 37)]) == [1, *tokenizer.encode("user\n<|im_end|>"), 2]
    assert tokenizer.encode(text, []) == tokenizer.encode(text)
    assert 2 not in plain and len(plain) > 3
    with pytest.raises(ValueError, match=r"span \(1, 5\) is no special token"):
        tokenizer.encode(text, [(1, 5)])


def test_bytes_that_are_no_letters_stand_for_themselves():
    """A character of four bytes, and the texts before it, of a vocabulary that joins neither."""
    tokenizer = tokenizer_of(pieces())
    names = {i: token for i, token in enumerate(tokenizer.pieces)}
    ids = tokenizer.encode("the 🎉")
    assert [names[i].text for i in ids] == ["▁the▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"]
    assert [tokenizer.decode_bytes([i]) for i in ids[1:]] == [bytes([b]) for b in "🎉".encode()]


def test_the_best_pair_is_joined_first_and_of_equals_the_first():
    tokenizer = tokenizer_of(pieces())
    shown = [tokenizer.pieces[i].text for i in tokenizer.encode("aaaa the")]
    assert shown == ["▁a", "aaa", "▁the"]  # ▁a is better than aa


def test_user_defined_tokens_and_the_blank_before_what_follows():
    tokenizer = tokenizer_of(pieces())
    shown = [tokenizer.pieces[i].text for i in tokenizer.encode("a<user>a")]
    assert shown == ["▁a", "<user>", "▁a"]
    plain = tokenizer_of(pieces(add_space_prefix=False))
    assert [plain.pieces[i].text for i in plain.encode("a<user>a")] == ["a", "<user>", "a"]
    assert plain.decode(plain.encode(" a")) == " a"


@pytest.mark.parametrize(
    "metadata, start",
    [
        (byte_level("smollm"), None),
        (byte_level("smollm", add_bos_token=True), 1),
        (byte_level("llama-bpe"), 1),
        (byte_level("llama-bpe", add_bos_token=False), None),
        (pieces(), 1),
        (pieces(add_bos_token=False), None),
    ],
)
def test_what_begins_and_ends_a_text(metadata, start):
    tokenizer = tokenizer_of(metadata)
    assert tokenizer.start_of_text == start
    if metadata["tokenizer.ggml.model"] == "gpt2":
        assert (tokenizer.end_of_text, tokenizer.end_tokens) == (0, {0, 2})
    else:
        assert (tokenizer.end_of_text, tokenizer.end_tokens) == (2, {2})


def test_qwen_composes_characters():
    tokenizer = tokenizer_of(byte_level("qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert tokenizer_of(byte_level("smollm")).encode("e\u0301") != tokenizer.encode("é")


def test_it_travels_with_its_model(tmp_path):
    template = "{{ messages }}"
    for metadata in (
        byte_level("smollm"),
        byte_level("qwen2"),
        byte_level("llama-bpe"),
        pieces(),
        pieces(add_space_prefix=False),
    ):
        made = tokenizer_of(metadata | {"tokenizer.chat_template": template})
        made.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert type(loaded) is type(made)
        for text in ("It's 12345 <|im_end|> <tool> e\u0301 🎉", " the  cat<user>"):
            for allow in (False, True):
                assert loaded.encode(text, allow) == made.encode(text, allow)
        for fact in ("special_tokens", "start_of_text", "end_of_text", "end_tokens", "vocab_size", "chat_template"):
            assert getattr(loaded, fact) == getattr(made, fact), fact


# --- hostile files ----------------------------------------------------------------------------------------------------

BAD = {
    "model": ("bert", "model 'bert' is not known"),
    "pre": ("mine", "pre 'mine' is not known here, only gpt-2"),
    "tokens": (["a", "b", "a"], "token_type is of"),
    "token_type": ([1, 2], "token_type is of 2 tokens"),
    "merges": (["the cat"], "merges does not fit"),
    "bos_token_id": (10**6, "bos_token_id is 1000000, but there are"),
    "eos_token_id": ("2", "eos_token_id should be of the type int"),
    "add_bos_token": (1, "add_bos_token should be of the type bool"),
}


@pytest.mark.parametrize("key", BAD)
def test_one_clear_line(key):
    value, message = BAD[key]
    with pytest.raises(ValueError, match=message):
        tokenizer_of(byte_level("smollm", **{key: value}))


@pytest.mark.parametrize(
    "value, message",
    [
        ("text", "should be a list"),
        ([1, 2], "should be a list"),
        (None, "should be a list"),
        (["a", "b", "a"], "token_type is of"),
        (["x" * 70000], "70000 characters"),
    ],
)
def test_tokens_of_the_wrong_kind(value, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_of(byte_level("smollm", tokens=value))


@pytest.mark.parametrize("make", [lambda **c: byte_level("smollm", **c), pieces])
def test_tokens_that_are_named_twice(make):
    with pytest.raises(ValueError, match="'a' twice"):
        tokenizer_of(make(tokens=["a", "b", "a"], token_type=[1, 1, 1], scores=[0.0, 0.0, 0.0], merges=[]))


@pytest.mark.parametrize("count", [10**7, 2**21 + 1])
def test_too_many_tokens_are_never_read(count):
    class Endless:
        def __len__(self):
            return count

        def tolist(self):
            raise AssertionError("read")

    with pytest.raises(ValueError, match="at most 2097152 values"):
        tokenizer_of(byte_level("smollm", tokens=Endless()))


def test_scores_and_bytes_that_do_not_fit():
    with pytest.raises(ValueError, match="scores is of 1 tokens"):
        tokenizer_of(pieces(scores=[0.0]))
    count = len(pieces()["tokenizer.ggml.tokens"])
    with pytest.raises(ValueError, match="not finite"):
        tokenizer_of(pieces(scores=[float("nan")] * count))
    with pytest.raises(ValueError, match="neither a token for every byte"):
        tokenizer_of(pieces(token_type=[1] * count))


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges"])
def test_what_is_missing_is_named(key):
    metadata = byte_level("smollm")
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ValueError, match=rf"no tokenizer\.ggml\.{key}"):
        tokenizer_of(metadata)
