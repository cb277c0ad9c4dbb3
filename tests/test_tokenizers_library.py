"""`tokenizer.json` of other people's models: the same ids as transformers, and no token from text that spells it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.tokenizers import BPETokenizer, load_tokenizer
from llmfast.tokenizers.library import LibraryTokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

CORPUS = ["the cat sat on the mat", "a naïve café has 12 cats", "who is it? it's me: THE DOG"] * 3
SPECIAL = [
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("</s>", special=True, normalized=False),
    AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
    AddedToken("<mask>", special=True, normalized=False, lstrip=True),
]


def trained(model, trainer, special=SPECIAL, **parts) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(special)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made = trained(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return made


def metaspace(scheme: str) -> Tokenizer:
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>"], initial_alphabet=["▁"], show_progress=False
    )
    made = trained(
        models.BPE(unk_token="<unk>"), trainer, [], pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme)
    )
    document = json.loads(made.to_str())
    vocab = document["model"]["vocab"]
    vocab |= {name: len(vocab) + i for i, name in enumerate(byte_names)}
    document["model"] |= {"byte_fallback": True}
    document["added_tokens"] = document["added_tokens"][:1]
    made = Tokenizer.from_str(json.dumps(document))
    made.add_tokens(SPECIAL)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def word_piece() -> Tokenizer:
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
    )


MAKERS = {
    "bytes": byte_level,
    "blank first": lambda: metaspace("first"),
    "blanks": lambda: metaspace("always"),
    "no blank": lambda: metaspace("never"),
    "words": word_piece,
}


@pytest.fixture(scope="module", params=MAKERS)
def both(request, tmp_path_factory):
    """One of ours and one of theirs, from the same files."""
    directory = tmp_path_factory.mktemp("library")
    made = MAKERS[request.param]()
    made.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)


NAMES = ["<s>", "</s>", "<|end|>", "<mask>", "<unk>"]
TEXTS = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(["the ", " cat", "  ", "\n", "<tool>", "é", "🎉"])))


@settings(max_examples=100)
@given(parts=TEXTS)
def test_text_gives_transformers_ids(both, parts):
    ours, theirs = both
    text = "".join(parts)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@settings(max_examples=100)
@given(parts=st.lists(st.one_of(st.text(max_size=4), st.sampled_from([*NAMES[:4], " ", "the cat"]))))
def test_special_tokens_where_they_may_be(both, parts):
    ours, theirs = both
    text = "".join(parts)
    assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)


@settings(max_examples=60)
@given(parts=st.lists(st.one_of(st.text(max_size=4), st.sampled_from(NAMES))))
def test_text_never_becomes_a_special_token(both, parts):
    ours, _ = both
    unknown = {ours.special_tokens.get(name) for name in ("<unk>", "[UNK]")}
    assert not ({*ours.special_tokens.values()} - unknown) & {*ours.encode("".join(parts))}


def test_tokens_are_decoded_one_by_one(both):
    ours, theirs = both
    for text in ("the cat sat", "a mat", "it"):
        ids = ours.encode(text)
        assert b"".join(ours.decode_bytes([i]) for i in ids) == ours.decode_bytes(ids)
        assert ours.decode(ids) == theirs.decode(ids)
    assert [ours.decode_bytes([i]) for i in ours.special_tokens.values()] == [n.encode() for n in ours.special_tokens]
    with pytest.raises(ValueError, match=f"token id {ours.vocab_size} is not in the vocabulary of {ours.vocab_size}"):
        ours.decode([ours.vocab_size])


def test_a_character_of_several_bytes_comes_byte_by_byte():
    ours = LibraryTokenizer(metaspace("always"))
    ids = ours.encode("🎉")
    assert [ours.decode_bytes([i]) for i in ids[-4:]] == [bytes([byte]) for byte in "🎉".encode()]


def test_what_begins_and_ends_a_text(both):
    ours, theirs = both
    starts = theirs.encode("the")[:1] == [theirs.bos_token_id]
    assert ours.start_of_text == (theirs.bos_token_id if starts else None)
    assert ours.end_of_text == theirs.eos_token_id
    assert ours.end_tokens == {ours.special_tokens["</s>"], ours.special_tokens["<|end|>"]}


@pytest.mark.parametrize("says, starts", [(True, True), (False, False), (None, True)])
def test_the_configuration_has_the_last_word_on_the_beginning(says, starts):
    config = {"bos_token": {"content": "<s>"}} | ({} if says is None else {"add_bos_token": says})
    made = byte_level()
    assert LibraryTokenizer(made, config).start_of_text == (made.token_to_id("<s>") if starts else None)


def test_it_travels_with_its_model(both, tmp_path):
    ours, _ = both
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "the <s> cat <|end|>  é 🎉 <tool>"
    assert again.encode(text) == ours.encode(text)
    assert again.encode(text, True) == ours.encode(text, True)
    assert (again.special_tokens, again.end_of_text) == (ours.special_tokens, ours.end_of_text)


def test_a_long_text_is_not_cut(tmp_path):
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=9)
    assert (
        len(LibraryTokenizer(made).encode("the cat sat on the mat"))
        == len(byte_level().encode("the cat sat on the mat").ids) - 1
    )


def test_files_that_say_no_more_than_ours_are_read_as_ours(tmp_path):
    BPETokenizer.train(CORPUS, 280, split="gpt4").save(tmp_path)
    assert type(load_tokenizer(tmp_path)) is BPETokenizer
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    changes = {
        "normalizer": {"type": "NFC"},
        "added_tokens": [document["added_tokens"][0] | {"special": False}],
        "model": document["model"] | {"ignore_merges": True},
    }
    for key, value in changes.items():
        (tmp_path / "tokenizer.json").write_text(json.dumps(document | {key: value}))
        assert type(load_tokenizer(tmp_path)) is LibraryTokenizer, key


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {"a": -1}}}'])
def test_a_damaged_file_is_one_clear_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_decoder_that_is_not_known(tmp_path):
    made = byte_level()
    made.decoder = decoders.CTC()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="its decoder CTC is not known here"):
        load_tokenizer(tmp_path)


def template_of(directory, **files) -> str | None:
    byte_level().save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        path = directory / {"config": "tokenizer_config.json", "jinja": "chat_template.jinja"}[name]
        path.write_text(content if name == "jinja" else json.dumps(content))
    return load_tokenizer(directory).chat_template


def test_where_a_chat_template_is_found(tmp_path):
    assert template_of(tmp_path) is None
    assert template_of(tmp_path, config={"chat_template": "one"}) == "one"
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert template_of(tmp_path, config={"chat_template": several}) == "three"
    assert template_of(tmp_path, config={"chat_template": "one"}, jinja="four") == "four"
    with pytest.raises(ValueError, match="larger than a chat template may be"):
        template_of(tmp_path, jinja="x" * (1 << 20 | 1))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat_template should be a string"):
        template_of(tmp_path, config={"chat_template": 5})
