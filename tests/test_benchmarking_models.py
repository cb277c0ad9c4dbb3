"""Models, training, memory and tokenizers as they are measured, on the embedded model and on tiny ones."""

from __future__ import annotations

import sys

import pytest
import torch

import llmfast
from llmfast.backends import cpp
from llmfast.benchmarking import (
    model_cases,
    models,
    peak_memory,
    startup_cases,
    suite,
    tables,
    tokenizer_cases,
    training_cases,
)
from llmfast.benchmarking.comparison import Entry, WrongResult, run
from llmfast.benchmarking.peers import counting
from llmfast.benchmarking.records import GROUPS, Results
from llmfast.benchmarking.timing import Effort

ONCE = Effort(seconds=0.0, rounds=(1, 1), turn=0.0)
native = pytest.mark.skipif(
    cpp.why_not("linear", torch.device("cpu"), torch.float32) is not None, reason="no native decoder here"
)


def records_of(comparison):
    return {str(Entry(m.record.backend, m.record.precision)): m.record for m in run(comparison, ONCE)}


def test_prefill_decode_and_generate_are_right_and_have_a_speed(storyteller_directory):
    model, precisions = str(storyteller_directory), ["fp32", "bf16", "int8"]
    context = models.config_of(model).n_positions
    found = [
        *model_cases.prefill(model, [8, 10**6], precisions),
        *model_cases.generate(model, [6], ["fp32"]),
        *model_cases.first_token(model, [4], precisions),
    ]
    found += model_cases.decode(model, [5], [1, 3], precisions) if context > model_cases.SPAN + 5 else []
    assert {c.group for c in found} >= {"prefill", "generate", "latency"}
    for comparison in found:
        for name, record in records_of(comparison).items():
            assert record.problem is None, (comparison.title, name, record.problem)
            assert record.rates["tokens_per_second"] > 0 and (record.checked is None or record.checked <= 1)


@native
def test_who_runs_a_model():
    assert [str(e) for e in models.competitors(["fp32", "int8"])] == ["pytorch fp32", "cpp fp32", "cpp int8"]
    assert [str(e) for e in models.competitors(["bf16"], chosen=["cpp", "pytorch"])] == ["pytorch bf16", "cpp bf16"]


def test_somebodys_one_op_runs_among_the_others(monkeypatch):
    monkeypatch.setattr(models, "backends", lambda: [row for row in llmfast.backends() if row.op != "linear"])
    assert "linear" not in models.ops_of("pytorch", "cpu") and models.ops_of("pytorch", "cpu")["gelu"] == "pytorch"


def test_wrong_logits_are_refused():
    right = torch.randn(100)
    assert models.check_logits(right, right, "fp32") == 0
    for precision in ("fp32", "bf16", "int4"):
        with pytest.raises(WrongResult, match="its logits differ"):
            models.check_logits(-right, right, precision)
    with pytest.raises(WrongResult):
        models.check_logits(right + 0.01, right, "fp32")
    assert models.check_logits(right + 0.01, right, "bf16") < 0.01  # no token gets likelier than another


def test_a_text_may_differ_at_a_near_tie_only():
    llm = llmfast.load(precision="fp32", backend="pytorch")
    expected = llm.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, temperature=0)
    assert model_cases.check_text(llm, expected, expected) == 0
    other = expected.clone()
    other[0, 5] = (other[0, 5] + 1) % llm.config.vocab_size
    with pytest.raises(WrongResult, match="token 5 differs"):
        model_cases.check_text(llm, other, expected)


def test_the_bytes_of_a_batch_count_the_weights_once():
    alone, together = [c.work(Entry("cpp", "bf16")) for c in model_cases.decode("gpt2", [32], [1, 4], ["bf16"])]
    config, formats = models.config_of("gpt2"), models.FORMATS["bf16"]
    cached = counting.cache_bytes(config, "bf16") * (32 + model_cases.SPAN / 2)
    assert alone.read == counting.weight_bytes(config, formats) + cached
    assert together.read == alone.read + 3 * cached and (alone.tokens, together.tokens) == (1, 4)
    assert together.operations == 4 * alone.operations


