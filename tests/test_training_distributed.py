"""Several processes on one machine: the losses of one, and checkpoints that any number of them goes on from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from training_runs import SMALL, TEXT, losses, validations

import llmfast
from llmfast.cli import cli
from llmfast.training import checkpoints
from llmfast.training.configuration import configure
from llmfast.training.run import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="needs gloo and forks"),
]
HERE = Path(__file__).parent
CHANGES = SMALL | {"dropout": 0.0, "precision": "fp32", "steps": 16, "checkpoint_every": 4, "evaluate_every": 8}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A directory with the run of one process, `one`, and those of several."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text(TEXT, "utf-8")
    files = [str(root / "text.txt")]
    train(files, root / "one", configure(changes=CHANGES), quiet=True)
    scenarios = []

    def add(name, processes, parallel, **extra):
        scenario = {"processes": processes, "parallel": parallel, "files": files, "out": str(root / name)}
        scenarios.append(scenario | {"changes": CHANGES} | extra)

    def go_on(name, processes, parallel):
        add(name, processes, parallel, files=[], resume=True, changes={"steps": 16})

    add("ddp-2", 2, "ddp")
    add("ddp-4", 4, "ddp")
    add("fsdp-2", 2, "fsdp")
    add("fsdp-4", 4, "fsdp")
    other = CHANGES | {"optimizer": "sgd", "lr": 0.2, "tie_word_embeddings": False, "activation_checkpointing": True}
    other |= {"family": "llama", "n_key_head": 1}
    train(files, root / "one-llama", configure(changes=other), quiet=True)
    add("fsdp-2-llama", 2, "fsdp", changes=other)
    # Half a run each, and the other half on another number of processes. The schedule must not see the difference.
    half = CHANGES | {"steps": 8, "schedule": "constant"}
    train(files, root / "constant", configure(changes=half | {"steps": 16}), quiet=True)
    add("ddp-2-then-4", 2, "ddp", changes=half)
    go_on("ddp-2-then-4", 4, "ddp")
    add("fsdp-4-then-2", 4, "fsdp", changes=half)
    go_on("fsdp-4-then-2", 2, "fsdp")
    add("fsdp-2-then-1", 2, "fsdp", changes=half)
    add("ddp-2-then-fsdp-2", 2, "ddp", changes=half)
    go_on("ddp-2-then-fsdp-2", 2, "fsdp")
    command = [sys.executable, str(HERE / "training_processes.py"), json.dumps(scenarios)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    train([], root / "fsdp-2-then-1", changes={"steps": 16}, resume=True, quiet=True)
    return root


@pytest.mark.parametrize(
    ("name", "alone"),
    [("ddp-2", "one"), ("ddp-4", "one"), ("fsdp-2", "one"), ("fsdp-4", "one"), ("fsdp-2-llama", "one-llama")],
)
def test_several_processes_have_the_losses_of_one(name, alone, runs):
    expected, actual = losses(runs / alone), losses(runs / name)
    assert actual == pytest.approx(expected, abs=1e-5) and len(actual) == 16
    for one, other in zip(validations(runs / alone), validations(runs / name), strict=True):
        assert other["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-5)
    weights = [safetensors.torch.load_file(runs / n / "model.safetensors") for n in (alone, name)]
    for tensor, expected_weight in weights[0].items():
        torch.testing.assert_close(weights[1][tensor], expected_weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddp-2-then-4", "fsdp-4-then-2", "fsdp-2-then-1", "ddp-2-then-fsdp-2"])
def test_a_run_goes_on_with_another_number_of_processes(name, runs):
    assert losses(runs / name) == pytest.approx(losses(runs / "constant"), abs=1e-5)


def test_a_sharded_checkpoint_becomes_one_model(runs, tmp_path):
    newest = checkpoints.found(runs / "fsdp-4" / "checkpoints")[-1]
    assert len(list((newest / "shards").glob("*.safetensors"))) == 4
    result = CliRunner().invoke(cli, ["consolidate", str(newest), "-o", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    last = checkpoints.found(runs / "one" / "checkpoints")[-1]
    whole, merged = (safetensors.torch.load_file(d / "model.safetensors") for d in (last, tmp_path / "model"))
    assert whole.keys() == merged.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-4, rtol=0)
    assert llmfast.load(tmp_path / "model").tokenizer is not None
    again = CliRunner().invoke(cli, ["consolidate", str(newest), "-o", str(tmp_path / "model")])
    assert again.exit_code == 2 and "holds a model already" in again.output
    wrong = CliRunner().invoke(cli, ["consolidate", str(last), "-o", str(tmp_path / "other")])
    assert wrong.exit_code == 2 and "no sharded checkpoint" in wrong.output


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    settings = [part for key, value in CHANGES.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmfast"]
    command += ["train", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--parallel", "fsdp", *settings]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "out")) == 16 and "16 steps done" in result.stderr
