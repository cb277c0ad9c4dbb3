"""The peers' rows for pytest-benchmark: one an engine and case, measured with its whole group before the first.

pytest benchmarks -k peers --benchmark-only             # -k "peers and int8" for one group
"""

from __future__ import annotations

from typing import Any

import pytest
from recorded import recorded_time

from llmfast.benchmarking.comparison import Measured
from llmfast.benchmarking.peers.findings import speed_of
from llmfast.benchmarking.peers.plan import GPT2, GROUPS, OURS

ROWS = [
    pytest.param(group, engine, case, id=f"{group}-{engine.name}-{case.name}")
    for group in GPT2.groups
    for engine in GROUPS[group]
    for case in GPT2.cases
]


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize("group_name, engine, case", ROWS)
def test_peers(group_name, engine, case, peers_session: Any, replay: Any):
    """The engines of a group take turns, which pytest-benchmark cannot do; it is given the seconds a token took."""
    if engine not in peers_session.effort.engines(GPT2, group_name):
        pytest.skip("it takes too long to start for a quick run: -k peers, or --full")
    group = peers_session.group(group_name)
    row = group.row(engine.name)
    if row.problem is not None and engine.library != OURS:
        pytest.skip(row.problem)
    measured = next(c for c in group.cases if c.name == case.name)
    replay(case.name, Measured(speed_of(group, row, measured), tuple(row.seconds.get(case.name, ()))))
