"""The C++ kernels under every instruction set that this machine has, and what happens under one it has not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import INSTRUCTION_SETS

import llmfast
from llmfast.backends import cpp

pytestmark = pytest.mark.skipif(
    not any(row.backend == "cpp" and row.available for row in llmfast.backends()),
    reason="the C++ extension is not built here",
)

CONTRACT = Path(__file__).with_name("test_contract.py")


def isa_under(name: str) -> str:
    code = "from llmfast.backends import cpp; print(cpp._missing or cpp.isa())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LLMFAST_CPU_ISA": name},
        cwd=tempfile.gettempdir(),  # away from the checkout: it is the installed package that answers
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def run_under(name: str, *arguments: str) -> str:
    """What a module prints on another instruction set than this process has, or the test is over."""
    if name == cpp.isa():
        pytest.skip("the suite itself runs on it")
    got = isa_under(name)
    if got != name:
        assert "does not have" in got or "not known here" in got
        pytest.skip(got)
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "LLMFAST_CPU_ISA": name, "TRITON_INTERPRET": "0"},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_keeps_the_contract(name):
    assert "cases are right" in run_under(name, "llmfast", "verify", "--backend", "cpp")


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_keeps_the_contract_at_any_shape(name):
    assert " passed" in run_under(name, "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpp", str(CONTRACT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, vocabulary", [(3, 20), (20, 20), (20, 3)])
def test_products_without_columns_are_empty(rows, vocabulary, dtype):
    """They divided by the number of slabs, which is none. autograd never asks; `torch.ops` can."""
    hidden, weight = torch.zeros(rows, 0, dtype=dtype), torch.zeros(vocabulary, 0, dtype=dtype)
    targets, lse = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    backward = torch.ops.llmfast.linear_cross_entropy_backward
    found = backward(torch.ones(()), hidden, weight, targets, lse, -100, True)
    assert [tuple(x.shape) for x in found] == [(rows, 0), (vocabulary, 0)]


@pytest.mark.parametrize("rows", [127, 128, 129, 255, 256, 257, 4100])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_the_gradient_of_a_weight_is_right_for_any_number_of_rows(rows, dtype, error):
    """Where all rows fill one block of k exactly, a matrix that has to be packed was once read as it lay."""
    torch.manual_seed(0)
    x, w, g = (torch.randn(n, m).to(dtype) for n, m in ((rows, 96), (160, 96), (rows, 160)))
    w.requires_grad_()
    with llmfast.use_backend("cpp"):
        (found,) = torch.autograd.grad(llmfast.ops.linear(x, w), w, g)
    expected = g.double().T @ x.double()
    assert (found.double() - expected).norm() < error * expected.norm()


def test_an_unknown_instruction_set_is_a_reason_not_a_crash():
    assert "choose one of" in isa_under("mmx")


def test_the_gelu_table_is_what_its_script_writes():
    ops = Path(__file__).parents[1] / "csrc" / "ops"
    written = subprocess.run([sys.executable, ops / "gelu_table.py"], capture_output=True, text=True, check=True).stdout
    assert numbers_in(written) == pytest.approx(numbers_in((ops / "gelu_table.inl").read_text()), rel=1e-5, abs=1e-9)


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d\.\d+e[-+]\d+", text)]
