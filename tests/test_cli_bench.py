"""`llmfast bench`: what it measures, prints and writes, and what it says to bad input."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from llmfast.benchmarking import records, suite
from llmfast.benchmarking.comparison import Comparison
from llmfast.cli import cli
from llmfast.cli.bench import MEASURED

BACKEND = """
import torch

def gelu(x, approximate="tanh"):
    return torch.nn.functional.gelu(x, approximate=approximate)

def layer_norm(x, weight, bias, eps=1e-5):
    return x
"""


def bench(*arguments: object):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    module = sys.modules["llmfast.backends"]
    monkeypatch.setattr(module, "_registry", module._registry.copy())


@pytest.fixture
def small(monkeypatch):
    """Only the shortest case of every name, and only of an op that the backend has right, has wrong, and has not."""
    whole = suite.plan

    def shortest(scale, selection):
        found: dict[str, Comparison] = {}
        for item in whole(scale, selection):
            if item.name.split()[0] in ("gelu", "layer_norm", "linear"):
                found.setdefault(item.name, item)
        return list(found.values())

    monkeypatch.setattr(suite, "plan", shortest)


def test_help_names_every_group():
    assert MEASURED == suite.GROUPS
    result = bench("--help")
    assert result.exit_code == 0
    for group in (*MEASURED, "peers", "limits"):
        assert group in result.output


def test_a_backend_in_a_file_is_measured_where_it_is_right(small, tmp_path):
    (tmp_path / "mine.py").write_text(BACKEND)
    out = tmp_path / "out.json"
    result = bench("ops", "--quick", "--precision", "fp32", "--backend", tmp_path / "mine.py", "--json", out)
    assert result.exit_code == 0, result.output
    found = {(r.name, r.backend): r for r in records.load(out).records}
    assert {backend for _, backend in found} == {"pytorch", "mine"}
    assert found["gelu forward", "mine"].seconds.median > 0 and found["gelu backward", "mine"].versus
    assert "not timed" in found["layer_norm forward", "mine"].problem  # it does nothing
    assert ("linear forward", "mine") not in found  # it has none
    assert "not measured: layer_norm forward, 64 tokens, mine fp32: wrong" in result.output
    assert "gelu forward" in result.output and f"wrote {out}" in result.output


def test_an_interruption_keeps_what_is_there(monkeypatch, tmp_path):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(suite, "run", interrupted)
    result = bench("tokenizer", "--quick", "--json", tmp_path / "out.json")
    assert result.exit_code == 130 and "interrupted" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["records"] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "--backend", "nowhere"], "unknown backend 'nowhere'"),
        (["ops", "--backend", "reference"], "'reference' can't be measured"),
        (["ops", "--precision", "int8"], "nothing to measure: ops has no case in int8 on cpu"),
        (["decode", "--model", "nowhere.safetensors"], "no model at nowhere.safetensors"),
        (["ops", "--json", "nowhere/out.json"], "there is no folder"),
        (["ops", "--quick", "--device", "cuda"], "there is no GPU"),
        (["sing"], "'sing' is not one of"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = bench(*arguments)
    assert result.exit_code == 2 and message in result.output
    assert "Traceback" not in result.output
