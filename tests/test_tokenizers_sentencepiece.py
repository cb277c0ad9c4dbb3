"""SentencePiece's byte-pair encoding against the library of that name, and its file."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.tokenizers import SentencePieceTokenizer, load_tokenizer
from llmfast.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, Piece
from llmfast.tokenizers.sentencepiece_file import packed, read

CORPUS = ["the cat sat on the mat and the dog sat on the cat", "a naïve café, 12 times 34", "aaaa aaaaaa bbbb"]
UNNORMALISED = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a model by the library; returns the library's processor and the directory of its file."""
    library = pytest.importorskip("sentencepiece")

    def train(**settings):
        directory, written = tmp_path_factory.mktemp("spm"), io.BytesIO()
        options = dict(model_type="bpe", vocab_size=330, byte_fallback=True, minloglevel=2) | UNNORMALISED | settings
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 5), model_writer=written, hard_vocab_limit=False, **options
        )
        (directory / "tokenizer.model").write_bytes(written.getvalue())
        return library.SentencePieceProcessor(model_proto=written.getvalue()), directory

    return train


@pytest.fixture(scope="module", params=[True, False], ids=["blank before", "none"])
def both(request, trained):
    processor, directory = trained(add_dummy_prefix=request.param)
    return SentencePieceTokenizer.load(directory), processor


@settings(max_examples=150)
@given(text=st.lists(st.one_of(st.text(max_size=6), st.sampled_from(["the ", "cat", "  ", "aaaaa", "▁", "</s>"]))))
def test_text_gives_the_librarys_ids(both, text):
    ours, theirs = both
    text = "".join(text).replace("\0", "")  # where theirs ends a text
    ids = ours.encode(text)
    assert ids == theirs.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    if "▁" not in text:
        assert ours.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_the_library_reads_what_is_written(both, tmp_path):
    library = pytest.importorskip("sentencepiece")
    ours, theirs = both
    ours.save(tmp_path)
    again = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (*CORPUS, "Ünknown 🎉", " two  blanks "):
        assert again.encode(text) == theirs.encode(text) == load_tokenizer(tmp_path).encode(text)


def test_a_directory_as_llama_2_has_it(trained, tmp_path):
    _, directory = trained()
    size = SentencePieceTokenizer.load(directory).vocab_size
    added = {str(size): {"content": "<|im_end|>", "special": True}, "1": {"content": "<s>", "special": True}}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": added,
        "eos_token": {"content": "<|im_end|>"},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.start_of_text, tokenizer.end_of_text) == (1, size)
    assert tokenizer.encode("the<|im_end|>", allow_special=True)[-1] == size
    assert size not in tokenizer.encode("the<|im_end|>")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).special_tokens == tokenizer.special_tokens


def test_an_unknown_character_without_bytes():
    tokenizer = SentencePieceTokenizer([Piece("<unk>", 0, UNKNOWN), Piece("a", 0, NORMAL)], space_prefix=False)
    assert tokenizer.encode("aba") == [1, 0, 1]
    assert tokenizer.decode([1, 0, 1]) == "a<unk>a"
    with pytest.raises(ValueError, match="token id 2 is not in the vocabulary of 2"):
        tokenizer.decode([2])


def test_a_byte_token_spelled_out_is_text():
    pieces = [
        Piece("<unk>", 0, UNKNOWN),
        *(Piece(f"<0x{b:02X}>", 0, BYTE) for b in range(256)),
        Piece("<s>", 0, CONTROL),
    ]
    tokenizer = SentencePieceTokenizer(pieces, space_prefix=False)
    assert tokenizer.encode("<0x41>") == [1 + byte for byte in b"<0x41>"]
    assert tokenizer.decode_bytes([1 + 0xE2]) == b"\xe2"


# --- files ------------------------------------------------------------------------------------------------------------

GOOD = packed([("<unk>", 0.0, UNKNOWN), ("a", -1.0, NORMAL), ("é", -2.5, NORMAL)], True)


@pytest.fixture
def directory(tmp_path):
    def write(content: bytes):
        (tmp_path / "tokenizer.model").write_bytes(content)
        return tmp_path

    return write


def test_a_file_is_read_as_it_was_written(directory):
    stored = read(directory(GOOD) / "tokenizer.model")
    assert stored.pieces == [("<unk>", 0.0, UNKNOWN), ("a", -1.0, NORMAL), ("é", -2.5, NORMAL)]
    assert stored.space_prefix and stored.named["eos_token"] == 2


@pytest.mark.parametrize("cut", range(1, len(GOOD)))
def test_a_cut_file_is_a_clear_error_or_another_vocabulary(directory, cut):
    try:
        SentencePieceTokenizer.load(directory(GOOD[:cut]))
    except ValueError as error:
        assert "tokenizer.model is not a tokenizer that can be used: " in str(error) and "\n" not in str(error)


@given(noise=st.binary(max_size=60))
def test_noise_is_a_clear_error(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "tokenizer.model"
    path.write_bytes(noise)
    try:
        SentencePieceTokenizer.load(path.parent)
    except ValueError as error:
        assert "is not a tokenizer that can be used" in str(error)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no pieces"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged"),  # a length of 2^63
        (b"IQ== 0\nIg== 1\n", "holds no pieces"),  # tiktoken's
        (GOOD.replace(b"\x12\x05\x18\x02", b"\x12\x05\x18\x01"), "not byte-pair encoding"),
        (GOOD.replace(b"\x20\x00\x28\x01", b"\x20\x01\x28\x01"), "normalises text"),
    ],
)
def test_what_is_not_computed_here_is_an_error(directory, content, message):
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer.load(directory(content))
