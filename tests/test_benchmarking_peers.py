"""What the benchmarks count, ask for and print. No test here judges a time."""

from __future__ import annotations

import base64
import copy
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import llmfast
from llmfast import GPTConfig
from llmfast.benchmarking.peers import campaign, client, counting, findings, plan, worker
from llmfast.benchmarking.peers.counting import Formats
from llmfast.benchmarking.peers.engines import ENGINES
from llmfast.benchmarking.peers.engines import Engine as EngineInProcess
from llmfast.benchmarking.peers.models import prompt_ids
from llmfast.benchmarking.peers.plan import (
    BUSY,
    FULL,
    GROUPS,
    LLAMA,
    MODELS,
    OURS,
    PREFILL,
    QUICK,
    SHORT,
    Engine,
)  # fmt: skip
from llmfast.benchmarking.records import Results, load, save
from llmfast.models import PRESETS

GPT2 = GPTConfig.preset("gpt2")
LONG = plan.GPT2.long
OURS_FP32 = GROUPS["fp32"][0]

# By hand: 12 blocks of 768 * (2304 + 768 + 3072) + 3072 * 768 weights and a head of 50257 * 768; vectors (biases and
# LayerNorms) of 12 * (6912 + 3072) + 1536 numbers; 12 * 6912 + 50257 rows of matrices.
BLOCKS, HEAD, VECTORS, ROWS = 84_934_656, 38_597_376, 121_344, 133_201


