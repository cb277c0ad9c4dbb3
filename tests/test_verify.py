"""`llmfast verify`: right backends pass, wrong ones fail with what is wrong, and broken ones say so in a line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import llmfast.cli
from llmfast.backends import OPS
from llmfast.contract import CASES, Task, cases, check, run, summarise

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "my_backend.py"
PAGE = ROOT / "docs" / "write-your-own-kernel.md"
needs_checkout = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are in the checkout")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What is registered in a test, or put on the path, is forgotten after it."""
    package = sys.modules["llmfast.backends"]
    monkeypatch.setattr(package, "_registry", package._registry.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture
def theirs(tmp_path):
    """Writes a backend and verifies it: (exit code, what was said)."""

    def verify(code: str, *arguments: str) -> tuple[int, str]:
        file = tmp_path / "theirs.py"
        file.write_text("import torch\nimport torch.nn.functional as F\n" + code)
        return said("--backend", str(file), *arguments)

    return verify


def said(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(llmfast.cli.cli, ["verify", *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


RIGHT = "def gelu(x, approximate='tanh'):\n    return F.gelu(x, approximate=approximate)\n"


def test_a_right_backend_passes_and_what_it_does_not_offer_is_said(theirs):
    code, output = theirs(RIGHT, "--device", "cpu")
    assert code == 0
    assert "all 32 cases are right" in output and "16 of 16" in output
    assert f"does not offer {', '.join(op for op in OPS if op != 'gelu')}" in " ".join(output.split())


def test_json_holds_the_worst_errors(theirs):
    code, output = theirs(RIGHT, "--json", "--dtype", "bfloat16", "--device", "cpu")
    report = json.loads(output)
    (row,) = report["results"]
    assert code == 0 and report["passed"]
    assert [row[key] for key in ("backend", "op", "dtype", "cases", "failed")] == ["theirs", "gelu", "bfloat16", 16, 0]
    assert row["worst"].keys() == {"result", "gradient of x"}
    assert all(0 <= worst <= 1 for worst in row["worst"].values())
    assert {missing["op"] for missing in report["not_offered"]} > {"linear", "layer_norm"}


WRONG = {
    "a wrong formula": (
        "def gelu(x, approximate='tanh'): return F.gelu(x)\n",
        r"✗ gelu float32, case tanh-\S+: the result is off by .* is allowed",
    ),
    "a wrong gradient": (
        "class Function(torch.autograd.Function):\n"
        "    forward = staticmethod(lambda ctx, x, kind: F.gelu(x, approximate=kind))\n"
        "    backward = staticmethod(lambda ctx, grad: (grad, None))\n"
        "def gelu(x, approximate='tanh'): return Function.apply(x, approximate)\n",
        r"✗ gelu bfloat16, case \S+: the gradient of x is off",
    ),
    "not a number": (
        "def gelu(x, approximate='tanh'): return F.gelu(x, approximate=approximate) * float('nan')\n",
        "the result is not a number",
    ),
    "no gradient": (
        "def gelu(x, approximate='tanh'): return F.gelu(x.detach(), approximate=approximate)\n",
        "the result has no gradient: the op has to be differentiable",
    ),
    "a gradient that nobody computes": (
        "class Function(torch.autograd.Function):\n"
        "    forward = staticmethod(lambda ctx, x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps))\n"
        "    backward = staticmethod(lambda ctx, grad: (grad, None, None, None))\n"
        "def layer_norm(x, weight, bias, eps=1e-5): return Function.apply(x, weight, bias, eps)\n",
        "the gradient of weight is missing",
    ),
    "an input that is changed": (
        "def gelu(x, approximate='tanh'):\n"
        "    y = F.gelu(x, approximate=approximate)\n"
        "    with torch.no_grad(): x.data.zero_()\n"
        "    return y\n",
        "the argument x was changed",
    ),
    "what backward saved is overwritten in it": (
        "class Function(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, kind):\n"
        "        ctx.kept, ctx.kind = x.clone(), kind\n"
        "        return F.gelu(x, approximate=kind)\n"
        "    @staticmethod\n"
        "    def backward(ctx, grad):\n"
        "        slope = torch.ops.aten.gelu_backward(torch.ones_like(grad), ctx.kept, approximate=ctx.kind)\n"
        "        return torch.mul(slope, grad, out=ctx.kept).clone(), None\n"
        "def gelu(x, approximate='tanh'): return Function.apply(x, approximate)\n",
        "the gradient of x differs between two runs",
    ),
    "other bits every time": (
        "calls = []\n"
        "def gelu(x, approximate='tanh'):\n"
        "    calls.append(1)\n"
        "    return F.gelu(x, approximate=approximate) * (1 + len(calls) % 2 * 1e-7)\n",
        "the result differs between two runs",
    ),
    "another dtype": (
        "def gelu(x, approximate='tanh'): return F.gelu(x.float(), approximate=approximate)\n",
        "gelu bfloat16, case .*the result is torch.float32 on cpu, not torch.bfloat16 on cpu",
    ),
    "another shape": (
        "def gelu(x, approximate='tanh'): return F.gelu(x, approximate=approximate)[None]\n",
        r"the result has shape \(1, 1\), not \(1,\)",
    ),
    "one result of two": (
        "def add_layer_norm(x, residual, weight, bias, eps=1e-5): return x + residual\n",
        "it returns 1 results, not 2",
    ),
    "no tensor": ("def gelu(x, approximate='tanh'): return 3\n", "it returns int, not a tensor"),
    "another signature": (
        "def gelu(x): return F.gelu(x)\n",
        r"it raised TypeError: .*; it is called as gelu\(x, approximate='tanh'\)",
    ),
    "an error": ("def gelu(x, approximate='tanh'): return x.nonsense\n", "it raised AttributeError: 'Tensor' object"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_backend_fails_with_what_is_wrong(theirs, what):
    source, expected = WRONG[what]
    code, output = theirs(source)
    assert code == 1, output
    assert re.search(expected, output), output
    assert re.search(r"theirs on cpu: ✗ \d+ of \d+ cases are wrong", output)


def test_only_the_wrong_op_is_named(theirs):
    code, output = theirs(RIGHT + "def layer_norm(x, weight, bias, eps=1e-5): return F.layer_norm(x, weight.shape)\n")
    assert code == 1
    assert "✗ layer_norm float32" in output and "✗ gelu" not in output
    assert theirs(RIGHT, "--op", "gelu")[0] == 0


def test_a_case_that_a_backend_can_not_run_is_left_out_with_its_reason(theirs):
    attention = (
        "MAX_HEAD_DIM = 64\nfrom llmfast.backends import pytorch\n"
        "def causal_attention(q, k, v, **settings): return pytorch.causal_attention(q, k, v, **settings)\n"
    )
    code, output = theirs(attention, "--quick", "--dtype", "float32")
    assert code == 0
    assert re.search("left out: causal_attention float32, case head-dim-256: .*heads of up to 64 channels", output)
    assert "larger cases were not run (--quick)" in output


BAD_INPUT = {
    "an unknown backend": (["--backend", "nonsense"], "unknown backend 'nonsense'"),
    "no such file": (["--backend", "nowhere.py"], "there is no file nowhere.py"),
    "nothing to compare with": (["--backend", "reference"], "'reference' is no backend that can be verified"),
    "an unknown device": (["--device", "abacus"], "there is no device 'abacus' here"),
    "an unknown op": (["--op", "softmax"], "'softmax' is not one of"),
    "nothing offered": (["--backend", "cpp", "--dtype", "float16"], "offers nothing to verify here: "),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_a_line_and_exit_code_2(what):
    arguments, message = BAD_INPUT[what]
    code, output = said(*arguments)
    assert code == 2 and message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "source, message",
    [
        ("def gelu(x:\n", "can't be loaded: SyntaxError"),
        ("1 / 0\n", "can't be loaded: ZeroDivisionError: division by zero .*theirs.py, line 3"),
        ("def softmax(x): return x\n", "defines none of the ops"),
        (RIGHT + "def why_not(op): return None\n", "its why_not raised TypeError"),
    ],
)
def test_a_broken_module_is_a_line_and_exit_code_2(theirs, source, message):
    code, output = theirs(source)
    assert code == 2 and re.search(message, output), output
    assert "Traceback" not in output


def test_every_built_in_backend_passes_what_is_small():
    code, output = said("--quick", "--device", "cpu", "--op", "gelu", "--dtype", "float32")
    assert code == 0, output
    assert "pytorch on cpu: ✓" in output and "reference" not in output


# --- the suite itself -------------------------------------------------------------------------------------------------


def test_every_op_has_cases_that_break_kernels():
    for op in OPS:
        names = [case.name for case in CASES if case.op == op]
        assert len(names) == len(set(names)) >= 6
    makes = {case.name: case.make(torch.float32, "cpu") for case in CASES}
    assert any(t.numel() == 0 for tensors in makes.values() for t in tensors.values() if t is not None)
    assert any(not t.is_contiguous() for tensors in makes.values() for t in tensors.values() if t is not None)


def test_a_case_is_the_same_every_time_and_another_with_another_seed():
    case = cases.linear("", (3, 5), 4)
    first, again, other = (case.make(torch.bfloat16, "cpu", seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["x"], other["x"])


def test_checking_leaves_torchs_random_numbers_alone():
    before = torch.get_rng_state()
    assert not check(cases.gelu("", (9,), "tanh"), "pytorch", "cpu", torch.float32).problems
    assert torch.equal(torch.get_rng_state(), before)


def test_a_summary_is_of_one_op_in_one_dtype():
    tasks = [Task(cases.gelu(f"of {n}", (n,), "none"), "pytorch", "cpu", dtype) for n in (1, 3) for dtype in DTYPES]
    summaries = summarise(run(task) for task in tasks)
    assert [(s.op, s.dtype, len(s.judged)) for s in summaries] == [("gelu", "float32", 2), ("gelu", "bfloat16", 2)]
    assert all(not s.failed and set(s.worst) == {"result", "gradient of x"} for s in summaries)


DTYPES = ("float32", "bfloat16")


# --- the documentation ------------------------------------------------------------------------------------------------


FILES = {}  # the Python blocks of the page that are files: their first line is a comment with the name
for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S) if PAGE.exists() else []:
    if named := re.match(r"# (\w+\.py)\n", block):
        FILES[named[1]] = block


@needs_checkout
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "in_cpp.py" else ())  # half a minute of g++
        for name in FILES
        if name != "first.py"
    ],
)
def test_the_files_of_the_page_are_right(tmp_path, name):
    if name == "in_triton.py":
        pytest.importorskip("triton")
    if name == "in_cpp.py" and not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("g++ and ninja compile it")
    (tmp_path / name).write_text(FILES[name])
    code, output = said("--backend", str(tmp_path / name))
    assert code == 0, output
    assert "all 32 cases are right" in output


@needs_checkout
def test_the_first_file_of_the_page_is_wrong_as_the_page_says(tmp_path):
    (tmp_path / "first.py").write_text(FILES["first.py"])
    code, output = said("--backend", str(tmp_path / "first.py"), "--device", "cpu")
    assert code == 1
    shown = PAGE.read_text(encoding="utf-8").partition("$ llmfast verify --backend first.py\n")[2].partition("```")[0]
    for line in shown.splitlines():
        assert without_figures(line) in without_figures(output), line


def without_figures(text: str) -> str:
    return re.sub(r"[\d.]+(e[+-]\d+)?|[ ━]+", " ", text)


@needs_checkout
def test_the_commands_of_the_page_run():
    commands = re.findall(r"^llmfast (?:verify|generate) .*examples/.*$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(commands) == 2
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-m", *shlex.split(command, comments=True)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert result.returncode == 0, result.stderr
        assert "my_backend on cpu: ✓ all 90 cases" in result.stdout or result.stdout.startswith("Once upon a time")


@needs_checkout
def test_the_python_of_the_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(import llmfast\n.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(compile(block, PAGE.name, "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")
