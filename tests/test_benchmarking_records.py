"""Results go into a file and come back the same; anything else is refused in one line."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.benchmarking import records
from llmfast.benchmarking.facts import facts
from llmfast.benchmarking.records import GROUPS, LIMITS, RATES, Record, Results, Spread, Versus

positive = st.floats(1e-9, 1e9)
spreads = st.lists(positive, min_size=1, max_size=9).map(Spread.of)
measured = st.one_of(
    st.fixed_dictionaries({"seconds": spreads}),
    st.fixed_dictionaries({"bytes": st.integers(0, 2**50)}),
    st.fixed_dictionaries({"problem": st.text(min_size=1)}),
)
any_record = st.builds(
    lambda measured, **others: Record(**measured, **others),
    measured=measured,
    group=st.sampled_from(sorted(GROUPS)),
    name=st.text(min_size=1),
    backend=st.text(min_size=1),
    precision=st.sampled_from(["fp32", "bf16", "int8", "q4_0"]),
    device=st.sampled_from(["cpu", "cuda"]),
    sizes=st.dictionaries(st.sampled_from(["tokens", "batch", "width"]), st.integers(0, 1 << 40)),
    model=st.none() | st.just("gpt2"),
    rates=st.dictionaries(st.sampled_from(RATES), positive),
    limit=st.none() | st.sampled_from(LIMITS),
    share_of_limit=st.none() | st.floats(0, 2),
    versus=st.lists(st.builds(Versus, st.text(min_size=1), spreads), max_size=3).map(tuple),
    checked=st.none() | st.floats(0, 1),
    note=st.none() | st.text(min_size=1),
)


@given(found=st.lists(any_record, max_size=4))
def test_results_come_back_as_they_were(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("results") / "r.json"
    results = Results({"threads": 2}, {"read": {"2": {"median": 1.0, "best": 2.0}}}, tuple(found))
    records.save(results, path)
    assert records.load(path) == results


def test_a_spread_is_of_its_rounds():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group": "speeds"}, "group must be one of ops, launches, prefill"),
        ({"seconds": None}, "needs one of seconds, bytes and problem"),
        ({"bytes": 3}, "needs one of"),
        ({"rates": {"miles_per_hour": 1.0}}, "miles_per_hour"),
        ({"limit": "disk"}, "limit must be one of"),
    ],
)
def test_a_record_that_means_nothing_is_refused(changes, message):
    sound = {"group": "ops", "name": "gelu", "backend": "cpp", "precision": "fp32", "device": "cpu"}
    sound["seconds"] = Spread.of([1.0])
    Record(**sound)
    with pytest.raises(ValueError, match=message):
        Record(**(sound | changes))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"facts": {}, "limits": {}}', '{"facts": {}, "limits": {}, "records": [{"group": "ops"}]}']
    + ['{"facts": {}, "limits": {}, "records": [{"speed": 3}]}', '{"facts": 1, "limits": {}, "records": []}'],
)
def test_another_file_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no file of benchmark results") as caught:
        records.load(path)
    assert "\n" not in str(caught.value)


def test_numbers_that_json_does_not_have_are_not_written(tmp_path):
    record = Record("ops", "gelu", "cpp", "fp32", "cpu", seconds=Spread.of([float("nan")]))
    with pytest.raises(ValueError):
        records.save(Results({}, {}, (record,)), tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_facts_say_where_and_by_what(monkeypatch):
    found = facts(command=["llmfast", "bench", "ops", "--backend", "a b"])
    assert found["command"] == "llmfast bench ops --backend 'a b'"
    assert found["versions"]["torch"] and found["machine"]["cores"] >= 1 and found["threads"] >= 1
    assert json.loads(json.dumps(found)) == found
