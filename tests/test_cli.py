"""The command line: what it prints, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import llmfast
from llmfast.backends import cpp
from llmfast.cli import cli
from llmfast.tokenizers import BPETokenizer
from llmfast.weights import checkpoint
from llmfast.weights.config_file import record_quality
from llmfast.weights.locate import ASSETS

STORIES = ASSETS / "stories"


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    stderr: str


def process(*arguments: str, **environment: str) -> Ran:
    """The command as its users run it."""
    done = subprocess.run(
        [sys.executable, "-m", "llmfast", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=tempfile.gettempdir(),  # away from the checkout: it is the installed package that answers
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def run(*arguments: str, stdin: str | None = None, **environment: str) -> Ran:
    """The same in this process, which is spared the imports."""
    result = CliRunner().invoke(cli, arguments, input=stdin, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module", autouse=True)
def settings_of_this_process():
    """What a command sets for its process is put back."""
    threads, showwarning = torch.get_num_threads(), warnings.showwarning
    yield
    torch.set_num_threads(threads)
    warnings.showwarning = showwarning


def test_generate_streams_a_story_and_its_speed():
    result = process("generate", "Once upon a time", "--seed", "1", "-n", "40", "--threads", "1")
    assert result.code == 0, result.stderr
    assert result.stdout.startswith("Once upon a time")
    assert len(result.stdout) > 60
    assert "tokens/s" in result.stderr and "1 threads" in result.stderr


@pytest.mark.parametrize("options, words", [([], ""), (["--no-cache"], ", no cache"), (["--backend", "pytorch"], "")])
def test_generate_says_what_ran(options, words):
    result = run("generate", "Once", "-n", "3", "-t", "0", "--threads", "1", "--precision", "int8", *options)
    native = not options or options == ["--no-cache"]
    if native and cpp.why_not("linear", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("the C++ kernels are not built")
    how = f"native ({cpp.isa()}), int8" if native else "pytorch, int8 weights in fp32"
    assert f"; {how}, 1 threads{words}]" in result.stderr


def test_generate_is_the_same_text_from_the_command_line_and_from_python():
    result = run("generate", "One day", "-t", "0", "-n", "20", "--precision", "fp32")
    assert result.stdout.rstrip("\n") == llmfast.load(precision="fp32").generate("One day", 20, temperature=0)


def test_generate_json_and_samples():
    result = run("generate", "-", "--json", "--samples", "2", "-n", "8", "--seed", "3", stdin="A cat")
    record = json.loads(result.stdout)
    assert len(record["texts"]) == 2 and all(text.startswith("A cat") for text in record["texts"])
    assert record["texts"][0] != record["texts"][1]


def test_backends_names_every_backend_and_why_not():
    result = process("backends", TRITON_INTERPRET="0")
    assert result.code == 0, result.stderr
    for name in ("pytorch", "cpp", "triton", "reference"):
        assert name in result.stdout
    rows = json.loads(run("backends", "--json").stdout)
    assert {"op", "backend", "device", "dtype", "available", "reason"} <= rows[0].keys()


def test_what_to_install_keeps_its_brackets(monkeypatch):
    rows = llmfast.backends()
    reason = "pip install 'llmfast-kernels[triton]'"
    rows = [replace(row, reason=reason) if row.backend == "triton" else row for row in rows]
    monkeypatch.setattr(llmfast, "backends", lambda: rows)
    assert "[triton]" in run("backends").stdout


def test_backends_shows_triton_under_the_interpreter():
    pytest.importorskip("triton")
    rows = json.loads(process("backends", "--json", TRITON_INTERPRET="1").stdout)
    assert any(r["backend"] == "triton" and r["device"] == "cpu" and r["available"] for r in rows)


def test_info_describes_the_embedded_model():
    facts = json.loads(run("info", "stories", "--json").stdout)
    assert facts["parameters"] == llmfast.load().config.num_parameters
    assert "5,8" in run("info", "stories").stdout.replace("\u00a0", " ")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """The embedded model in 4 bits, made by the command."""
    directory = tmp_path_factory.mktemp("quantised") / "small"
    result = run("quantize", "stories", "--precision", "int4", "-o", str(directory), "--threads", "1")
    assert result.code == 0, result.stderr
    assert result.stderr == ""  # no progress bar where nobody watches
    for word in ("token embedding", "mlp out", "int4", "int8", "%", "× smaller", str(directory)):
        assert word in result.stdout, word
    return directory


def test_quantize_makes_a_model_that_writes_stories_and_has_a_card(quantised):
    result = run("generate", "Once upon a time", "-m", str(quantised), "-n", "30", "-t", "0", "--precision", "fp32")
    assert result.stdout.startswith("Once upon a time, there was a little")
    assert "llmfast quantize --precision int4" in (quantised / "README.md").read_text()


def test_quantize_json(tmp_path):
    result = run("quantize", "stories", "-p", "int8", "-o", str(tmp_path / "small"), "--json")
    record = json.loads(result.stdout)
    assert (record["precision"], record["path"]) == ("int8", str(tmp_path / "small"))
    assert record["bytes_before"] == json.loads(run("info", "stories", "--json").stdout)["bytes"]
    assert record["bytes_after"] == sum(part["bytes_after"] for part in record["parts"])
    assert 1.8 < record["bytes_before"] / record["bytes_after"] < 2
    errors = {part["kind"]: part["relative_error"] for part in record["parts"]}
    assert errors.pop("the rest") == 0 and all(0.001 < error < 0.02 for error in errors.values())


def test_info_of_a_quantised_model(quantised, tmp_path):
    facts = json.loads(run("info", str(quantised), "--json").stdout)
    assert facts["precision"] == "int4" and facts["parameters"] == llmfast.load().config.num_parameters
    assert facts["bytes by precision"].keys() == {"int8", "int4", "bfloat16"}
    assert sum(facts["bytes by precision"].values()) == facts["bytes"]
    assert facts["bytes"] < (quantised / "model.safetensors").stat().st_size < facts["bytes"] + 50_000
    assert "quality" not in facts

    shutil.copytree(quantised, tmp_path / "measured")
    record_quality(tmp_path / "measured", {"a-text.txt": {"loss_change": 0.0123, "top1_agreement": 0.97}})
    measured = json.loads(run("info", str(tmp_path / "measured"), "--json").stdout)
    assert measured["quality"] == {"a-text.txt": {"loss_change": 0.0123, "top1_agreement": 0.97}}
    text = " ".join(run("info", str(tmp_path / "measured"), COLUMNS="200").stdout.split())
    assert "precision int4" in text and "quality on a-text.txt loss change 0.0123, top1 agreement 0.97" in text


def test_quantize_says_in_one_line_what_it_will_not_do(quantised, tmp_path):
    before = {p.name: p.read_bytes() for p in quantised.iterdir()}
    for model, out, message in [
        (str(quantised), tmp_path / "x", "small is quantised already (int4)"),
        ("stories", quantised, "holds a model already: name another directory, or pass --overwrite"),
        ("stories", STORIES, "holds the model to quantise: name another directory"),
        ("stories", "/proc/nowhere", "/proc/nowhere"),
    ]:
        result = run("quantize", model, "--precision", "int8", "--out", str(out))
        assert result.code == 2 and message in result.stderr, result.stderr
        assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()
    assert {p.name: p.read_bytes() for p in quantised.iterdir()} == before


def test_quantize_overwrites_when_told_to(quantised, tmp_path):
    shutil.copytree(quantised, tmp_path / "small")
    result = run("quantize", "stories", "-p", "int8", "-o", str(tmp_path / "small"), "--overwrite")
    assert result.code == 0, result.stderr
    assert checkpoint.stream(tmp_path / "small").precision == "int8"


@pytest.mark.parametrize("verb", [["generate", "x", "--model"], ["info"]])
def test_a_damaged_quantised_model_is_one_clear_line(verb, quantised, tmp_path):
    shutil.copytree(quantised, tmp_path / "small")
    config = tmp_path / "small" / "config.json"
    config.write_text(
        config.read_text().replace('"transformer.wte.weight": "int8"', '"transformer.wte.weight": "int7"')
    )
    result = run(*verb, str(tmp_path / "small"))
    assert result.code == 2 and "stores transformer.wte.weight as 'int7'" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


def test_version_and_help():
    assert llmfast.__version__ in run("--version").stdout
    for verb in ("generate", "backends", "info", "quantize"):
        text = run(verb, "--help").stdout
        assert "Usage" in text and "--threads" in text


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the embedded model with a truncated weight file."""
    shutil.copytree(STORIES, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return tmp_path / "broken"


BAD_INPUT = {
    "unknown model": (["generate", "x", "--model", "no-such-model"], "no model 'no-such-model'"),
    "missing path": (["generate", "x", "--model", "./nowhere"], "no model at ./nowhere"),
    "unknown backend": (["generate", "x", "--backend", "cuda9"], "unknown backend 'cuda9'"),
    "unknown op in backend": (["generate", "x", "--backend", "softmax=cpp"], "unknown op 'softmax'"),
    "backend that can't run": (["generate", "x", "--backend", "triton", "-n", "1"], "TRITON_INTERPRET=1"),
    "unknown option": (["generate", "x", "--temprature", "1"], "--temperature"),
    "unknown verb": (["generat", "x"], "No such command"),
    "not a number": (["generate", "x", "--temperature", "warm"], "not a valid float"),
    "NaN temperature": (["generate", "x", "--temperature", "nan"], "temperature must be a number"),
    "negative temperature": (["generate", "x", "--temperature", "-1"], "temperature must be a number"),
    "top-k of zero": (["generate", "x", "--top-k", "0"], "--top-k must be"),
    "top-p above one": (["generate", "x", "--top-p", "1.5"], "--top-p must be in"),
    "negative length": (["generate", "x", "-n", "-5"], "-5 is not in the range"),
    "long prompt": (
        ["generate", "word " * 900],
        "the model's context only 512; shorten it, or pass --truncate to keep its end",
    ),
    "unknown precision": (["generate", "x", "--precision", "int3"], "precision must be"),
    "unknown device": (["generate", "x", "--device", "toaster"], "device 'toaster'"),
    "empty stop": (["generate", "x", "--stop", ""], "stop must be non-empty"),
    "info of nothing": (["info", "./nowhere"], "no model at ./nowhere"),
    "quantising to what is not known": (
        ["quantize", "stories", "-p", "int3", "-o", "x"],
        "'int3' is not one of 'int8'",
    ),
    "quantising without a place": (["quantize", "stories", "-p", "int8"], "--out"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(case):
    arguments, message = BAD_INPUT[case]
    # Triton is imported once, with or without its interpreter.
    result = process(*arguments, TRITON_INTERPRET="0") if "triton" in arguments else run(*arguments)
    assert result.code == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) <= 4  # click adds its usage line


def test_a_wrong_environment_is_one_clear_line():
    result = process("generate", "x", LLMFAST_BACKEND="nonsense")
    assert result.code == 2 and "unknown backend 'nonsense'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", [["generate", "x", "--model"], ["info"]])
def test_a_truncated_weight_file_is_named(verb, broken):
    result = run(*verb, str(broken))
    assert result.code == 2 and "model.safetensors is damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_prompt_that_outgrows_the_context_says_so_once():
    result = run("generate", "word " * 300, "--truncate", "-n", "300", "--seed", "0", "--stop", "@@")
    assert result.code == 0, result.stderr
    assert result.stderr.count("outgrew the context") <= 1


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model without an end-of-text token: it never stops by itself."""
    trained = llmfast.load().tokenizer
    BPETokenizer(trained.vocab, trained.merges, {}).save(tmp_path)
    config = llmfast.GPTConfig(vocab_size=trained.vocab_size, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    llmfast.GPT(config).save_pretrained(tmp_path)
    return tmp_path


def test_ctrl_c_ends_a_stream_cleanly(endless):
    process = subprocess.Popen(
        [sys.executable, "-m", "llmfast", "generate", "Once", "-n", "10000000", "--model", str(endless)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a script runs pytest with `&`
    )
    assert process.stdout is not None
    process.stdout.read(30)  # it is streaming
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "tokens/s" in stderr


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -m llmfast generate Once -n 200 --seed 0 | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "Broken" not in result.stderr
