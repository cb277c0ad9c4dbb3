"""The Triton kernels compile for GPUs that are not here, without spilling registers, and once for all lengths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def report() -> dict:
    script = Path(__file__).with_name("compile_triton_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_every_kernel_compiles_for_ampere_and_hopper_without_spilling(report):
    names = {kernel["name"] for kernel in report["kernels"]}
    for kernel in ("_forward_kernel", "_key_gradient_kernel", "_query_gradient_kernel", "_gelu_kernel"):
        assert {f"{kernel} sm_80", f"{kernel} sm_90"} <= names
    assert [kernel for kernel in report["kernels"] if kernel["stack"]] == []
    assert all(0 < kernel["registers"] <= 255 for kernel in report["kernels"])


def test_another_sequence_length_compiles_nothing_new(report):
    assert report["more_for_other_lengths"] == []
