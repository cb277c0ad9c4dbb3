"""The script that trains the embedded model: its data, its schedule, and a whole tiny run."""

import itertools
import json
import math
import sys

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import llmfast
from llmfast.models.gpt2 import PRESETS
from llmfast.training import stories

pytestmark = pytest.mark.usefixtures("one_thread")

END = 99
STORIES = st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=30), min_size=1, max_size=8)


# --- data -------------------------------------------------------------------------------------------------------


def test_stories_are_split_at_end_of_text_and_the_last_are_for_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "VALIDATION_STORIES", 2)
    path = tmp_path / "data.txt"
    end = "<|endoftext|>"
    path.write_text(f"One.\nTwo.\n{end}\n\n Three ☃. \n{end}\n{end}\nFour{end}Five", "utf-8")
    assert stories.read_stories(path) == (["One.\nTwo.", "Three ☃."], ["Four", "Five"])


def test_a_file_with_too_few_stories_says_how_many_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "VALIDATION_STORIES", 2)
    path = tmp_path / "data.txt"
    path.write_text("One<|endoftext|>Two<|endoftext|>", "utf-8")
    with pytest.raises(ValueError, match="data.txt holds 2 stories; 2 are needed for validation alone"):
        stories.read_stories(path)


def rows_of(batch: torch.Tensor) -> list[list[int]]:
    """The rows without their padding, which must all be at the end."""
    rows = []
    for row in batch.tolist():
        length = row.index(-100) if -100 in row else len(row)
        assert set(row[length:]) <= {-100}
        rows.append(row[:length])
    return rows


@settings(max_examples=30)
@given(STORIES, st.integers(5, 40), st.integers(1, 200), st.integers(0, 99))
def test_every_row_is_a_story_or_its_end_as_far_as_the_context_allows(corpus, context, tokens, seed):
    batches = stories.batches(corpus, END, tokens, context, seed)
    for batch in itertools.islice(batches, 6):
        assert batch.dtype == torch.int64 and batch.shape[1] <= context + 1
        for row in rows_of(batch):
            assert 2 <= len(row) <= context + 1
            possible = []
            for story in corpus:
                starts = [[END, *story, END]] + [[*story[i:], END] for i in range(len(story) // 2 + 1)]
                possible += [sequence[: context + 1] for sequence in starts]
            assert row in possible


@settings(max_examples=20)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 99))
def test_an_epoch_shows_every_story_once(count, tokens, seed):
    corpus = [[i, i, i] for i in range(count)]
    batches = stories.batches(corpus, END, tokens, 10, seed)
    for _ in range(2):  # two epochs
        seen: list[int] = []
        while len(seen) < count:
            seen += [row[-2] for row in rows_of(next(batches))]
        assert sorted(seen) == list(range(count))


def test_batches_hold_about_as_many_tokens_as_asked():
    corpus = [[1] * (5 + i % 40) for i in range(3000)]
    sizes = [batch.numel() for batch in itertools.islice(stories.batches(corpus, END, 500, 100, 0), 100)]
    assert sum(400 <= size <= 600 for size in sizes) > 90


def test_little_of_a_batch_is_padding():
    corpus = [[1] * (5 + i % 90) for i in range(3000)]
    batches = list(itertools.islice(stories.batches(corpus, END, 2000, 100, 0), 50))
    padding = sum(int((batch == -100).sum()) for batch in batches) / sum(batch.numel() for batch in batches)
    assert padding < 0.1


def test_half_of_the_rows_start_from_nothing():
    corpus = [[i % 90, 91, 92, 93] for i in range(2000)]
    rows = [row for batch in itertools.islice(stories.batches(corpus, END, 600, 10, 0), 15) for row in rows_of(batch)]
    share = sum(row[0] == END for row in rows) / len(rows)
    assert 0.45 < share < 0.55


def test_the_seed_decides_the_batches():
    corpus = [[i, i + 1, i + 2] for i in range(60)]

    def first(seed):
        return [b.tolist() for b in itertools.islice(stories.batches(corpus, END, 30, 10, seed), 8)]

    assert first(1) == first(1) != first(2)


# --- schedule and optimizers ------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    assert stories.learning_rate(0.0) == 0
    assert stories.learning_rate(0.01) == pytest.approx(0.5)
    assert stories.learning_rate(0.02) == stories.learning_rate(0.1) == stories.learning_rate(0.3) == 1
    assert stories.learning_rate(0.65) == pytest.approx(0.5)
    assert stories.learning_rate(1.0) == 0


