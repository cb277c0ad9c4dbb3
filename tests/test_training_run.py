"""Whole runs: what they write, how they end, and that one which was killed goes on as if nothing had happened."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from training_runs import SMALL, TEXT, losses, validations

import llmfast
from llmfast.cli import cli
from llmfast.training import checkpoints, directory
from llmfast.training.configuration import configure
from llmfast.training.run import train
from llmfast.training.trainer import Diverged, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def small(**changes):
    return configure(changes=SMALL | changes)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".safetensors", ".json")}


def assert_same_run(expected: Path, actual: Path) -> None:
    """The same losses and the same bits at the end, however often it was stopped."""
    assert losses(actual) == losses(expected)
    assert validations(actual) == validations(expected)
    ours, theirs = (checkpoints.found(out / "checkpoints")[-1] for out in (actual, expected))
    assert ours.name == theirs.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert (actual / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (actual / "training.json").read_bytes() == (expected / "training.json").read_bytes()


# --- a run ------------------------------------------------------------------------------------------------------


def test_a_run_makes_a_model_that_load_takes(text, tmp_path, capsys):
    out = tmp_path / "out"
    outcome = train([text], out, small(dropout=0.0, steps=120, evaluate_every=20, sample_every=60, log_every=10))
    assert outcome.step == 120 and outcome.interrupted is None
    found = losses(out)
    assert found[0] == pytest.approx(math.log(llmfast.load(out).config.vocab_size), abs=0.3)
    assert outcome.loss == found[-1] < 1.5
    evaluated = validations(out)
    assert [row["step"] for row in evaluated] == [*range(20, 121, 20)]
    assert outcome.validation["loss"] == min(row["validation_loss"] for row in evaluated)
    llm = llmfast.load(out, device="cpu", precision="fp32")
    assert "the" in llm.generate("1: ", max_new_tokens=12, temperature=0)
    assert json.loads((out / "training.json").read_text())["validation_loss"] == outcome.validation["loss"]
    assert [path.name for path in checkpoints.found(out / "checkpoints")] == ["step-000116", "step-000120"]
    shown = capsys.readouterr().err
    assert "sample" in shown and "memory: about" in shown and "of peak" in shown
    pytest.importorskip("matplotlib")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_in_another_encoding(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu, ça va. ".encode("latin-1") * 40)
    with pytest.raises(ValueError, match="latin.txt is not utf-8: byte 1 .*--set encoding=latin-1"):
        train([path], tmp_path / "out", small(steps=1), quiet=True)
    train([path], tmp_path / "out", small(steps=1, encoding="latin-1"), quiet=True)  # nothing was in the way
    assert "ç" in (tmp_path / "out" / "vocab.json").read_text("utf-8")


def test_the_model_is_saved_in_the_precision_that_was_asked_for(text, tmp_path):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = tmp_path / precision
        train([text], out, small(steps=4, saved_precision=precision), quiet=True)
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
        newest = load_file(out / "checkpoints" / "step-000004" / "model.safetensors")
        assert {tensor.dtype for tensor in newest.values()} == {torch.float32}


def test_a_run_of_an_earlier_version_had_one_setting_for_all_dropout(text, tmp_path):
    train([text], tmp_path / "out", small(steps=4), quiet=True)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    del record["config"]["model"]["attention_dropout"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    assert directory.RunRecord.read(tmp_path / "out").config.model.attention_dropout == SMALL["dropout"] > 0


def test_every_checkpoint_is_a_model_with_its_tokenizer(text, tmp_path):
    train([text], tmp_path / "out", small(steps=4), quiet=True)
    llm = llmfast.load(tmp_path / "out" / "checkpoints" / "step-000004", precision="fp32")
    assert llm.tokenizer.decode(llm.tokenizer.encode("the cat")) == "the cat"


def test_a_run_takes_prepared_data_and_no_validation(text, tmp_path):
    from llmfast.training.prepare import prepare

    prepare([text], tmp_path / "data", "char", validation=0)
    outcome = train([tmp_path / "data"], tmp_path / "out", small(steps=6), quiet=True)
    assert outcome.validation is None and not (tmp_path / "out" / "data").exists()
    latest = tmp_path / "out" / "checkpoints" / "step-000006" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == latest.read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_the_configuration_decides_every_bit(optimizer, text, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train([text], tmp_path / name, small(steps=6, seed=seed, optimizer=optimizer, precision="fp32"), quiet=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


# --- stopped and resumed ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its lives are forks")
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(precision, text, tmp_path):
    changes = SMALL | {"precision": precision, "steps": 60}
    arguments = {"out": str(tmp_path / "killed"), "text": str(text), "changes": changes, "seed": 5}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "training_runs.py"), json.dumps(arguments)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == 0, killed.stderr
    ends = json.loads(killed.stdout)
    assert ends.count("signal 9") >= 3 and ends[-1] == "code 0", ends
    train([text], tmp_path / "whole", configure(changes=changes), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))  # what a killed save left is gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(number, text, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    before = signal.getsignal(number)  # which a shell may have set to be ignored
    train([text], whole, small(), quiet=True)
    step = Trainer.step

    def interrupted(self):
        if self.steps_done == 13:
            signal.raise_signal(number)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        outcome = train([text], out, small())
    assert outcome.interrupted == number and outcome.step == 14
    assert f"step 14, which is saved; go on with: llmfast train --out {out} --resume" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert train([], out, resume=True, quiet=True).step == 30
    assert_same_run(whole, out)


def test_a_run_that_is_through_can_be_made_longer(text, tmp_path, capsys):
    train([text], tmp_path / "out", small(steps=10, schedule="constant"), quiet=True)
    train([], tmp_path / "out", changes={"steps": 20}, resume=True)
    assert "steps is now 20, was 10" in capsys.readouterr().err
    train([text], tmp_path / "whole", small(steps=20, schedule="constant"), quiet=True)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_the_best_model_stays_when_a_resumed_run_gets_worse(text, tmp_path):
    out = tmp_path / "out"
    best = train([text], out, small(steps=40, evaluate_every=20), quiet=True).validation
    model = (out / "model.safetensors").read_bytes()
    worse = {"steps": 42, "lr": 0.1, "schedule": "constant"}
    outcome = train([], out, changes=worse, resume=True, quiet=True)
    assert validations(out)[-1]["validation_loss"] > best["loss"] + 0.1
    assert outcome.validation == best and best["step"] == 40
    assert (out / "model.safetensors").read_bytes() == model
    assert json.loads((out / "training.json").read_text())["step"] == 40


def test_a_run_stopped_before_its_first_evaluation_is_a_model(text, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(self):
        signal.raise_signal(signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train([text], tmp_path / "out", small(), quiet=True).step == 1
    result = CliRunner().invoke(cli, ["generate", "1", "--model", str(tmp_path / "out"), "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_a_run_belongs_to_one_process_until_it_dies(text, tmp_path):
    out = tmp_path / "out"
    train([text], out, small(steps=2), quiet=True)
    program = "import sys, time; from llmfast.training.directory import only_process; from pathlib import Path\n"
    program += "with only_process(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as other:
        assert other.stdout.readline() == "held\n"
        files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for arguments in (["--resume", "--steps", 4], [text, *settings()]):
            refused = invoke("--out", out, *arguments, code=2).stderr
            assert refused == f"llmfast: the run in {out} is in use by process {other.pid}\n"
        assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        other.kill()
    assert train([], out, changes={"steps": 4}, resume=True, quiet=True).step == 4


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_makes_a_checkpoint_damaged(file, text, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    train([text], whole, small(steps=12), quiet=True)
    shutil.copytree(whole, out)
    before, newest = checkpoints.found(out / "checkpoints")
    content = bytearray((newest / file).read_bytes())
    content[-40] ^= 1  # a low bit of a number, or a letter: nothing that reading would notice
    (newest / file).write_bytes(content)
    train([], out, resume=True)
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{newest} is damaged: {file} is not what was written" in shown and "resuming after step 8" in shown
    assert_same_run(whole, out)


def test_a_checkpoint_has_the_sums_that_sha256sum_checks(text, tmp_path):
    train([text], tmp_path / "out", small(steps=4), quiet=True)
    (newest,) = checkpoints.found(tmp_path / "out" / "checkpoints")
    lines = [line.split("  ") for line in (newest / checkpoints.SUMS).read_text().splitlines()]
    assert {name for _, name in lines} == {path.name for path in newest.iterdir()} - {checkpoints.SUMS}
    for digest, name in lines:
        assert hashlib.sha256((newest / name).read_bytes()).hexdigest() == digest
    (newest / checkpoints.SUMS).unlink()  # as checkpoints of earlier versions are
    assert train([], tmp_path / "out", changes={"steps": 5}, resume=True, quiet=True).step == 5


def test_a_damaged_checkpoint_is_passed_over(text, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    train([text], whole, small(keep_checkpoints=3), quiet=True)
    shutil.copytree(whole, out)
    _, one, other = checkpoints.found(out / "checkpoints")
    (one / "state.json").write_text("{")
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-100])
    train([], out, resume=True)
    shown = capsys.readouterr().err
    assert f"{one} is damaged" in shown and "model.safetensors" in shown and "resuming after step 24" in shown
    assert_same_run(whole, out)
    assert {path.name for path in (out / "checkpoints").glob("damaged*")} == {
        "damaged-step-000028",
        "damaged-step-000030",
    }


def test_a_run_without_a_whole_checkpoint_does_not_go_on_from_half_of_one(text, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    train([text], whole, small(keep_checkpoints=1), quiet=True)
    shutil.copytree(whole, out)
    (only,) = checkpoints.found(out / "checkpoints")
    save_file({}, only / "optimizer.safetensors")  # the weights before it are fine
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        train([], out, resume=True, quiet=True)
    train([], out, resume=True, quiet=True)  # begins again
    assert_same_run(whole, out)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_with_the_last_good_weights(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    loss = llmfast.GPT.loss
    calls = 0

    def poisoned(self, *arguments):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return loss(self, *arguments) * (float("nan") if calls == 13 else 1.0)

    monkeypatch.setattr(llmfast.GPT, "loss", poisoned)
    with pytest.raises(Diverged, match=r"gradient of step 7 is not finite; .*step-000006; .*--resume --set lr=0.005"):
        train([text], out, small(), quiet=True)
    monkeypatch.undo()
    assert train([], out, changes={"lr": 0.005}, resume=True, quiet=True).step == 30
    assert all(map(math.isfinite, losses(out)))


def test_a_gradient_that_is_not_finite_at_the_first_step_leaves_no_checkpoint(text, tmp_path, monkeypatch):
    loss = llmfast.GPT.loss
    monkeypatch.setattr(llmfast.GPT, "loss", lambda *arguments: loss(*arguments) * float("inf"))
    with pytest.raises(Diverged, match="gradient of step 1 is not finite; there is no checkpoint yet: start again"):
        train([text], tmp_path / "out", small(), quiet=True)
    assert not checkpoints.found(tmp_path / "out" / "checkpoints")


def test_a_loss_that_has_left_stops_the_run(text, tmp_path):
    changes = {"optimizer": "sgd", "lr": 1e4, "clip": 0.0, "warmup": 0, "schedule": "constant", "precision": "fp32"}
    with pytest.raises(Diverged, match="smaller learning rate|not finite|the loss is"):
        train([text], tmp_path / "out", small(**changes), quiet=True)


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(text, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    train([text], whole, small(), quiet=True)
    save, calls = checkpoints.save_tensors, 0

    def full(path, tensors):
        nonlocal calls
        calls += 1
        save(path, tensors)
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_tensors", full)
        with pytest.raises(OSError, match=r"step 12 can't be written: .*No space left.*step-000008; make room and"):
            train([text], out, small(), quiet=True)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000004", "step-000008"]
    train([], out, resume=True, quiet=True)
    assert_same_run(whole, out)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """No file can grow beyond so many bytes here: what a full disk is like, in the system's own words."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_evaluation_is_one_line_and_the_last_checkpoint_stays(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    evaluate = Trainer.evaluate

    def full_from_here(self, data):
        if self.steps_done == 20:
            stack.enter_context(files_of_at_most(4000))
        return evaluate(self, data)

    monkeypatch.setattr(Trainer, "evaluate", full_from_here)
    with contextlib.ExitStack() as stack:
        failed = invoke(text, "--out", out, *settings(), "-q", code=2).stderr
    assert failed.count("\n") == 1 and "File too large" in failed
    assert (
        "the model can't be written" in failed
        and f"the last good checkpoint is {out}/checkpoints/step-000016" in failed
    )
    assert not list(out.glob(".model*"))
    monkeypatch.undo()
    assert train([], out, resume=True, quiet=True).step == 30


