"""The ladder under a scaling law: its rungs, and going on where it was stopped; `llmfast eval scaling`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import STORY_TEXTS

import llmfast
from llmfast.cli import cli
from llmfast.evaluation.ladder import FULL, QUICK, Interrupted, Ladder, climb
from llmfast.evaluation.perplexity import text_perplexity
from llmfast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"tokenizer": "char", "n_positions": 8, "batch_size": 4, "precision": "fp32"}
SMALL = Ladder(((1, 4), (2, 16)), (64, 320), SETTINGS)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n".join(STORY_TEXTS * 3))
    return path


@pytest.fixture(scope="module")
def climbed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("ladder") / "out"
    torch.set_num_threads(1)
    return out, list(climb([text], out, SMALL))


def test_every_shape_is_trained_on_every_number_of_tokens(climbed):
    out, trained = climbed
    assert {each.rung for each in trained} == set(SMALL.rungs()) and len(trained) == 4
    for each in trained:
        llm = llmfast.load(out / "runs" / each.rung.name, precision="fp32")
        assert (llm.config.n_layer, llm.config.n_embd) == (each.rung.layers, each.rung.width)
        assert llm.config.num_parameters == each.run.parameters
        assert each.run.tokens == each.rung.tokens  # here a multiple of a step's 32
        assert each.seconds > 0


def test_the_loss_is_that_of_the_text_kept_out(climbed, text):
    out, trained = climbed
    llm = llmfast.load(out / "runs" / trained[-1].rung.name, precision="fp32")
    whole = text.read_text()
    size = json.loads((out / "data" / "manifest.json").read_text())["splits"]["validation"]["bytes"]
    measured = text_perplexity(llm, whole.encode()[-size:].decode())
    assert trained[-1].run.loss == pytest.approx(measured.nats_per_token, rel=0.02)  # but for the first token


def test_a_ladder_goes_on_where_it_was_stopped(text, climbed, tmp_path):
    before = climbed[1]
    climbing = climb([text], tmp_path / "out", SMALL)
    first = [next(climbing) for _ in range(2)]
    climbing.close()
    rest = list(climb([text], tmp_path / "out", SMALL))
    assert [each.seconds == 0 for each in rest] == [True, True, False, False]
    assert [each.run for each in rest] == [each.run for each in before]
    assert [each.run for each in first] == [each.run for each in before[:2]]


def test_a_signal_stops_the_ladder_and_the_run_in_it_goes_on(text, climbed, tmp_path, monkeypatch):
    step = Trainer.step

    def signalled(trainer):
        if trainer.steps_done == 3:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    two = Ladder(SMALL.shapes, (320,), SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        with pytest.raises(Interrupted) as stopped:
            list(climb([text], tmp_path / "out", two))
        assert stopped.value.args == (signal.SIGINT,)
    undisturbed = {each.rung: each.run for each in climbed[1]}
    assert [each.run for each in climb([text], tmp_path / "out", two)] == [undisturbed[rung] for rung in two.rungs()]


def test_a_directory_belongs_to_one_ladder(text, climbed, tmp_path):
    out = climbed[0]
    with pytest.raises(ValueError, match="a ladder of other files or settings"):
        next(climb([text], out, Ladder(SMALL.shapes, SMALL.tokens, {**SETTINGS, "lr": 1e-3})))
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        next(climb([text], tmp_path, SMALL))


def test_what_can_not_be_trained_is_an_error_before_anything_is(text, tmp_path):
    for ladder, message in [
        (Ladder(((1, 4),), (31,), SETTINGS), "31 tokens are less than one step of 4 × 8"),
        (Ladder(((1, 4),), (64,), {"widht": 1}), "unknown setting 'widht'"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(climb([text], tmp_path / "out", ladder))
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="keep some out"):
        next(climb([text], tmp_path / "out", Ladder(((1, 4),), (64,), {**SETTINGS, "validation": 0})))


@pytest.mark.parametrize("ladder", [QUICK, FULL])
def test_the_ladders_that_come_along_can_be_fitted(ladder):
    assert len(ladder.shapes) >= 3 and len(ladder.tokens) >= 3
    for rung in ladder.rungs():
        config = ladder.config(rung)
        assert config.run.steps * config.data.batch_size * config.model.n_positions > 0.97 * rung.tokens
        assert config.optimization.warmup <= config.run.steps / 5


# --- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(cli, ["eval", "scaling", *map(str, arguments)])


def test_the_command_trains_fits_and_draws(text, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    settings = [each for key, value in SETTINGS.items() for each in ("--set", f"{key}={value}")]
    arguments = [text, "--out", tmp_path / "out", *settings, "--resamples", 2]
    arguments += ["--shapes", "1x4,1x8,2x16", "--tokens", "64,0.128k,320"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "9/9" in result.stderr and "1 × 4" in result.stdout and "alpha" in result.stdout
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert record["samples"] == 2 and len(record["runs"]) == 9
    for each in record["runs"]:
        assert each["compute"] == 6 * each["parameters"] * each["tokens"]
    (tmp_path / "out" / "scaling.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    again = run(*arguments, "--json")
    assert 'pip install "llmfast-kernels[train]"' in again.stderr and not (tmp_path / "out" / "scaling.png").exists()
    assert json.loads(again.stdout) == record and "there already" in again.stderr


def test_the_command_says_what_it_does_not_take(text, tmp_path):
    for arguments, message in [
        (("--shapes", "2x32,big"), "LAYERSxWIDTH"),
        (("--shapes", "2x32,0x3"), "LAYERSxWIDTH"),
        (("--tokens", "10,many"), "100k,400k"),
        (("--tokens", "10k,20k"), "three numbers of tokens"),
        (("--set", "lr"), "KEY=VALUE"),
        (("--set", "lr=fast"), "lr must be a number"),
    ]:
        result = run(text, "--out", tmp_path / "out", *arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    result = run(tmp_path / "missing.txt", "--out", tmp_path / "out", "--quick")
    assert result.exit_code == 2 and "missing.txt" in result.stderr and "Traceback" not in result.stderr
