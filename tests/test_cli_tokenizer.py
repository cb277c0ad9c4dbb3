"""`llmfast tokenizer`: train, encode, decode and inspect, as one would from a shell."""

import json

import pytest
from click.testing import CliRunner

from llmfast.cli import cli
from llmfast.tokenizers import BPETokenizer, load_tokenizer
from llmfast.tokenizers.merge_tree import merge_tree

TEXT = "low low lower lowest\nnewer newest wider\n" * 5


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli, ["tokenizer", *map(str, arguments)], input=stdin)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    return tmp_path / "corpus.txt"


@pytest.mark.parametrize("kind", ["char", "word", "bpe", "wordpiece"])
def test_every_kind_is_trained_and_encodes_and_decodes(corpus, tmp_path, kind):
    made = run("train", corpus, "-o", tmp_path / "made", "--kind", kind, "--vocab-size", 300, "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    loaded = load_tokenizer(tmp_path / "made")
    assert record["kind"] == loaded.kind == kind and record["vocab_size"] == loaded.vocab_size
    encoded = run("encode", "low wider", "-t", tmp_path / "made")
    assert list(map(int, encoded.stdout.split())) == loaded.encode("low wider")
    assert run("decode", *encoded.stdout.split(), "-t", tmp_path / "made").stdout == "low wider\n"
    shown = run("inspect", "low wider", "-t", tmp_path / "made")
    assert shown.exit_code == 0 and f"{len(loaded.encode('low wider'))} tokens, 9 bytes" in shown.stdout


def test_stdin_and_json_and_special_tokens(corpus, tmp_path):
    run("train", corpus, "-o", tmp_path / "made", "--vocab-size", 300, "--special", "<|user|>")
    as_json = run("encode", "-", "-t", tmp_path / "made", "--json", "--special", stdin="<|user|>low")
    ids = json.loads(as_json.stdout)
    assert len(ids) == 2 and ids[0] == load_tokenizer(tmp_path / "made").special_tokens["<|user|>"]
    assert run("decode", "-", "-t", tmp_path / "made", stdin=as_json.stdout).stdout == "<|user|>low\n"
    rows = json.loads(run("inspect", "<|user|>low", "-t", tmp_path / "made", "--special", "--json").stdout)
    assert rows == [{"id": ids[0], "text": "<|user|>"}, {"id": ids[1], "text": "low"}]


def test_the_trace_names_every_merge_in_order(corpus, tmp_path):
    shown = run("train", corpus, "-o", tmp_path / "made", "--vocab-size", 262, "--trace").stdout.splitlines()
    merges = load_tokenizer(tmp_path / "made").merges
    assert len(merges) == 5 and len(shown) == 6
    assert shown[0] == "     1  l + o → lo  (20 times)"
    for line, (left, right) in zip(shown, merges, strict=False):
        assert f"{left.decode()} + {right.decode()} → {(left + right).decode()}  (" in line.replace("Ġ", " ")


def test_the_trace_spells_signs_that_look_like_continuations(tmp_path):
    (tmp_path / "signs.txt").write_text("a#### b####")
    shown = run("train", tmp_path / "signs.txt", "-o", tmp_path / "made", "--vocab-size", 259, "--trace").stdout
    assert "# + # → ##  (" in shown and "## + ## → ####  (" in shown


def test_a_tokenizer_is_replaced_only_when_asked(corpus, tmp_path):
    run("train", corpus, "-o", tmp_path / "made", "--kind", "char")
    again = run("train", corpus, "-o", tmp_path / "made", "--kind", "word")
    assert again.exit_code == 2 and "holds vocab.json already" in again.stderr and "--overwrite" in again.stderr
    assert run("train", corpus, "-o", tmp_path / "made", "--kind", "word", "--overwrite").exit_code == 0
    assert load_tokenizer(tmp_path / "made").kind == "word"


def test_the_trace_of_wordpiece_gives_scores(corpus, tmp_path):
    shown = run("train", corpus, "-o", tmp_path / "made", "--kind", "wordpiece", "--trace", "--min-count", 1).stdout
    assert "w + ##id → wid  (score 0.2)" in shown


def test_the_splits_and_trainers_can_be_chosen(corpus, tmp_path):
    for trainer in ("python", "tokenizers"):
        arguments = ["--vocab-size", 280, "--split", "gpt4", "--trainer", trainer]
        run("train", corpus, "-o", tmp_path / trainer, *arguments)
    python, library = load_tokenizer(tmp_path / "python"), load_tokenizer(tmp_path / "tokenizers")
    assert python.merges == library.merges and python.split == library.split == "gpt4"


def test_inspect_shows_how_a_text_splits_and_what_can_not_be_printed():
    shown = run("inspect", "Once upon\ta ☃\ntime")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("Once│ upon│") and "⇥" in lines[0] and lines[0].endswith("↵│") and lines[1] == "t│ime│"
    assert "<E2>│<98>│<83>│" in lines[0]
    assert "20 bytes" in lines[-1] and "bpe, 4,000 tokens" in lines[-1]


def test_inspect_shows_which_pieces_continue_a_word(corpus, tmp_path):
    run("train", corpus, "-o", tmp_path / "made", "--kind", "wordpiece", "--vocab-size", 30)
    assert "##" in run("inspect", "lowest wider", "-t", tmp_path / "made").stdout.splitlines()[0]


def test_inspect_of_nothing_is_no_tokens():
    assert "0 tokens, 0 bytes" in run("inspect", "").stdout


def test_a_token_shows_the_merges_that_made_it():
    tokenizer = BPETokenizer.train(["low low lower"], 260)
    expected = [
        "low  id 257, merge 2",
        "├── lo  id 256, merge 1",
        "│   ├── l  id 75",
        "│   └── o  id 78",
        "└── w  id 86",
    ]
    assert merge_tree(tokenizer, "low").splitlines() == merge_tree(tokenizer, "257").splitlines() == expected
    assert merge_tree(tokenizer, "w") == "w  id 86"
    with pytest.raises(ValueError, match="'lowest' is not a token of this vocabulary"):
        merge_tree(tokenizer, "lowest")
    for end in ("<|endoftext|>", str(tokenizer.end_of_text)):
        with pytest.raises(ValueError, match="special token, which no merges make"):
            merge_tree(tokenizer, end)
    assert "Ġonce" in run("inspect", " once", "--token").stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "CORPUS", "-o", "OUT", "--kind", "char", "--trace"], "the kind char has none"),
        (["train", "CORPUS", "-o", "OUT", "--kind", "word", "--lowercase"], "--lowercase is not an option of the kind"),
        (["train", "CORPUS", "-o", "OUT", "--vocab-size", "9"], "--vocab-size must be at least 257"),
        (["train", "CORPUS", "-o", "OUT", "--trace", "--json"], "choose one of them"),
        (["train", "nowhere.txt", "-o", "OUT"], "no file or folder nowhere.txt"),
        (["encode", "text", "-t", "OUT"], "OUT"),
        (["decode", "4000"], "token id 4000 is not in the vocabulary of 4000"),
        (["decode", "one"], "'one' is not a token id"),
        (["inspect", "qqqqq", "--token"], "'qqqqq' is not a token"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(corpus, tmp_path, arguments, message):
    places = {"CORPUS": corpus, "OUT": tmp_path / "out"}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert message.replace("OUT", str(tmp_path / "out")) in result.stderr


def test_merges_of_a_kind_without_any_are_refused(corpus, tmp_path):
    run("train", corpus, "-o", tmp_path / "made", "--kind", "char")
    result = run("inspect", "low", "--token", "-t", tmp_path / "made")
    assert result.exit_code == 2 and "kind char does not keep" in result.stderr
