"""The table of fine-tuning's results: that of the page is what the results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import finetuning  # noqa: E402


def test_the_page_shows_the_results():
    results = json.loads(finetuning.RESULTS.read_text(encoding="utf-8"))
    assert finetuning.table(results) in finetuning.PAGE.read_text(encoding="utf-8")


def test_runs_stand_beside_those_of_other_seeds_and_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "RESULTS", tmp_path / "results.json")
    task = finetuning.TASKS["instructions"]

    def found(seed: int, loss: float) -> dict:
        return {"seed": seed, "before": {"test": {"loss": 2.0}}, "after": {"test": {"loss": loss}}}

    for run in (found(1, 1.0), found(0, 1.4), found(1, 1.2)):
        entry = finetuning.keep("instructions", task, run)
    assert [run["seed"] for run in entry["runs"]] == [0, 1]
    assert entry["summary"]["after test loss"]["mean"] == pytest.approx(1.3)
    rows = finetuning.table(json.loads(finetuning.RESULTS.read_text())).splitlines()[2:]
    assert rows == ["| instructions | 2 | test loss | 2.000 ± 0.000 | 1.300 ± 0.141 |"]
    other = finetuning.Task("smollm2", finetuning.instructions, {"epochs": 9.0})
    assert len(finetuning.keep("instructions", other, found(2, 1.0))["runs"]) == 1
