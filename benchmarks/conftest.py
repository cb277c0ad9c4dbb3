"""The options of the benchmarks, and what tests share: the measurements of a run, each made when a row of it is first
asked for, with all its competitors in turns."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import replay_rounds
from rich.console import Console

from llmfast.benchmarking import suite, tables
from llmfast.benchmarking.comparison import Comparison, Measured
from llmfast.benchmarking.facts import facts
from llmfast.benchmarking.peers import findings, plan, session
from llmfast.benchmarking.records import Results
from llmfast.threads import thread_count

RUN = pytest.StashKey["Measurements"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llmfast's benchmarks")
    group.addoption("--quick", action="store_true", help="small sizes and few rounds, under two minutes")
    group.addoption("--full", action="store_true", help="every size and many rounds, as long as it takes")
    group.addoption("--threads", type=int, help="threads of each competitor (default: what torch chooses)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick") and config.getoption("full"):
        raise pytest.UsageError("--quick or --full, not both")
    if (threads := config.getoption("threads")) is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


class Measurements:
    """What one run of pytest measures."""

    def __init__(self, config: pytest.Config):
        full, quick = config.getoption("full"), config.getoption("quick")
        self.scale = suite.SCALES["full" if full else "quick" if quick else "usual"]
        # Among everything else the peers are measured quickly, so that all of it takes less than ten minutes.
        thorough = full or ("peers" in config.getoption("keyword") and not quick)
        self.peers_effort = plan.FULL if thorough else plan.QUICK
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.items = suite.plan(self.scale, suite.Selection(device=device))
        self.facts = facts()
        self.limits: list[dict[str, Any]] = []
        self.peers: session.Session | None = None
        self._found: dict[int, list[Measured]] = {}
        self._group: str | None = None
        self._plugins = config.pluginmanager

    def say(self, what: str) -> None:
        """A line of progress, past pytest's capture."""
        with self._plugins.getplugin("capturemanager").global_and_fixture_disabled():
            self._plugins.getplugin("terminalreporter").write_line(what)

    def measured(self, number: int, backend: str, precision: str) -> Measured:
        """The result of one competitor in one of `items`."""
        if number not in self._found:
            item = self.items[number]
            self.say(f"\n{number + 1} of {len(self.items)}: {suite.title_of(item)}")
            if (group := suite.group_of(item)) != self._group:
                suite.measure_limits(self.limits, item.device)
                self._group = group
            ((_, found),) = suite.run([item], self.scale.effort, self.limits, fresh_limits=False)
            self._found[number] = found
        rows = self._found[number]
        return next(row for row in rows if (row.record.backend, row.record.precision) == (backend, precision))

    @property
    def results(self) -> Results:
        records = [row.record for number in sorted(self._found) for row in self._found[number]]
        records += findings.records(self.peers.groups) if self.peers is not None else []
        return Results(self.facts, suite.best_limits(self.limits), tuple(records))


def run_of(config: pytest.Config) -> Measurements:
    if RUN not in config.stash:
        config.stash[RUN] = Measurements(config)
    return config.stash[RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each competitor in each thing measured, named so that -k selects by any part."""
    if "competitor" not in metafunc.fixturenames:
        return
    rows, names = [], []
    for number, item in enumerate(run_of(metafunc.config).items):
        entries = item.entries if isinstance(item, Comparison) else (item.entry,)
        for entry in entries:
            sizes = [f"{name}={value}" for name, value in item.sizes.items()]
            parts = [suite.group_of(item), item.name, item.model, *sizes, entry.precision, entry.backend]
            rows.append((number, entry))
            names.append("-".join(part.replace(" ", "_") for part in parts if part))
    metafunc.parametrize("competitor", rows, ids=names)


@pytest.fixture
def measured(request: pytest.FixtureRequest, competitor: Any) -> Measured:
    number, entry = competitor
    return run_of(request.config).measured(number, entry.backend, entry.precision)


@pytest.fixture(scope="session")
def peers_session(request: pytest.FixtureRequest) -> session.Session:
    if (reason := session.why_not()) is not None:
        pytest.skip(reason)
    run = run_of(request.config)
    run.peers = session.Session(plan.GPT2, run.peers_effort, thread_count(), run.say)
    return run.peers


@pytest.fixture
def replay(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, Measured], None]:
    """Hands pytest-benchmark the rounds that were measured, with everything that is known about them."""
    run = run_of(request.config)

    def hand_over(group: str, measured: Measured) -> None:
        if measured.record.problem is not None:
            pytest.fail(measured.record.problem, pytrace=False)
        replay_rounds(benchmark, group, measured, run.facts)

    return hand_over


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The tables, with ratios and shares of the limits."""
    if RUN not in config.stash or not (results := config.stash[RUN].results).records:
        return
    # Only a file that is no terminal has a width of its own; the reporter writes the text out.
    console = Console(file=io.StringIO(), width=tables.WIDTH, force_terminal=False)
    for table in tables.tables(results):
        console.print(table)
    if results.limits:
        console.print(tables.limits_table(results.limits))
    run = config.stash[RUN]
    if run.peers is not None and run.peers.groups:
        console.print(findings.targets(run.peers.groups))
    terminalreporter.write(console.file.getvalue())  # type: ignore[attr-defined]
