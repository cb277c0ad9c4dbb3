"""Files to prepared data: what the shards hold, which documents are kept out, and that a half is never one."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.cli import cli
from llmfast.tokenizers import CharTokenizer, load_tokenizer
from llmfast.training import encoding
from llmfast.training import prepare as prepare_module
from llmfast.training.dataset import TokenDataset
from llmfast.training.division import Corpus, Division
from llmfast.training.manifest import Manifest
from llmfast.training.prepare import prepare

END = "<|endoftext|>"
STORIES = [f"Story {i}: the {'cat' if i % 2 else 'dog'} saw {i * 7} birds." for i in range(60)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{END}\n".join(STORIES), "utf-8")
    return path


def documents(directory, split) -> list[str]:
    """What a split holds, decoded, by document."""
    dataset, tokenizer = TokenDataset.open(directory, split), load_tokenizer(directory)
    text = tokenizer.decode(dataset.window(0, dataset.num_tokens))
    return text.removesuffix(END).split(END)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_every_document_is_on_one_side_and_nothing_is_lost(corpus, tmp_path, kind):
    manifest = prepare([corpus], tmp_path / "data", kind, validation=0.2)
    train, validation = documents(tmp_path / "data", "train"), documents(tmp_path / "data", "validation")
    assert sorted(train) == sorted(set(STORIES) & set(train)) and len(train + validation) == len(STORIES)
    if kind != "word":  # words of the validation documents may be unknown
        assert sorted(train + validation) == sorted(STORIES)
    assert 5 <= len(validation) <= 15 and len(train) == 60 - len(validation)
    assert manifest == Manifest.read(tmp_path / "data")
    assert (manifest.tokenizer, manifest.dtype, manifest.split_by) == (kind, "uint16", "document")
    for name, split in manifest.splits.items():
        assert split.documents == len(documents(tmp_path / "data", name))
        assert TokenDataset.open(tmp_path / "data", name).num_tokens == split.tokens
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(text.encode()) for text in STORIES)
    TokenDataset.open(tmp_path / "data").verify()


def test_the_tokenizer_does_not_see_what_is_kept_out(tmp_path):
    files = []
    for i, letter in enumerate("abcdefghij"):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(letter * 100)
    prepare(files, tmp_path / "data", "char", validation=0.1)
    known = set("abcdefghij") & set(load_tokenizer(tmp_path / "data").vocab)
    assert len(known) == 9 and documents(tmp_path / "data", "validation") == ["\ufffd" * 100]


def test_a_lone_document_is_cut_and_has_no_end(tmp_path):
    text = "".join(f"Line {i}.\n" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    manifest = prepare([tmp_path / "book.txt"], tmp_path / "data", "char", validation=0.1)
    cut = int(0.9 * len(text))
    assert documents(tmp_path / "data", "train") == [text[:cut]]
    assert documents(tmp_path / "data", "validation") == [text[cut:]]
    assert manifest.split_by == "the last 10% of the only document"
    assert [split.tokens for split in manifest.splits.values()] == [cut, len(text) - cut]


def test_nothing_is_kept_out_where_none_is_asked_for(corpus, tmp_path):
    manifest = prepare([corpus], tmp_path / "data", "char", validation=0)
    assert list(manifest.splits) == ["train"] and documents(tmp_path / "data", "train") == STORIES


def test_the_last_documents_are_kept_out_where_that_is_asked_for(corpus, tmp_path):
    manifest = prepare([corpus], tmp_path / "data", "char", validation_documents=7)
    assert documents(tmp_path / "data", "train") == STORIES[:-7]
    assert documents(tmp_path / "data", "validation") == STORIES[-7:]
    assert manifest.split_by == "the last 7 documents"
    assert [split.documents for split in manifest.splits.values()] == [53, 7]
    with pytest.raises(ValueError, match="there are 60 documents: keeping the last 60 out leaves none"):
        prepare([corpus], tmp_path / "none", "char", validation_documents=60)


def test_a_prompt_is_seen_but_is_no_target(tmp_path):
    records = [{"prompt": "2+2=", "completion": "4!"}, {"text": "plain"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    manifest = prepare([tmp_path / "a.jsonl"], tmp_path / "data", "char", validation=0)
    dataset, tokenizer = TokenDataset.open(tmp_path / "data"), load_tokenizer(tmp_path / "data")
    assert tokenizer.decode(dataset.window(0, 13)) == f"2+2=4!{END}plain{END}"
    assert dataset.targets(0, 13)[:5].tolist() == [-100] * 4 + [tokenizer.vocab["4"]]
    assert (dataset.targets(4, 9) == dataset.window(4, 9)).all()
    assert manifest.splits["train"].bytes == len("4!plain")
    dataset.verify()


def test_the_end_of_text_in_a_document_is_not_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"a{END}b"}))
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", "char", validation=0)
    ids = TokenDataset.open(tmp_path / "data").window(0, 16)
    assert (ids == load_tokenizer(tmp_path / "data").end_of_text).tolist() == [False] * 15 + [True]


def test_shards_hold_as_many_tokens_as_asked_and_are_one_stream(corpus, tmp_path):
    whole = prepare([corpus], tmp_path / "whole", "char", validation=0)
    cut = prepare([corpus], tmp_path / "cut", "char", validation=0, shard_tokens=100)
    sizes = [shard.tokens for shard in cut.splits["train"].shards]
    assert sizes[:-1] == [100] * (len(sizes) - 1) and 0 < sizes[-1] <= 100
    n = whole.splits["train"].tokens
    one, many = TokenDataset.open(tmp_path / "whole"), TokenDataset.open(tmp_path / "cut")
    assert sum(sizes) == n and (one.window(0, n) == many.window(0, n)).all()


def test_large_vocabularies_take_four_bytes(tmp_path):
    characters = "".join(chr(code) for code in [*range(0x20, 0xD800), *range(0x10000, 0x13000)])
    (tmp_path / "a.txt").write_text(characters, "utf-8")
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "data", "char", validation=0)
    assert manifest.dtype == "uint32" and manifest.vocab_size > 1 << 16
    assert "".join(documents(tmp_path / "data", "train")) == characters


def test_the_result_depends_on_the_seed_but_not_on_the_processes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 200)  # so that there are batches to share
    for name, workers, seed in [("one", 1, 0), ("three", 3, 0), ("other", 1, 1)]:
        prepare([corpus], tmp_path / name, "bpe", 280, workers=workers, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert documents(tmp_path / "one", "validation") != documents(tmp_path / "other", "validation")


def test_a_given_tokenizer_is_used_and_saved(corpus, tmp_path):
    tokenizer = CharTokenizer.train(STORIES + ["☃"])
    tokenizer.save(tmp_path / "tokenizer")
    for name, given_tokenizer in [("object", tokenizer), ("path", tmp_path / "tokenizer")]:
        prepare([corpus], tmp_path / name, given_tokenizer)
        assert load_tokenizer(tmp_path / name).tokens == tokenizer.tokens


def test_the_tokenizer_of_an_embedded_model_is_known_by_its_name(corpus, tmp_path):
    assert prepare([corpus], tmp_path / "data", "stories").vocab_size == 4000
    assert sorted(documents(tmp_path / "data", "train") + documents(tmp_path / "data", "validation")) == sorted(STORIES)


def test_progress_is_told_of_every_stage_up_to_its_end(corpus, tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}
    prepare([corpus], tmp_path / "data", progress=lambda stage, *counts: seen.setdefault(stage, []).append(counts))
    assert list(seen) == ["reading", "training the tokenizer", "encoding"]
    done, total = seen["encoding"][-1]
    assert done == total == sum(len(text.encode()) for text in STORIES)


# --- the division -----------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 1000)), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
)
def test_the_division_keeps_out_about_the_share_and_equal_documents_stay_together(corpus_documents, share):
    corpus = Corpus()
    sizes = {}
    for key, size in corpus_documents:
        size = sizes.setdefault(key, size)  # equal documents are equally long
        corpus.hashes.append(key)
        corpus.sizes.append(size)
        corpus.bytes += size
    if len(sizes) == 1:
        with pytest.raises(ValueError, match="are the same"):
            Division(corpus, share)
        return
    division = Division(corpus, share)
    kept_out = division._kept_out
    assert 0 < kept_out.sum() < len(kept_out)
    assert division.documents == {"train": (~kept_out).sum(), "validation": kept_out.sum()}
    assert all(len({bool(k) for k, key in zip(kept_out, corpus.hashes, strict=True) if key == h}) == 1 for h in sizes)
    shares = [corpus.hashes.count(key) * size / corpus.bytes for key, size in sizes.items()]
    actual = sum(np.array(corpus.sizes)[kept_out]) / corpus.bytes
    assert actual <= max(share, min(shares)) + 1e-9


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_a_preparation_that_fails_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        prepare([corpus], tmp_path / "data", "char")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories.txt"]


def test_a_replacement_that_fails_leaves_the_old_data(corpus, tmp_path, monkeypatch):
    prepare([corpus], tmp_path / "data", "char")
    before = contents(tmp_path / "data")
    corpus.write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match="not utf-8: byte 3"):
        prepare([corpus], tmp_path / "data", "char", overwrite=True)
    assert contents(tmp_path / "data") == before


def test_what_a_killed_preparation_left_is_no_data_set_and_is_cleared_away(corpus, tmp_path):
    rest = tmp_path / ".data.unfinished"
    rest.mkdir()
    (rest / "train-00000.npy").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="not finished"):
        TokenDataset.open(rest)
    prepare([corpus], tmp_path / "data", "char")
    assert not rest.exists()


def test_only_prepared_data_are_replaced_and_only_when_asked(corpus, tmp_path):
    prepare([corpus], tmp_path / "data", "char")
    with pytest.raises(ValueError, match="holds prepared data already.*overwrite=True"):
        prepare([corpus], tmp_path / "data", "bpe")
    assert prepare([corpus], tmp_path / "data", "bpe", overwrite=True).tokenizer == "bpe"
    assert not (tmp_path / "data" / "tokenizer.json").exists() and (tmp_path / "data" / "merges.txt").exists()
    (tmp_path / "data" / "thesis.doc").write_text("mine")
    with pytest.raises(ValueError, match="thesis.doc besides prepared data"):
        prepare([corpus], tmp_path / "data", "char", overwrite=True)
    with pytest.raises(ValueError, match="is not empty"):
        prepare([corpus], tmp_path, "char", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        prepare([corpus], corpus, "char", overwrite=True)
    (tmp_path / "empty").mkdir()
    prepare([corpus], tmp_path / "empty", "char")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"validation": 1.0}, "validation must be at least 0 and below 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"tokenizer": "klingon"}, "no tokenizer klingon"),
        ({"tokenizer": "gpt2", "vocab_size": 5}, "vocab_size is for a tokenizer that is trained here"),
        ({"vocab_size": 5}, "vocab_size must be at least 257"),
    ],
)
def test_impossible_arguments_are_refused(corpus, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare([corpus], tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


def test_files_without_text_and_documents_that_are_all_the_same_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="a.txt: there is no text"):
        prepare([tmp_path / "a.txt"], tmp_path / "data")
    (tmp_path / "a.txt").write_text(f"same{END}same")
    with pytest.raises(ValueError, match="all 2 documents are the same.*pass validation 0"):
        prepare([tmp_path / "a.txt"], tmp_path / "data")


# --- the command line -------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli, ["data", *map(str, arguments)])


def test_prepare_info_and_verify_from_the_command_line(corpus, tmp_path):
    made = run("prepare", corpus, "-o", tmp_path / "data", "--tokenizer", "char", "--validation", "0.2", "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["splits"]["train"]["documents"] + record["splits"]["validation"]["documents"] == 60
    assert json.loads(run("info", tmp_path / "data", "--json").stdout) == record
    assert "documents chosen by their hash" in run("info", tmp_path / "data").stdout
    assert "2 files" in run("verify", tmp_path / "data").stdout
    shard = tmp_path / "data" / "validation-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    bad = run("verify", tmp_path / "data")
    assert bad.exit_code == 2 and "validation-00000.npy is corrupt" in bad.stderr and bad.stderr.count("\n") == 1


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    result = run("prepare", tmp_path / "nowhere", "-o", tmp_path / "data")
    assert result.exit_code == 2 and result.stderr == f"llmfast: no file or folder {tmp_path / 'nowhere'}\n"
    assert run("info", tmp_path).exit_code == run("verify", tmp_path).exit_code == 2
