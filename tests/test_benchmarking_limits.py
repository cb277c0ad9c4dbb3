"""The machine's limits are figures that can be: never how large they are, which is the machine's business."""

from __future__ import annotations

import pytest
import torch

import llmfast
from llmfast.backends import cpp
from llmfast.benchmarking import limits

pytestmark = pytest.mark.skipif(
    not any(row.backend == "cpp" and row.available for row in llmfast.backends()),
    reason="the C++ extension is not built here",
)


def test_every_limit_is_there_or_its_instruction_is_not():
    before = torch.get_num_threads()
    found = limits.measure(threads=2, megabytes=4, seconds=1e-4, rounds=2)
    assert torch.get_num_threads() == before
    assert found["isa"] == cpp.isa() and found["threads"] == 2
    for name in limits.UNITS:
        if found[name] is None:
            assert name in ("bf16", "int8") and cpp.isa() not in ("amx", "avx512_bf16")
            continue
        assert set(found[name]) == {"1", "2"}
        for rate in found[name].values():
            assert 0 < rate["median"] <= rate["best"] < 1e6


def test_the_best_of_several_measurements_on_all_threads():
    first = {"threads": 2, "read": {"1": {"best": 99.0}, "2": {"best": 30.0}}, "bf16": None}
    second = {"threads": 2, "read": {"1": {"best": 20.0}, "2": {"best": 40.0}}, "bf16": None}
    assert limits.best([first, second], "read") == 40.0
    assert limits.best([first, second], "bf16") is None
    assert limits.best([{}], "copy") is None


def test_copying_moves_all_of_one_half():
    memory = torch.arange(64, dtype=torch.uint8)
    limits.copying(memory, [1, 2], rounds=1)
    assert torch.equal(memory[32:], memory[:32])


def test_all_of_the_memory_is_read():
    memory = torch.zeros(3 << 21, dtype=torch.uint8)
    assert torch.ops.llmfast.limit_read(memory) == 0
    for place in (0, 1 << 19, (1 << 21) - 4, 1 << 21, memory.numel() - 4):  # the low byte of one number each
        memory.zero_()[place] = 5
        assert torch.ops.llmfast.limit_read(memory) == 5


def test_arithmetic_counts_what_it_did():
    once = torch.ops.llmfast.limit_arithmetic("fp32", 1, 1)
    assert once > 0 and once % 24 == 0  # twelve vectors, a product and a sum
    assert torch.ops.llmfast.limit_arithmetic("fp32", 3, 50) == 150 * once


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(RuntimeError, match="expected a multiple of 2097152"):
        torch.ops.llmfast.limit_read(torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="uint8"):
        torch.ops.llmfast.limit_read(torch.zeros(1 << 21))
    with pytest.raises(RuntimeError, match="kind is 'fp8'"):
        torch.ops.llmfast.limit_arithmetic("fp8", 1, 1)
    with pytest.raises(RuntimeError, match="positive"):
        torch.ops.llmfast.limit_arithmetic("fp32", 0, 1)
