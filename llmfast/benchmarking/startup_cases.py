"""The wait before anything runs: importing, loading, and a first text, each in a fresh process."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work
from llmfast.benchmarking.models import competitors, path_of

ANY = "any"  # precision
IMPORT = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
LOAD = (
    "import llmfast, time; start = time.perf_counter(); "
    "llmfast.load({path!r}, precision={precision!r}, backend={backend!r}); print(time.perf_counter() - start)"
)
FIRST = (
    "import llmfast, torch; llm = llmfast.load({path!r}, precision={precision!r}, backend={backend!r}); "
    "llm.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=1)"
)


def startup(model: str, precisions: Sequence[str], chosen: Sequence[str] = ()) -> Iterator[Comparison]:
    """Importing the package beside importing torch; loading; and from nothing to the first token."""
    entries = tuple(e for e in competitors(precisions, "cpu", chosen) if e.backend in ("pytorch", "cpp"))
    libraries = (Entry("torch", ANY), Entry("llmfast", ANY))
    yield _comparison("import", libraries, lambda entry: _said(IMPORT.format(module=entry.backend)), None)

    def load(entry: Entry) -> Callable[[], float]:
        return _said(LOAD.format(path=_path(model), precision=entry.precision, backend=entry.backend))

    def first(entry: Entry) -> Callable[[], float]:
        return _took(FIRST.format(path=_path(model), precision=entry.precision, backend=entry.backend))

    yield _comparison("load", entries, load, model)
    yield _comparison("start to first token", entries, first, model)


def _path(model: str) -> str:
    return str(Path(path_of(model)).resolve())


def _comparison(
    name: str, entries: tuple[Entry, ...], turn_of: Callable[[Entry], Callable[[], float]], model: str | None
) -> Comparison:
    return Comparison(
        group="latency",
        name=name,
        device="cpu",
        entries=entries,
        start=lambda: lambda entry: Contestant(turn_of(entry)),
        work=lambda entry: Work(),
        model=model,
        baselines=("torch",) if model is None else ("pytorch",),
    )


def _said(code: str) -> Callable[[], float]:
    """The seconds that a process prints."""
    return functools.partial(_run, code, lambda output, took: float(output))


def _took(code: str) -> Callable[[], float]:
    """The seconds that a process takes from its start to its end."""
    return functools.partial(_run, code, lambda output, took: took)


def _run(code: str, seconds_of: Callable[[str, float], float]) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return seconds_of(done.stdout, took)