@pytest.mark.parametrize(
    "formats, expected",
    [
        (Formats("f32", "f32", "f32"), 4 * (BLOCKS + HEAD + VECTORS)),  # 494 MB
        (Formats("bf16", "bf16", "bf16"), 2 * (BLOCKS + HEAD) + 4 * VECTORS),  # 247
        (Formats("bf16", "bf16", "bf16", vectors="bf16"), 2 * (BLOCKS + HEAD + VECTORS)),
        (Formats("int8", "int8", "bf16"), BLOCKS + HEAD + 4 * ROWS + 4 * VECTORS),  # 124
        (Formats("int4", "int4", "bf16"), 18 * (BLOCKS + HEAD) // 32 + 4 * VECTORS),  # 69.9
        (Formats("int4", "int8", "bf16"), 18 * BLOCKS // 32 + HEAD + 4 * 50257 + 4 * VECTORS),
        (Formats("q8_0", "q8_0", "f16"), 34 * (BLOCKS + HEAD) // 32 + 4 * VECTORS),
        (Formats("q4_1", "q8_0", "bf16"), 20 * BLOCKS // 32 + 34 * HEAD // 32 + 4 * VECTORS),
        (Formats("q4_k", "q4_k", "bf16"), 148 * (BLOCKS + HEAD) // 256 + 4 * VECTORS),  # ggml's own take 144
        (Formats("q4_0", "q4_0", "f16"), 18 * (BLOCKS + HEAD) // 32 + 4 * VECTORS),
    ],
    ids=str,
)
def test_a_token_of_gpt2_reads_this_many_bytes_of_weights(formats, expected):
    assert counting.weight_bytes(GPT2, formats) == expected


def test_the_known_megabytes_of_gpt2():
    ours = [engine for engines in GROUPS.values() for engine in engines if engine.library == OURS]
    found = {engine.precision: counting.weight_bytes(GPT2, engine.formats) / 1e6 for engine in ours}
    assert {name: round(megabytes, 1) for name, megabytes in found.items()} == {
        "fp32": 494.6,
        "bf16": 247.5,
        "int8": 124.6,
        "int4": 87.1,
        "int4-all": 70.0,
        "q4_1": 94.6,
    }


def test_a_token_reads_the_cache_up_to_itself():
    whole = [1024 * counting.cache_bytes(GPT2, form) for form in ("f32", "f16", "int8")]
    assert whole == [75_497_472, 37_748_736, 20_054_016]
    formats = Formats("bf16", "bf16", "bf16")
    only, after = counting.weight_bytes(GPT2, formats), counting.cache_bytes(GPT2, "bf16")
    assert counting.decode_bytes(GPT2, formats, prompt=32, new=1) == only + 33 * after
    assert counting.decode_bytes(GPT2, formats, prompt=32, new=3) == only + 34 * after  # 33, 34 and 35
    assert counting.resident_bytes(GPT2, formats, 100) == only + 4 * 1024 * 768 + 100 * after


def test_a_prompt_takes_this_many_operations():
    # 2 a weight and token; in each block a token sees 1, 2, ... keys, 768 products for each twice; one row of the head.
    assert counting.prefill_operations(GPT2, 1) == 2 * BLOCKS + 12 * 2 * 2 * 768 + 2 * HEAD
    assert counting.prefill_operations(GPT2, 512) == 512 * 2 * BLOCKS + 12 * 4 * 768 * (512 * 513 // 2) + 2 * HEAD
    assert 0.17e9 < counting.prefill_operations(GPT2, 512) / 512 < 0.19e9


# ---- The worker ----


class Counter(EngineInProcess):
    base = "json"

    def __init__(self, models, precision, capacity, threads):
        self.seen: list[int] = []

    def prefill(self, ids):
        self.seen = list(ids)

    def step(self, token):
        self.seen.append(token)

    def logits(self):
        return np.array(self.seen, dtype=np.float32)


def test_a_worker_answers_line_by_line(monkeypatch, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"vocab_size": 100}')
    monkeypatch.setitem(ENGINES, "counter", Counter)
    requests = [
        {"do": "decode", "prompt": 2, "new": 2},
        {"do": "prefill", "prompt": 5},
        {"do": "logits", "prompt": 6, "new": 3},
        {"do": "memory"},
        {"do": "sing"},
    ]
    lines, replies = io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), io.StringIO()
    with pytest.raises(ValueError, match="sing"):
        worker.serve("counter", "fp32", tmp_path, 8, 1, lines, replies)
    ready, decode, prefill, logits, memory, error = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert ready == {"ready": True}
    assert decode["seconds"] > 0 and prefill["seconds"] > 0
    ids = prompt_ids(8, 100)
    seen = np.frombuffer(base64.b64decode(logits["logits"]), dtype=np.float32)
    assert seen.tolist() == [*ids, ids[0]]  # past the context they begin again
    assert memory["bytes"] >= 0
    assert "sing" in error["error"]


@pytest.fixture
def tiny_models(tmp_path):
    config = GPTConfig(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    model = llmfast.GPT(config).eval()
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="workers are waited for with select, which takes no pipes there")
def test_our_own_worker_in_a_process(tiny_models):
    model, folder = tiny_models
    process = client.Worker(OURS_FP32, folder, capacity=64, threads=1)
    try:
        process.wait_until_ready()
        ids = torch.tensor([prompt_ids(12, 61)])
        with torch.inference_mode(), llmfast.use_backend("pytorch"):
            expected = model(ids)[0, -1].numpy()
        np.testing.assert_allclose(process.logits(prompt=9, new=3), expected, atol=1e-4)
        assert process.ask("decode", prompt=4, new=4)["seconds"] > 0
        process.settle()
        with pytest.raises(client.WorkerError, match="don't know how to 'sing'"):
            process.ask("sing")
        with pytest.raises(client.WorkerError, match="has ended"):
            process.ask("memory")
    finally:
        process.close()


@pytest.mark.skipif(sys.platform == "win32", reason="workers are waited for with select, which takes no pipes there")
def test_a_worker_without_its_model_says_so(tmp_path):
    process = client.Worker(OURS_FP32, tmp_path, capacity=64, threads=1)
    try:
        with pytest.raises(client.WorkerError, match="llmfast fp32: FileNotFoundError"):
            process.wait_until_ready()
    finally:
        process.close()


# ---- The campaign ----


LIMITS = {
    "isa": "avx2",
    "threads": 2,
    "read": {"1": {"median": 20.0, "best": 30.0}, "2": {"median": 40.0, "best": 50.0}},
    "fp32": {"1": {"median": 90.0, "best": 100.0}, "2": {"median": 190.0, "best": 200.0}},
    "bf16": None,
    "int8": None,
}


class FakeWorker:
    """Answers at once; the slower an engine, the longer its made-up times. One engine computes nonsense."""

    def __init__(self, engine: Engine, models: Path, capacity: int, threads: int):
        self.engine, self.turns = engine, 0
        self.slowness = 1.0 + 0.25 * (engine.library != OURS)

    def wait_until_ready(self):
        if self.engine.precision == "q8_0":
            raise client.WorkerError("llama.cpp q8_0: it does not load")

    def ask(self, what, prompt=0, new=0):
        self.turns += 1
        return {"bytes": 5e8} if what == "memory" else {"seconds": 0.01 * (new or prompt) * self.slowness * self.turns}

    def logits(self, prompt, new=0):
        logits = np.arange(5, dtype=np.float32) * (prompt + new)
        return logits[::-1] if self.engine.precision == "int8" and self.engine.library == OURS else logits

    def settle(self):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    logits = {str(length): np.arange(5, dtype=np.float32) * length for length in (32, 512)}
    np.savez(folder / "reference.npz", **logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "Worker", FakeWorker)
        patch.setattr(campaign.limits, "measure", lambda threads, rounds: LIMITS)
        return {
            name: campaign.measure_group(engines, folder, plan.GPT2, QUICK, threads=2, say=lambda what: None)
            for name, engines in GROUPS.items()
        }


@pytest.fixture
def measured(measured_once):
    return copy.deepcopy(measured_once)  # a test may change it


def test_an_engine_without_logits_is_not_checked(measured):
    row = measured["as stored"].row("openvino-genai q4_1")
    assert row.problem is None and row.agreement is None and row.seconds
    assert all(r.checked is None for r in findings.records(measured) if r.backend == "openvino-genai")


def test_engines_take_turns_and_one_that_fails_stands_alone(measured):
    fp32 = measured["fp32"]
    for row in fp32.rows:
        assert row.problem is None and row.memory == 5e8
        assert {case: len(seconds) for case, seconds in row.seconds.items()} == {
            c.name: QUICK.rounds for c in plan.GPT2.cases
        }
    problems = {row.engine.name: row.problem for row in measured["int8"].rows}
    assert problems[f"{LLAMA} q8_0"] == "llama.cpp q8_0: it does not load"
    assert "correlate with transformers' by -1.0000" in problems[f"{OURS} int8"]
    assert problems["CTranslate2 int8"] is None


def test_ratios_are_taken_within_a_round(measured):
    group = measured["fp32"]
    ours, peer = group.row(f"{OURS} fp32"), group.row(f"{LLAMA} f32")
    assert group.ratios(ours, SHORT.name, peer) == pytest.approx([1.25, 1.25])  # though every turn was slower
    assert ours.seconds[SHORT.name][1] > 1.5 * ours.seconds[SHORT.name][0]


def test_shares_are_of_the_best_limit_on_all_threads(measured):
    group = measured["fp32"]
    row = group.row(f"{OURS} fp32")
    row.seconds = {SHORT.name: [0.02, 0.02, 0.5], PREFILL.name: [0.002]}
    short = next(case for case in group.cases if case.name == SHORT.name)
    needed = counting.decode_bytes(GPT2, row.engine.formats, 32, short.new)
    assert group.share(row, short) == pytest.approx(needed / 0.02 / 50e9)
    assert group.share(row, PREFILL) == pytest.approx(counting.prefill_operations(GPT2, 512) / 512 / 0.002 / 200e9)
    assert measured["bf16"].share(measured["bf16"].rows[0], PREFILL) is None  # no instruction, no limit


def test_targets_of_our_own_speed(measured):
    group = measured["fp32"]
    row = group.row(f"{OURS} fp32")
    row.seconds = {SHORT.name: [0.010, 0.010], LONG.name: [0.011, 0.011], BUSY.name: [0.02, 0.02]}
    targets = {t.case: t for t in plan.GPT2.targets if t.ours == row.engine.name and t.own}
    assert group.reached(targets[BUSY.kind]) == pytest.approx([0.5, 0.5])
    short, long = (next(c for c in group.cases if c.name == case.name) for case in (SHORT, LONG))
    assert group.reached(targets[LONG.kind])[0] == pytest.approx(
        10 / 11 * group.work(row, long) / group.work(row, short)
    )


def test_the_plan_names_what_it_measures():
    names = {engine.name for engines in GROUPS.values() for engine in engines}
    assert all(FULL.engines(plan.GPT2, name) == GROUPS[name] for name in plan.GPT2.groups)
    assert FULL.engines(plan.SMOLLM2_FILE, "as stored") == GROUPS["as stored"] == plan.SMOLLM2_FILE.engines()
    for name, model in MODELS.items():
        assert model.name == name and {target.group for target in model.targets} <= {*model.groups} <= {*GROUPS}
        assert model.preset in PRESETS and model.capacity <= PRESETS[model.preset].context
        for target in model.targets:
            assert target.ours in names and (target.peer is None or target.peer in names)
            assert {target.case, target.own} - {None} <= {case.kind for case in model.cases}
        assert not any(engine.slow_start for name in GROUPS for engine in QUICK.engines(model, name))
        for effort in (FULL, QUICK):
            assert [case.name for case in effort.cases(model)] == [case.name for case in model.cases]
            assert all(case.prompt + case.new < model.capacity for case in effort.cases(model))


def test_a_target_may_be_a_share_of_the_machines_limit(measured):
    group = measured["fp32"]
    row = group.row(f"{OURS} fp32")
    found = group.reached(plan.Target("fp32", row.engine.name, "short", 0.9))
    assert found[0] == pytest.approx(group.rates(row, SHORT.name)[0] * group.work(row, group.case("short")) / 50e9)


def test_a_token_of_smollm2_reads_this_many_bytes():
    # By hand: 30 blocks of 576 · (576 + 2 · 192) + 576 · 576 + 3 · 576 · 1536 weights, a head of 49152 · 576, norms.
    blocks, head, norms = 30 * (576 * 960 + 576 * 576 + 3 * 576 * 1536), 49152 * 576, 61 * 576
    smollm2 = PRESETS["smollm2-135m"]
    assert counting.weight_bytes(smollm2, Formats("f32", "f32", "f32")) == 4 * (blocks + head + norms)
    assert counting.cache_bytes(smollm2, "bf16") == 2 * 2 * 30 * 3 * 64
    assert counting.step_operations(smollm2, 10) == 2 * (blocks + head) + 4 * 30 * 9 * 64 * 10


# ---- Records ----


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    return console.file.getvalue()


def test_records_go_into_a_file_and_problems_are_among_them(measured, tmp_path):
    found = findings.records(measured)
    save(Results({}, {}, tuple(found)), tmp_path / "r.json")
    assert load(tmp_path / "r.json").records == tuple(found)
    problems = {(r.backend, r.precision): r.problem for r in found if r.problem}
    assert problems[LLAMA, "q8_0"] == "llama.cpp q8_0: it does not load"
    assert (OURS, "int8") in problems and (OURS, "int4") not in problems
    memory = [r for r in found if r.group == "memory"]
    assert {r.backend for r in memory} == {
        OURS, LLAMA, "CTranslate2", "transformers", "transformers compiled", "openvino-genai",
    }  # fmt: skip
    assert all(r.bytes == 5e8 for r in memory)


def test_a_record_says_the_speed_its_share_and_how_many_times_the_peers_it_is(measured):
    found = findings.records({"fp32": measured["fp32"]})
    ours = next(r for r in found if (r.backend, r.name, r.sizes) == (OURS, "decode", {"batch": 1, "context": 32}))
    assert ours.rates["tokens_per_second"] == pytest.approx(1 / ours.seconds.median, abs=0.1)
    assert ours.limit == "read" and 0 < ours.share_of_limit < 1 and ours.checked == 0
    assert {v.competitor: round(v.ratio.median, 2) for v in ours.versus} == {
        "llama.cpp f32": 1.25,
        "CTranslate2 float32": 1.25,
        "transformers fp32": 1.25,
        "transformers compiled fp32": 1.25,
    }
    theirs = next(r for r in found if r.backend == LLAMA)
    assert theirs.versus == ()


def test_every_target_missed_is_said(measured):
    text = shown(findings.targets(measured))
    assert "MISSED" in text and "met" in text and "not measured" in text
