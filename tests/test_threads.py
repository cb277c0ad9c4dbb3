"""How many threads: torch's wish, the CPUs allowed, and the container's quota."""

from __future__ import annotations

import os

import pytest
import torch

from llmfast import threads
from llmfast.quantization.formats import quantize


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_torchs_setting_is_followed_down_but_not_past_the_cpus(torch_threads):
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch_threads(1)
    assert threads.thread_count() == 1
    torch_threads(usable + 7)
    assert 1 <= threads.thread_count() <= usable


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs can't be chosen here")
def test_the_affinity_mask_is_followed(torch_threads):
    allowed = os.sched_getaffinity(0)
    torch_threads(max(2, len(allowed)))
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert threads.thread_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_containers_quota_is_read(files, quota, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert threads._quota.__wrapped__(tmp_path) == quota


def test_torch_keeps_its_threads_where_nobody_forked(torch_threads):
    torch_threads(2)
    with threads.fork_safe_torch():
        assert torch.get_num_threads() == 2


def test_after_a_fork_torch_computes_on_one_thread(torch_threads, monkeypatch):
    monkeypatch.setattr(threads, "_forked", True)
    torch_threads(2)
    with threads.fork_safe_torch():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_rounding_leaves_the_number_of_threads_as_it_was(torch_threads):
    torch_threads(2)
    with pytest.raises(ValueError, match="infinities"):
        quantize(torch.full((4, 32), torch.inf), "int4")
    assert torch.get_num_threads() == 2
    with threads.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
