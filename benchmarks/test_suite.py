"""Every competitor in everything that `llmfast.benchmarking.suite` measures, as rows of pytest-benchmark.

pytest benchmarks --benchmark-only                            # --quick, --full
pytest benchmarks --benchmark-only -k "ops and gelu"          # or prefill, decode, generate, latency, training, …
"""

from __future__ import annotations

from typing import Any

import pytest
from recorded import recorded_time

from llmfast.benchmarking.comparison import Measured


@pytest.mark.benchmark(timer=recorded_time)
def test_suite(competitor: Any, measured: Measured, replay: Any):
    record = measured.record
    sizes = ", ".join(f"{name} {value}" for name, value in record.sizes.items())
    precision = record.precision if record.group == "ops" else None  # elsewhere precisions compete
    parts = (record.group, record.name, record.model, sizes, precision)
    replay(", ".join(part for part in parts if part), measured)
