"""The GPU benchmarks on a machine without a GPU: that the command runs, keeps what it found, and judges it rightly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import bench, decoding, plots, targets, training  # noqa: E402
from llmfast import GPT, GPTConfig  # noqa: E402
from llmfast.benchmarking import records  # noqa: E402
from llmfast.benchmarking.comparison import WrongResult  # noqa: E402
from llmfast.benchmarking.records import Record, Spread, Versus  # noqa: E402
from llmfast.inference import execution  # noqa: E402
from llmfast.inference.decoders import DecoderPool, StaticDecoder, cuda_graph  # noqa: E402


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--quick", *options]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)


def record(name: str, backend: str = "triton", device: str = "cuda", **others) -> Record:
    others = {"seconds": Spread(1e-3, 1e-3, 1e-3, 3), "precision": "bf16", "group": "ops"} | others
    return Record(name=name, backend=backend, device=device, **others)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes")
def test_every_section_runs_at_tiny_sizes(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stderr and "meaningless" in done.stdout
    results = records.load(tmp_path / "gpu.json")
    assert list(results.facts["sections"]) == list(command.SECTIONS)
    assert [name for name, section in results.facts["sections"].items() if "problem" in section] == []
    assert results.facts["correctness"]["passed"] > 0 and results.facts["correctness"]["failed"] == {}
    assert {"copy", "read", "bf16", "exp"} <= results.limits.keys()
    assert {r.group for r in results.records} == {"ops", "launches", "decode", "training", "memory"}
    # Whoever could not run here says why; our kernels all ran, and agreed with torch.
    known = ("No viable backend", "No available kernel", "it runs on a GPU", "memory is counted on a GPU")
    wrong = [r for r in results.records if r.problem is not None and not any(k in r.problem for k in known)]
    assert wrong == []
    assert {r.name for r in results.records if r.backend == "triton" and r.checked is not None} >= {
        "causal_attention forward", "causal_attention backward", "layer_norm forward", "add_layer_norm backward",
        "gelu backward", "decode attention", "quantized_linear", "linear with gelu forward",
        "linear_cross_entropy backward",
    }  # fmt: skip
    assert "met" not in (tmp_path / "targets.md").read_text().replace("not met", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes")
def test_a_section_in_a_process_of_its_own_may_fail_without_the_others(tmp_path):
    done = run(tmp_path, "--isolate", "--only", "limits")
    assert done.returncode == 0, done.stderr
    (tmp_path / "parts" / "memory.json").write_text("not JSON")  # what a killed process may leave
    assert {"copy"} <= records.load(tmp_path / "gpu.json").limits.keys()


def test_a_process_that_fails_or_hangs_is_a_problem_in_words(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(command, "GRACE", (0, 0))
    monkeypatch.setitem(command.SECTIONS, "limits", (10, 0.01))
    assert command.in_a_process("limits", tmp_path, "quick") == "stopped after 0.01 s"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setitem(command.SECTIONS, "limits", (10, 10))
    assert command.in_a_process("limits", tmp_path, "quick") == "ended with 1: no word on stderr"


def test_a_section_that_raises_is_named_and_what_it_found_is_kept(tmp_path, monkeypatch):
    from benchmarks.gpu import memory

    def half(bench) -> None:
        bench.records.append(record("decode", group="decode"))
        raise RuntimeError("an illegal\nmemory access")

    monkeypatch.setattr(memory, "run", half)
    (tmp_path / "parts").mkdir()
    assert command.in_this_process("memory", tmp_path, "tiny") == "RuntimeError: an illegal memory access"
    assert len(command.part(tmp_path, "memory").records) == 1


def test_a_wrong_competitor_has_no_speed():
    here = bench.Bench("cpu", "tiny", deadline=float("inf"))
    makers = {"right": lambda: lambda: torch.ones(3), "wrong": lambda: lambda: torch.tensor([1.0, 1.0, 1.5])}
    here.contest("gelu forward", {"width": 3}, makers, bench.Work())
    assert [r.problem is None for r in here.records] == [True, False]
    assert "off from the first competitor" in here.records[1].problem
    with pytest.raises(WrongResult):
        bench._checked(torch.tensor([torch.nan]), torch.ones(1), torch.float32)


def test_what_there_is_no_time_for_is_said(monkeypatch):
    here = bench.Bench("cpu", "tiny", deadline=0.0)
    here.contest("gelu forward", {"width": 3}, {"right": lambda: lambda: torch.ones(3)}, bench.Work())
    assert [r.problem for r in here.records] == ["left out: the section's time was up"]
    here = bench.Bench("cpu", "tiny", deadline=10.0)
    now = iter([0.0, 9.0, 11.0])  # at the start, and as each of the two is made ready
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(now))
    makers = {"first": lambda: lambda: torch.ones(3), "second": lambda: lambda: torch.ones(3)}
    here.contest("gelu forward", {"width": 3}, makers, bench.Work())
    assert [r.problem for r in here.records] == [None, "left out: the section's time was up"]


def test_the_buffer_is_written_until_the_next_call_is_launched():
    assert bench.enough_writes(1, 170e-6, 100e-6) == 1
    assert bench.enough_writes(1, 170e-6, 400e-6) == 4  # 1.5 times as long
    assert bench.enough_writes(4, 170e-6, 100e-6) == 4
    assert bench.enough_writes(1, 170e-6, 5.0) == bench.MOST_WRITES  # a call that compiles, or waits


def test_a_quick_run_takes_200_seconds_at_most_and_a_whole_one_ten_minutes():
    full, quick = (sum(seconds) for seconds in zip(*command.SECTIONS.values(), strict=True))
    assert quick <= 200 and full <= 600


def test_decoding_sets_the_graph_beside_the_eager_decoder(monkeypatch):
    here = bench.Bench("cpu", "tiny", deadline=float("inf"))
    wanted = lambda model: None if os.environ["LLMFAST_CUDA_GRAPH"] == "1" else "not wanted"  # noqa: E731
    monkeypatch.setattr(cuda_graph, "why_not", wanted)
    monkeypatch.setattr(execution, "DecoderPool", lambda: DecoderPool(StaticDecoder))
    model = decoding.in_precision(GPT(decoding.TINY).eval(), "fp32", torch.float32)
    decoding.decode(here, model, "fp32", ["pytorch"], 2, decoding.Text(3, 5, 7))
    eager, graph = here.records
    assert (eager.backend, graph.backend) == ("pytorch eager", "pytorch graph")
    assert graph.note == "100% of the tokens are the eager decoder's" and eager.problem is graph.problem is None
    assert [v.competitor for v in graph.versus] == ["pytorch eager fp32"]
    assert "LLMFAST_CUDA_GRAPH" not in os.environ


def test_targets_are_met_missed_or_not_measured():
    def attention(tokens: int, tflops: float, flash: float) -> Record:
        return record(
            "causal_attention forward",
            sizes={"tokens": tokens, "head_dim": 64},
            rates={"gigaflops_per_second": 1e3 * tflops},
            versus=(Versus("sdpa flash bf16", Spread(flash, flash, flash, 3)),),
        )

    def verdicts(*found: Record) -> dict[str, str]:
        return {target.name: target.verdict(found)[1] for target in targets.TARGETS}

    assert set(verdicts().values()) == {"not measured"}
    found = verdicts(attention(1024, 100, 0.5), attention(4096, 360, 1.2), attention(16384, 351, 0.99))
    assert found["attention forward, head dim 64, 4k to 16k"] == "met"  # 1k does not count
    assert found["attention forward against SDPA flash, 4k to 16k"] == "missed"
    assert found["attention forward, head dim 128, 4k to 16k"] == "not measured"
    decode = record("decode", "triton graph", group="decode", sizes={"batch": 1}, rates={"tokens_per_second": 3499.0})
    assert verdicts(decode)["decode of GPT-2 124M, bf16, batch 1, CUDA graph"] == "missed"
    on_cpu = record(
        "decode", "triton graph", "cpu", group="decode", sizes={"batch": 1}, rates={"tokens_per_second": 9e9}
    )
    assert set(verdicts(on_cpu).values()) == {"not measured"}
    assert "| 3,500 tokens/s | 3,499 tokens/s | missed |" in targets.table([decode])


def test_pictures_show_everybody(tmp_path):
    pytest.importorskip("matplotlib")
    found = [
        record(
            "causal_attention forward", backend, sizes={"tokens": tokens, "head_dim": head_dim},
            rates={"gigaflops_per_second": 1e5 + tokens},
        )
        for backend in ("triton", "sdpa flash")
        for tokens in (1024, 2048)
        for head_dim in (64, 128)
    ]  # fmt: skip
    found += [record("training step", "triton", group="training", rates={"tokens_per_second": 5e5})]
    found += [
        record("causal_attention forward and backward", group="memory", sizes={"tokens": 9}, seconds=None, bytes=1)
    ]
    drawn = plots.draw(found, tmp_path, "a GPU")
    assert {p.name for p in drawn} == {"attention_forward.png", "training.png", "memory_causal_attention.png"}
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_operations_of_a_training_step_are_nanogpts():
    config = GPTConfig.preset("gpt2")
    # 123,653,376 parameters without positions, 12 layers of 768 at 1024 tokens.
    assert training.operations_a_token(config, 1024) == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    assert training.peak_of("NVIDIA H200") == 989 and training.peak_of("GeForce") is None
