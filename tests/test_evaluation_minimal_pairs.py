"""Minimal pairs: what counts as right, what files may hold, and `llmfast eval blimp`."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from conftest import PARROT_TEXT, STORY_TEXTS, tiny_config
from hypothesis import given
from hypothesis import strategies as st

import llmfast
from llmfast.cli import cli
from llmfast.evaluation.minimal_pairs import (
    Accuracy,
    MinimalPair,
    grouped,
    minimal_pair_outcomes,
    read_pairs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    MinimalPair(STORY_TEXTS[0], STORY_TEXTS[0].replace("a little cat", "cat little a"), "order", "syntax"),
    MinimalPair(STORY_TEXTS[1], STORY_TEXTS[1].replace("The dog liked", "Liked dog the"), "order", "syntax"),
    MinimalPair("The the the the cat.", "The cat was happy.", "noise", "syntax"),
    MinimalPair("The sun.", "The sun.", "same", "nothing"),
]


def lines(pairs: list[MinimalPair]) -> str:
    keys = {"paradigm": "UID", "phenomenon": "linguistics_term", "good": "sentence_good", "bad": "sentence_bad"}
    return "".join(json.dumps({key: getattr(pair, name) for name, key in keys.items()}) + "\n" for pair in pairs)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "order.jsonl").write_text(lines(PAIRS[:2]) + "\n")
    (tmp_path / "data" / "deep" / "others.jsonl").write_text(lines(PAIRS[2:]))
    (tmp_path / "data" / "._order.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "data" / "README.md").write_text("not pairs")
    return tmp_path / "data"


def test_the_sentence_the_model_knows_wins_and_the_same_sentence_is_half(storyteller):
    assert minimal_pair_outcomes(storyteller, PAIRS) == [1, 1, 0, 0.5]


def test_outcomes_are_those_of_scoring_each_sentence(storyteller):
    pairs = [MinimalPair(good, bad) for good in STORY_TEXTS for bad in STORY_TEXTS]
    scores = {text: storyteller.score(text).total for text in STORY_TEXTS}
    for pair, outcome in zip(pairs, minimal_pair_outcomes(storyteller, pairs), strict=True):
        assert outcome == (0.5 if pair.good == pair.bad else float(scores[pair.good] > scores[pair.bad]))


def test_sentences_longer_than_the_context_are_compared_whole(parrot):
    twice = PARROT_TEXT * 3
    assert len(parrot.tokenizer.encode(twice)) > parrot.config.n_positions
    expected = parrot.score(twice).total > parrot.score(twice[:-1] + "?").total
    assert minimal_pair_outcomes(parrot, [MinimalPair(twice, twice[:-1] + "?")]) == [float(expected)]


def test_a_model_that_knows_nothing_is_right_half_the_time(storyteller):
    torch.manual_seed(0)
    llm = llmfast.LLM(llmfast.GPT(replace(storyteller.config, initializer_range=0.2)), storyteller.tokenizer)
    words = STORY_TEXTS[0].split()
    shuffled = [" ".join(words[i] for i in torch.randperm(len(words))) for _ in range(200)]
    pairs = [MinimalPair(good, bad) for good, bad in zip(shuffled[::2], shuffled[1::2], strict=True)]
    accuracy = Accuracy(minimal_pair_outcomes(llm, pairs))
    assert abs(accuracy.value - 0.5) < 4 * accuracy.standard_error


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=50))
def test_accuracy_is_a_mean_with_its_standard_error(outcomes):
    values = torch.tensor(outcomes, dtype=torch.float64)
    accuracy = Accuracy(outcomes)
    assert accuracy.value == pytest.approx(float(values.mean()))
    assert accuracy.standard_error == pytest.approx(float(values.std() / math.sqrt(len(outcomes))))
    assert math.isnan(Accuracy(outcomes[:1]).standard_error)


def test_groups():
    groups = grouped([1, 0, 1, 0.5], "baba")
    assert list(groups) == ["a", "b"] and groups["a"].outcomes == [0, 0.5] and groups["b"].value == 1


def test_pairs_are_read_from_a_file_a_folder_and_an_archive(folder, tmp_path):
    assert read_pairs(folder / "order.jsonl") == PAIRS[:2]
    assert sorted(read_pairs(folder), key=PAIRS.index) == PAIRS
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, f"data/{file.name}")
    assert sorted(read_pairs(tmp_path / "pairs.zip"), key=PAIRS.index) == PAIRS


def test_pairs_without_names_are_named_after_their_file(tmp_path):
    (tmp_path / "my_pairs.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a"}\n')
    assert read_pairs(tmp_path) == [MinimalPair("a b", "b a", "my_pairs", "my_pairs")]


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', '{"sentence_good": "a"}', '{"sentence_good": "a", "sentence_bad": 1}']
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(lines(PAIRS[:1]) + line)
    with pytest.raises(ValueError, match="bad.jsonl, line 2: (expected a JSON object|not valid JSON)"):
        read_pairs(tmp_path / "bad.jsonl")


def test_a_path_without_pairs_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no .jsonl"):
        read_pairs(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "missing.zip")


def test_a_model_without_an_end_of_text_scores_from_the_second_token_on():
    class Letters:
        vocab_size, end_of_text = 19, None

        def encode(self, text, allow_special=False):
            return [ord(letter) - ord("a") for letter in text]

    torch.manual_seed(0)
    llm = llmfast.LLM(llmfast.GPT(tiny_config()), Letters())
    expected = float(llm.score("abc").total > llm.score("acb").total)
    assert minimal_pair_outcomes(llm, [MinimalPair("abc", "acb")]) == [expected]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_groups_by_phenomenon_and_by_paradigm(storyteller_directory, folder):
    arguments = ["eval", "blimp", str(storyteller_directory), str(folder), "--precision", "fp32"]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["overall"] == {"pairs": 4, "accuracy": 0.625, "standard_error": pytest.approx(0.2394, abs=1e-4)}
    assert record["phenomena"]["syntax"]["accuracy"] == pytest.approx(2 / 3)
    assert record["paradigms"]["syntax/order"] == {"pairs": 2, "accuracy": 1, "standard_error": 0}
    assert record["paradigms"]["syntax/noise"]["standard_error"] is None  # of one pair

    table = CliRunner().invoke(cli, arguments).stdout
    assert "syntax" in table and "66.7%" in table and "62.50%" in table and "noise" not in table
    assert "syntax/noise" in CliRunner().invoke(cli, [*arguments, "--paradigms"]).stdout


def test_the_command_says_what_it_does_not_take(storyteller_directory, tmp_path):
    for path, message in [(tmp_path, "holds no .jsonl"), (tmp_path / "none.jsonl", "no file or folder")]:
        result = CliRunner().invoke(cli, ["eval", "blimp", str(storyteller_directory), str(path)])
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
