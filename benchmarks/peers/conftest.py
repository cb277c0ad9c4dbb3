"""The campaign that the rows of test_peers.py share: it measures a group when its first row is asked for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmfast import GPTConfig
from llmfast.backends import cpp
from peers import client, report
from peers.campaign import Group, measure_group
from peers.models import is_made
from peers.plan import FULL, GROUPS, QUICK

RESULTS = Path(__file__).resolve().parents[1] / "results" / "peers.json"
CAMPAIGN = pytest.StashKey["Campaign"]()


class Campaign:
    def __init__(self, config: pytest.Config):
        self.quick: bool = config.getoption("quick")
        self.threads: int = config.getoption("threads")
        self.facts = report.facts(self.threads, self.quick)
        self.groups: dict[str, Group] = {}
        self.models = models_folder()
        self._plugins = config.pluginmanager
        if not is_made(self.models):
            self.say("making GPT-2 124M with random weights in every format, once")
            command = [client.peers_python(), "-m", "peers.models", str(self.models)]
            made = subprocess.run(command, cwd=client.BENCHMARKS, capture_output=True, text=True)
            if made.returncode:
                pytest.fail(f"the models could not be made:\n{made.stderr[-2000:]}", pytrace=False)

    def say(self, what: str) -> None:
        """A line for whoever waits, past pytest's capture."""
        with self._plugins.getplugin("capturemanager").global_and_fixture_disabled():
            self._plugins.getplugin("terminalreporter").write_line(what)

    def group(self, name: str) -> Group:
        if name not in self.groups:
            self.say(f"\n{name}")
            effort, config = QUICK if self.quick else FULL, GPTConfig.preset("gpt2")
            self.groups[name] = measure_group(GROUPS[name], self.models, config, effort, self.threads, self.say)
        return self.groups[name]

    @property
    def results(self) -> dict[str, Any]:
        return self.facts | report.results(self.groups)


def models_folder() -> Path:
    """Where the models are kept between runs, about 1.4 GB."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmfast" / "peers"
    return Path(os.environ.get("LLMFAST_PEERS_CACHE") or default)


@pytest.fixture(scope="session")
def campaign(request: pytest.FixtureRequest) -> Campaign:
    missing = client.missing_packages()
    if missing:
        pytest.skip(f'not installed: {", ".join(missing)} (pip install -e ".[peers]"; see docs/benchmarks.md)')
    reason = cpp._missing
    if reason is not None:
        pytest.skip(f"the machine's limits are measured by the C++ extension: {reason}")
    campaign = request.config.stash[CAMPAIGN] = Campaign(request.config)
    return campaign


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The tables; and the results, where all of it was measured with full effort."""
    campaign = config.stash.get(CAMPAIGN, None)
    if campaign is None or not campaign.groups:
        return
    found = campaign.results
    terminalreporter.write(report.tables(found))
    if set(campaign.groups) == set(GROUPS) and not campaign.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"wrote {RESULTS}; python benchmarks/readme.py brings it into the README")