def test_training_operations_are_three_times_those_of_reading():
    config = llmfast.GPTConfig(vocab_size=10, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    # A token: 2 operations for each of 12 · 16 weights and of the head's 40; each pair it sees 4 · 4 in its layer.
    assert counting.training_operations(config, batch=2, tokens=3) == 3 * (2 * 3 * 2 * (192 + 40) + 2 * 6 * 16)


def test_a_step_of_training(storyteller_directory):
    (comparison,) = training_cases.training(str(storyteller_directory), [7], ["fp32", "bf16", "int8"])
    for name, record in records_of(comparison).items():
        assert record.problem is None, (name, record.problem)
        assert record.sizes == {"batch": 4, "tokens": 7} and record.checked <= 1


def test_training_of_a_wrong_kernel_is_refused(storyteller_directory, monkeypatch):
    (comparison,) = training_cases.training(str(storyteller_directory), [7], ["fp32"])
    first = training_cases.Step.first
    monkeypatch.setattr(
        training_cases.Step,
        "first",
        lambda step: tuple(1.1 * x if step.backend != "pytorch" else x for x in first(step)),
    )
    found = records_of(comparison)
    assert found.pop("pytorch fp32").problem is None
    assert all("not timed: loss" in record.problem for record in found.values())


def test_tokenizers_agree_and_have_a_speed():
    for comparison in tokenizer_cases.comparisons([3000], [300], learn_from=3000):
        found = records_of(comparison)
        assert "llmfast any" in found
        for record in found.values():
            assert record.problem is None and record.rates["megabytes_per_second"] > 0


def test_a_tokenizer_that_says_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer_cases.BPETokenizer, "decode", lambda self, ids: "something else")
    found = {c.name: c for c in tokenizer_cases.comparisons([3000], [], learn_from=3000)}
    assert "not timed" in records_of(found["bpe encode"])["llmfast any"].problem
    assert records_of(found["char encode"])["llmfast any"].problem is None


def test_the_text_is_as_long_as_asked_for():
    for length in (0, 10, 1_000_000):
        assert len(tokenizer_cases.text_of(length)) == length


def test_memory_of_a_process():
    """Tensors of 8 MB and their copies take at least that, and far less than what importing torch does."""
    task = peak_memory.Task("gelu forward", 4096, Entry("pytorch", "fp32"), "cpu")
    record = peak_memory.run(task, {}).record
    assert record.problem is None
    assert 2 * 4 * 4096 * 3072 * 0.9 < record.bytes < 3 * 4 * 4096 * 3072


@pytest.fixture
def broken_python(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'a long story' >&2\necho 'it broke' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Python")
def test_a_process_that_fails_is_a_problem(broken_python):
    record = peak_memory.run(peak_memory.Task("gelu forward", 8, Entry("pytorch", "fp32"), "cpu"), {}).record
    assert record.bytes is None and record.problem == "RuntimeError: it broke"
    imports, *_ = startup_cases.startup("stories", ["fp32"])
    assert {r.problem for r in records_of(imports).values()} == {"RuntimeError: it broke"}


def test_a_process_is_timed_by_what_it_says_or_by_its_life():
    assert startup_cases._said("print(0.25)")() == 0.25
    assert 0.05 < startup_cases._took("import time; time.sleep(0.05)")() < 20


def test_every_scale_has_every_group_and_precisions_select():
    for scale in suite.SCALES.values():
        assert {suite.group_of(item) for item in suite.plan(scale)} == set(suite.GROUPS) <= set(GROUPS)
    selected = suite.plan(suite.SCALES["quick"], suite.Selection(("ops", "decode"), precisions=("bf16",)))
    assert {entry.precision for item in selected for entry in item.entries} == {"bf16"}


def test_the_best_limits_of_a_run():
    def limits(read: float, bf16: float | None):
        rates = {"bf16": {"1": {"best": bf16}, "2": {"best": bf16}} if bf16 else None}
        return {"isa": "x", "threads": 2, "read": {"1": {"best": read}, "2": {"best": read}}} | rates

    best = suite.best_limits([limits(40.0, None), limits(30.0, None)])
    assert best["read"]["2"]["best"] == 40.0 and best["bf16"] is None and best["int8"] is None
    assert suite.best_limits([]) == {}


@pytest.mark.parametrize("seconds, text", [(2.0, "2 s"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (4.56e-6, "4.56 µs")])
def test_durations_are_read_easily(seconds, text):
    assert tables.duration(seconds) == text


def test_tables_hold_every_record(storyteller_directory):
    (comparison,) = training_cases.training(str(storyteller_directory), [7], ["fp32"])
    records = tuple(m.record for m in run(comparison, ONCE))
    (table,) = tables.tables(Results({}, {}, records))
    assert table.row_count == 1 and len(table.columns) == 3 + len(records)
