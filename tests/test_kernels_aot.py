"""The Triton kernels, proven for GPUs that are not here: what they compile to, and for how many lengths."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from llmfast.kernels.aot import table, versions
from llmfast.kernels.aot.chips import CHIPS, KIB
from llmfast.kernels.aot.compiler import Resources

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without TRITON_INTERPRET, which is fixed from Triton's first import on, and so in another process."""
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)


# --- what they compile to --------------------------------------------------------------------------------------------


def test_the_nearest_to_spilling_do_not_spill():
    result = run("-m", "llmfast.kernels.aot", "--sample")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    count, problems = re.search(r"(\d+) kernels on 5 chips, (\d+) problems", result.stdout).groups()
    assert int(count) > 20 and problems == "0"


@pytest.mark.slow
def test_every_kernel_compiles_to_what_the_table_says():
    result = run("-m", "llmfast.kernels.aot", "--check", "--all")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]


def test_another_triton_comes_before_the_one_that_is_here(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    (tmp_path / "triton-1.2.3" / "triton").mkdir(parents=True)
    (tmp_path / "triton-1.2.3" / "triton" / "__init__.py").write_text("raise SystemExit(f'found {__file__}')\n")
    assert versions.run_with("1.2.3", ["--check"]) == 1
    assert "found" in (said := capfd.readouterr().err) and "triton-1.2.3" in said
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip can't install triton 0.0.1"):
        versions.run_with("0.0.1", [])


def test_every_chip_dtype_and_kernel_family_is_in_the_table():
    rows = table.read().rows
    families = {"attention_forward", "attention_decoding", "attention_delta", "attention_query_gradient",
                "attention_key_gradient", "layer_norm", "layer_norm_wide", "gelu", "matmul", "linear",
                "linear_cross_entropy", "quantized_linear"}  # fmt: skip
    for chip in CHIPS:
        here = [row for row in rows if row.chip == chip]
        assert families <= {row.kernel.split(".")[0] for row in here}
        assert {"float32", "bfloat16", "float16"} == {row.dtype for row in here}
        for head_dim in (16, 32, 64, 128, 256):
            assert any(row.case.startswith(f"head dim {head_dim}") and "dropout" in row.case for row in here)


GOOD = Resources(
    "sm_90", "attention_forward.forward", "bfloat16", "head dim 64", "0" * 16, 8, 3, 168, 0, 64 * KIB, 0.25, "wgmma"
)  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 228 * KIB}, "bytes of shared memory of"),
        ({"instruction": "mma.sync"}, "multiplies with mma.sync, not wgmma"),
        ({"instruction": ""}, "multiplies with no matrix instruction"),
        ({"instruction": "", "dtype": "float32"}, None),
        ({"chip": "gfx942", "shared": 65 * KIB, "instruction": "v_mfma"}, "bytes of shared memory of 65536"),
    ],
)
def test_what_counts_as_a_problem(change, words):
    found = table.problems([replace(GOOD, **change)])
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_the_file_survives_a_round_trip_and_another_layout_counts_as_empty(tmp_path):
    results = table.Results("3.9.0", (GOOD, replace(GOOD, kernel="gelu.gelu", instruction="")))
    path = tmp_path / "kernels.csv"
    path.write_text(table.as_csv(results))
    assert table.read(path) == results
    path.write_text(table.as_csv(results).replace("registers", "regs"))
    assert table.read(path).rows == ()


def test_occupancy_is_the_tightest_of_registers_shared_memory_and_warps():
    a100, mi300 = CHIPS["sm_80"], CHIPS["gfx942"]
    assert a100.occupancy(registers=32, shared=0, warps=4) == 1.0
    assert a100.occupancy(registers=255, shared=0, warps=8) == 8 / 64  # 65536 / (8 * 32 * 256) = 1 program
    assert a100.occupancy(registers=32, shared=163 * KIB, warps=8) == 8 / 64  # one program fills the memory
    assert mi300.occupancy(registers=128, shared=0, warps=4) == 16 / 32  # four of eight wavefronts on each SIMD
    assert mi300.occupancy(registers=64, shared=64 * KIB, warps=4) == 4 / 32


SUMS_OF_A_PRODUCT = """
import re, triton
from triton.compiler import ASTSource
from llmfast.kernels.aot.cases import _linear
from llmfast.kernels.aot.chips import CHIPS
from llmfast.kernels.aot.recorder import record

for c in record(CHIPS["sm_90"], (call for call in _linear("float32", "hopper") if "small" in call[1])):
    if c.name == "matmul.multiply" and not c.constants.get("bias"):
        source = ASTSource(c.kernel, c.signature, c.constants, c.attributes)
        compiled = triton.compile(source, target=c.chip.target, options=c.options)
        print(len(re.findall(r"add(?:\\.rn)?\\.f32", compiled.asm["ptx"])))
"""


def test_float32_products_are_summed_by_themselves_before_they_are_added_to_the_rest():
    """Triton may not fold the sum into one long chain of fused additions, whose errors grow with the inner size."""
    result = run("-c", SUMS_OF_A_PRODUCT)
    assert result.returncode == 0, result.stderr[-3000:]
    sums = [int(line) for line in result.stdout.split()]
    # 16 by 16 elements, two a thread: one sum for each in the loop, and one after it.
    assert len(sums) >= 2 and min(sums) >= 4


# --- how many lengths ------------------------------------------------------------------------------------------------


# Only here does the number of rows choose between tiles.
PRODUCTS = ("linear_layer", "gated_product", "head_and_loss")


@pytest.fixture(scope="module")
def lengths() -> dict:
    result = run(str(Path(__file__).with_name("record_lengths.py")))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_fifty_lengths_and_three_batch_sizes_compile_no_more_than_the_first(lengths):
    assert len(lengths) == 10
    for op, kernels in lengths.items():
        assert kernels["first"] > 0
        if op not in PRODUCTS:
            assert kernels["further"] == [], op


def test_the_number_of_rows_chooses_between_few_matrix_multiplications(lengths):
    # Each product in one of three sizes of tile, and whole or as parts that are summed: nothing else ever.
    tiled = {"matmul.multiply", "matmul.sum_parts", "gated_linear.gated_linear"}
    for op in PRODUCTS:
        assert set(lengths[op]["further"] + lengths[op]["for_short_ones"]) <= tiled
        assert len(lengths[op]["further"]) <= 2 and len(lengths[op]["for_short_ones"]) <= 8