def test_a_full_disk_in_quantize_is_one_line(text, tmp_path):
    train([text], tmp_path / "out", small(steps=2), quiet=True)
    with files_of_at_most(4000):
        arguments = ["quantize", str(tmp_path / "out"), "-p", "int8", "-o", str(tmp_path / "small")]
        result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "small/model.safetensors can't be written" in result.stderr and "File too large" in result.stderr
    assert not list((tmp_path / "small").iterdir())


# --- the families -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_of_another_family_trains_resumes_to_the_bit_and_is_scored(family, text, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    changes = {"family": family, "n_key_head": 1, "dropout": 0.0, "attention_dropout": 0.1, "sample_every": 20}
    train([text], whole, small(**changes), quiet=True)
    train([text], out, small(**changes, steps=12, schedule="cosine"), quiet=True)
    train([], out, changes={"steps": 30}, resume=True, quiet=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    stopped = losses(whole)[0], losses(out)[0]
    assert stopped[0] == stopped[1] and validations(whole)[-1]["validation_loss"] < stopped[0] - 0.3
    (tmp_path / "held_out.txt").write_text(TEXT[-300:])
    arguments = ["eval", "perplexity", str(whole), str(tmp_path / "held_out.txt"), "--precision", "fp32", "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["nats_per_token"] < stopped[0] - 0.3


def test_what_a_family_has_no_place_for_is_one_line(text, tmp_path):
    for change, message in [
        (["family=bert"], "there is no family 'bert'; known: gpt2, llama"),
        (["family=llama"], "llama has no dropout but of attention: set attention_dropout"),
        (["n_key_head=1"], "gpt2 has a key head for each of its 2 heads, not 1"),
        (["family=llama", "dropout=0", "n_key_head=3"], "3 does not divide 2"),
        (["n_embd=10000000"], "parameters takes"),
        (["n_layer=1000000000"], "n_layer must be at least 1 and at most 10000"),
        (["encoding=rot13"], "encoding 'rot13' is not known"),
    ]:
        extra = [part for setting in change for part in ("--set", setting)]
        result = invoke(text, "--out", tmp_path / "out", *settings(), *extra, code=2)
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "out" / "run.json").exists()


# --- the command line ---------------------------------------------------------------------------------------------


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def settings():
    return [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


def test_the_command_trains_and_reports(text, tmp_path):
    result = invoke(text, "--out", tmp_path / "out", *settings(), "--steps", 12, "--json")
    record = json.loads(result.stdout)
    assert record["step"] == 12 and record["tokens_per_second"] > 0 and record["validation"]["step"] <= 12
    assert "12 steps done" in result.stderr
    assert "resume" not in invoke("--out", tmp_path / "out", "--resume", "--steps", 14, "-q").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "shakespear-char"], "did you mean 'shakespeare-char'"),
        (["--set", "optimisation.lr=1"], "unknown section 'optimisation'; did you mean 'optimization'"),
        (["--set", "weight_deacy=1"], "unknown setting 'weight_deacy'; did you mean 'weight_decay'"),
        (["--set", "lr"], "--set takes KEY=VALUE"),
        (["--set", "lr=fast"], "lr must be a number, got 'fast'"),
        (["--set", "batch_size=9"], "batch_size must be a multiple of accumulation"),
        (["--set", "n_positions=100000"], "one window of context 100000 takes 100001"),
        (["--set", "device=nowhere"], "device 'nowhere' can't be used"),
        (["--set", "backend=nobody"], "unknown backend 'nobody'"),
        (["--resume"], "holds no run to resume"),
        (["--parallel", "ddp"], "--parallel ddp needs several processes"),
    ],
)
def test_bad_input_is_one_line(arguments, message, text, tmp_path):
    result = invoke(text, "--out", tmp_path / "out", "--set", "accumulation=2", *settings()[:12], *arguments, code=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_files_that_are_not_there_or_can_not_be_read_are_named(text, tmp_path):
    assert "nowhere.txt" in invoke(tmp_path / "nowhere.txt", "--out", tmp_path / "out", *settings(), code=2).stderr
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff\x00\x81")
    assert "binary.txt" in invoke(tmp_path / "binary.txt", "--out", tmp_path / "out", *settings(), code=2).stderr
    assert not (tmp_path / "out" / "run.json").exists()
    assert "no files" in invoke("--out", tmp_path / "out", *settings(), code=2).stderr
    assert invoke(text, "--out", tmp_path / "out", *settings(), "--steps", 2, "-q").exit_code == 0


def test_a_directory_that_holds_a_run_is_not_trained_into(text, tmp_path):
    invoke(text, "--out", tmp_path / "out", *settings(), "--steps", 2, "-q")
    assert "holds a run already" in invoke(text, "--out", tmp_path / "out", *settings(), code=2).stderr
    other = invoke("--out", tmp_path / "out", "--resume", "--set", "n_embd=32", code=2)
    assert "can't change n_embd from 16 to 32" in other.stderr
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "holds config.json already" in invoke(text, "--out", tmp_path / "model", *settings(), code=2).stderr


def test_a_mistake_in_the_settings_can_be_corrected(text, tmp_path):
    mistake = invoke(text, "--out", tmp_path / "out", *settings(), "--set", "batch_size=9", code=2)
    assert "batch_size must be a multiple" in mistake.stderr
    invoke(text, "--out", tmp_path / "out", *settings(), "--steps", 2, "-q")


def test_data_that_changed_since_is_noticed(text, tmp_path):
    invoke(text, "--out", tmp_path / "out", *settings(), "--steps", 2, "-q")
    manifest = tmp_path / "out" / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert "is not what the run was started with" in invoke("--out", tmp_path / "out", "--resume", code=2).stderr


def test_the_whole_configuration_can_be_printed_and_read_back(text, tmp_path):
    printed = invoke("--preset", "stories", "--steps", 7, "--print-config").stdout
    (tmp_path / "run.toml").write_text(printed)
    assert configure(file=tmp_path / "run.toml") == configure("stories", changes={"steps": 7})


def test_a_missing_matplotlib_costs_only_the_picture(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train([text], tmp_path / "out", small(steps=2), quiet=True)
    assert not (tmp_path / "out" / "curves.png").exists()


def test_tensorboard_gets_the_curves_where_it_is_wanted(text, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    train([text], tmp_path / "out", small(steps=2, tensorboard=True), quiet=True)
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train([text], tmp_path / "other", small(steps=2, tensorboard=True), quiet=True)
