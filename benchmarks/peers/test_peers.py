"""The peers' rows for pytest-benchmark: one an engine and case, measured with its whole group before the first.

pytest benchmarks -k peers --benchmark-only             # -k "peers and int8" for one group
"""

from __future__ import annotations

from typing import Any

import pytest

from peers.plan import CASES, GROUPS, OURS
from peers.report import row_of

ROWS = [
    pytest.param(group, engine, case, id=f"{group}-{engine.name}-{case.name}")
    for group, engines in GROUPS.items()
    for engine in engines
    for case in CASES
]

_recorded: list[float] = [0.0]  # a clock that shows what was measured earlier


def recorded_time() -> float:
    return _recorded[0]


@pytest.mark.parametrize("group_name, engine, case", ROWS)
@pytest.mark.benchmark(timer=recorded_time)
def test_peers(group_name, engine, case, campaign: Any, benchmark: Any):
    """The engines of a group take turns, which pytest-benchmark cannot do; it is given the seconds a token took."""
    benchmark.group = case.name
    group = campaign.group(group_name)
    row = group.row(engine.name)
    if row.problem is not None and engine.library != OURS:
        pytest.skip(row.problem)
    assert row.problem is None, row.problem

    seconds = iter(row.seconds[case.name])

    def pass_time() -> None:
        _recorded[0] += next(seconds)

    benchmark.pedantic(pass_time, rounds=1 if benchmark.disabled else len(row.seconds[case.name]))
    measured = next(c for c in group.cases if c.name == case.name)
    benchmark.extra_info.update(row_of(group_name, group, row, measured), threads=campaign.threads)
    if case is CASES[0]:
        benchmark.extra_info["megabytes"] = round(row.memory / 1e6, 1)
