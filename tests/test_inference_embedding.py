"""Texts to vectors: pooled as a model's files say, the same in any company, and those of sentence-transformers."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file
from test_cli import run

import llmfast
from llmfast.inference.embedding import Embedder, batches
from llmfast.inference.pooling import Pooling, read_pooling
from llmfast.models.bert import Bert, BertConfig
from llmfast.tokenizers import WordPieceTokenizer
from llmfast.weights.checkpoint import stream
from llmfast.weights.loading import encoder_of

TEXTS = ["the cat sat on the mat", "a dog", "", "the dog sat", "one long text: the mat, the cat, a dog, the cat again"]
WORDS = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "a", "dog"]
WORDS += ["one", "long", "text", "again", ":", ","]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The directory of a random encoder that reads 10 tokens."""
    directory = tmp_path_factory.mktemp("encoder")
    write_encoder(directory, context=10, positions=32)
    return directory


def write_encoder(directory, context, positions=256):
    """A random encoder with sentence-transformers' files."""
    torch.manual_seed(5)
    config = BertConfig(len(WORDS), 24, 2, 3, 40, max_position_embeddings=positions, initializer_range=0.5)
    model = Bert(config).eval()
    bare = {name.removeprefix("bert."): tensor for name, tensor in model.state_dict().items()}
    save_file(bare, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config.to_document()))
    WordPieceTokenizer(WORDS, lowercase=True).save(directory)
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    steps = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in steps]
    (directory / "modules.json").write_text(json.dumps(steps))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": context}))


def hidden_states(directory):
    return encoder_of(stream(directory), torch.float32)


def test_a_vector_is_the_mean_of_its_tokens_alone_or_in_company(tiny):
    embedder = Embedder(tiny)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vectors = embedder.embed(TEXTS)
    assert "1 of 5 texts are longer than 10 tokens" in str(caught[0].message)
    assert vectors.shape == (5, 24) and vectors.dtype == torch.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = [1, *embedder.tokenizer.encode(text)][:9] + [2]
        with torch.no_grad():
            mean = hidden_states(tiny)(torch.tensor([ids]))[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.embed("a dog"), vectors[1], rtol=0, atol=1e-5)
    assert embedder.count("a dog") == 4


def test_no_texts_are_no_vectors(tiny):
    assert Embedder(tiny).embed([]).shape == (0, 24)


def test_pooling_and_length_can_be_chosen(tiny):
    first, last = Embedder(tiny, "first", max_tokens=5), Embedder(tiny, "last", max_tokens=5)
    with pytest.warns(UserWarning, match="longer than 5"):
        vector = first.embed(TEXTS[0])
    with torch.no_grad():
        hidden = hidden_states(tiny)(torch.tensor([[1, 3, 4, 5, 2]]))[0]
    torch.testing.assert_close(vector, hidden[0] / hidden[0].norm(), rtol=0, atol=1e-5)
    with pytest.warns(UserWarning):
        torch.testing.assert_close(last.embed(TEXTS[0]), hidden[4] / hidden[4].norm(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="max_tokens must be 3 to 32"):
        Embedder(tiny, max_tokens=33)
    with pytest.raises(ValueError, match="pooling must be mean, first, last"):
        Embedder(tiny, "max")


def test_any_decoder_gives_vectors_too(storyteller, storyteller_directory):
    embedder, last = Embedder(storyteller_directory), Embedder(storyteller_directory, "last")
    texts = ["The cat liked to sleep.", "A bird", "Once upon a time there was a little cat."]
    vectors, ends = embedder.embed(texts), last.embed(texts)
    for text, vector, end in zip(texts, vectors, ends, strict=True):
        ids = torch.tensor([storyteller.tokenizer.encode(text)])
        with torch.no_grad():
            hidden = storyteller.model.hidden(ids)[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-5)
        torch.testing.assert_close(end, hidden[-1] / hidden[-1].norm(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="an empty one has no vector"):
        embedder.embed([""])


def test_batches_are_of_near_lengths_and_hold_each_text_once():
    lengths = [3, 50, 1, 7, 7, 20, 8, 2]
    found = list(batches(lengths, 40))
    assert sorted(i for batch in found for i in batch) == list(range(8))
    assert [lengths[i] for batch in found for i in batch] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= 40 for batch in found)


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("modules.json", [{"type": "a.Dense", "path": "2_Dense"}], "a step Dense, which is not computed"),
        ("modules.json", [{"type": "a.Pooling", "path": "../other"}], "outside of its own"),
        ("modules.json", {"type": 3}, "is no list of steps"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "asks for pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "asks for no pooling"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length should be a number"),
    ],
)
def test_what_its_files_say_and_is_not_computed_is_named(tiny, tmp_path, file, content, said):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    (copy / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        Embedder(copy)


def test_pooling_is_read_in_its_new_spelling(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.y.Pooling", "path": "1_Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls", "include_prompt": True}))
    assert read_pooling(tmp_path) == Pooling("first", normalised=False)
    assert read_pooling(tmp_path / "nowhere") == Pooling("mean", True)


def test_bad_input_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="texts must be strings, got int"):
        Embedder(tiny).embed([3])
    with pytest.raises(ValueError, match="precision must be fp32, bf16"):
        Embedder(tiny, precision="int3")
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    words = [word for word in WORDS if word != "[SEP]"] + ["extra"]
    (copy / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match=r"lacks \[SEP\]"):
        Embedder(copy)


def test_the_command_prints_a_vector_a_line(tiny, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("a dog\n\nthe cat sat\n")
    result = run("embed", str(file), "--model", str(tiny), "--json")
    assert result.code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["a dog", "the cat sat"]
    expected = Embedder(tiny).embed("a dog").tolist()
    assert lines[0]["vector"] == pytest.approx(expected, abs=1e-5)
    assert "… (24)  the cat sat" in run("embed", str(file), "--model", str(tiny)).stdout
    whole = run("embed", str(file), "--model", str(tiny), "--json", "--whole").stdout
    assert json.loads(whole)["text"] == "a dog\n\nthe cat sat\n"


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe\xff"])
def test_a_file_without_text_is_one_line(tiny, tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    result = run("embed", str(file), "--model", str(tiny))
    assert result.code == 2 and len(result.stderr.splitlines()) == 1 and "notes.txt" in result.stderr


def test_minilm_gives_the_vectors_of_sentence_transformers(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["How do I reset it?", "Hold the button for ten seconds.", "naïve café 日本 [x]", "", "word " * 400]
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    theirs.max_seq_length = 256
    with pytest.warns(UserWarning, match="1 of 5 texts are longer than 256"):
        ours = llmfast.Embedder("minilm").embed(texts)
    expected = theirs.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_minilm_finds_what_means_the_same(minilm):
    texts = ["A dog barks.", "The hound is loud.", "Interest rates rose."]
    vectors = Embedder("minilm").embed(texts)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    print(near)
    assert near > 0.4 > far