@given(st.floats(0, 1))
def test_the_learning_rate_is_a_share(progress):
    assert 0 <= stories.learning_rate(progress) <= 1


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer_and_only_matrices_of_blocks_get_muon(tied):
    model = llmfast.GPT(tiny_config(tie_word_embeddings=tied))
    muon, adamw = stories.make_optimizers(model, 1e-3, 0.1)
    held = [id(p) for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert in_muon == {name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}
    undecayed = [g for g in adamw.param_groups if g["weight_decay"] == 0]
    assert all(p.ndim == 1 for group in undecayed for p in group["params"])


# --- a whole run ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on 60 short stories with a tiny model; gives the directory that it writes."""
    monkeypatch.setattr(stories, "VALIDATION_STORIES", 10)
    monkeypatch.setitem(PRESETS, "stories", tiny_config(vocab_size=4000, n_positions=32, n_embd=16, n_head=2))
    names, animals = ("Tom", "Sue", "Ann", "Ben"), ("cat", "dog", "bird", "fish", "cow")
    told = [f"{names[i % 4]} had a {animals[i % 5]}. The {animals[i % 5]} was happy." for i in range(60)]
    data = tmp_path / "told.txt"
    data.write_text("\n<|endoftext|>\n".join(told), "utf-8")

    def main(name: str, *arguments: str):
        out = tmp_path / name
        settings = ["--out", str(out), "--vocab-size", "290", "--batch-tokens", "256", "--evaluate-every", "20"]
        monkeypatch.setattr(sys, "argv", ["stories", str(data), *settings, *arguments])
        stories.main()
        return out

    return main


def test_a_run_writes_a_model_that_load_takes(run, capsys):
    out = run("model", "--steps", "40", "--lr", "1e-2", "--dropout", "0.05")
    written = {p.name for p in out.iterdir()}
    assert written >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "training.json"}
    assert not any(name.startswith(".") for name in written)  # no temporaries
    record = json.loads((out / "training.json").read_text())
    assert record["step"] == 40 and record["data"] == "told.txt" and record["tokens"] > 0
    assert 0 < record["validation_nats_per_token"] < 0.7 * math.log(290)
    assert record["validation_perplexity"] == pytest.approx(math.exp(record["validation_nats_per_token"]))
    printed = capsys.readouterr().out
    assert "step 40 (100.0%)" in printed and printed.count("validation") == 2

    llm = llmfast.load(out, device="cpu")
    assert llm.config.vocab_size == llm.tokenizer.vocab_size <= 290
    assert llm.config.eos_token_id == llm.tokenizer.end_of_text
    assert llm.generate("Tom", seed=0, max_new_tokens=10).startswith("Tom")
    # What the record says of the model is what its files score.
    with llmfast.use_backend("pytorch"):
        model = llmfast.GPT.from_pretrained(out, dtype=torch.bfloat16)
        _, validation = stories.read_stories(out.parent / "told.txt")
        score = stories.evaluate(model, validation, llm.tokenizer)
    assert score.nats_per_token == pytest.approx(record["validation_nats_per_token"], rel=1e-6)


def test_the_seed_decides_the_weights(run):
    def weights(name, seed):
        return (run(name, "--steps", "3", "--seed", seed) / "model.safetensors").read_bytes()

    first = weights("a", "5")
    assert weights("b", "5") == first != weights("c", "6")


def test_a_run_can_be_limited_by_minutes(run):
    record = json.loads((run("timed", "--minutes", "0.002") / "training.json").read_text())
    assert record["step"] >= 1 and record["minutes"] < 1


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    loss = llmfast.GPT.loss
    monkeypatch.setattr(llmfast.GPT, "loss", lambda *arguments: loss(*arguments) * float("nan"))
    with pytest.raises(SystemExit, match="the loss is nan at step 1"):
        run("nan", "--steps", "2")


def test_the_backend_of_a_run_does_not_outlive_it(run):
    before = llmfast.explain("gelu", torch.zeros(1)).backend
    run("short", "--steps", "1", "--backend", "pytorch")
    assert llmfast.explain("gelu", torch.zeros(1)).backend == before
