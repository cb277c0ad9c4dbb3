"""pytest-benchmark measures one function at a time, and here competitors take turns: it is shown what was measured.

Its timer is a clock that stands still but for the seconds of a round that it is told.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmfast.benchmarking.comparison import Measured

_now = 0.0


def recorded_time() -> float:
    return _now


def replay_rounds(benchmark: Any, group: str, measured: Measured, facts: dict[str, Any]) -> None:
    """Passes the rounds' seconds by, and adds what is known about them to `extra_info`."""
    seconds = iter(measured.rounds)

    def pass_time() -> None:
        global _now
        _now += next(seconds)

    benchmark.group = group
    benchmark.pedantic(pass_time, rounds=1 if benchmark.disabled else len(measured.rounds))
    record = {name: value for name, value in asdict(measured.record).items() if value not in (None, (), {})}
    record |= record.pop("rates", {})
    if "bytes" in record:
        record["peak_memory"] = record.pop("bytes")
    benchmark.extra_info.update(record)
    benchmark.extra_info.update({name: facts[name] for name in ("threads", "isa", "versions", "commit", "dirty")})
