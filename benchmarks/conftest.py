"""The options of the benchmarks, and the fixture that checks and times one call of an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measuring import DEVICE, facts

import llmfast
from llmfast.backends import reference


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llmfast's benchmarks")
    group.addoption("--quick", action="store_true", help="peers: fewer rounds and tokens, under two minutes")
    group.addoption("--threads", type=int, default=2, help="peers: threads of every engine (default: 2)")


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """Checks a call against the float64 reference, then times it; a wrong kernel has no speed."""

    def run(backend: str, op: str, arguments: tuple, settings: dict, *, bytes_moved: int, operations: int) -> None:
        function = getattr(llmfast.ops, op)

        def call() -> Any:
            result = function(*arguments, **settings)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        with torch.inference_mode(), llmfast.use_backend(backend):
            expected = getattr(reference, op)(*arguments, **settings)
            dtype = arguments[0].dtype
            tolerance = 16 * torch.finfo(dtype).eps * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(call().double(), expected, rtol=0, atol=tolerance)
            benchmark.pedantic(call, rounds=15, warmup_rounds=3)
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(
            backend=backend,
            dtype=str(dtype).removeprefix("torch."),
            shape=str(tuple(arguments[0].shape)),
            gigabytes_per_second=round(bytes_moved / seconds / 1e9, 2),
            gigaflops=round(operations / seconds / 1e9, 1),
            **facts(),
        )

    return run
