"""All groups, each measured when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from llmfast.benchmarking import limits
from llmfast.benchmarking.peers import client, making
from llmfast.benchmarking.peers.campaign import Group, measure_group
from llmfast.benchmarking.peers.plan import Effort, Model


def why_not() -> str | None:
    """Why the peers can't be measured here, or None."""
    if missing := client.missing_packages():
        return f'not installed: {", ".join(missing)} (pip install "llmfast-kernels[peers]"; see docs/benchmarks.md)'
    return limits.why_not()


class Session:
    """Measures groups with `effort`, and tells `say` in a line what goes on. `ValueError` where `why_not` says so."""

    def __init__(self, model: Model, effort: Effort, threads: int, say: Callable[[str], None]):
        if (reason := why_not()) is not None:
            raise ValueError(f"the peers can't be measured: {reason}")
        self.model, self.effort, self.threads, self.say = model, effort, threads, say
        self.groups: dict[str, Group] = {}
        self.models = models_folder() / model.name
        if not making.is_made(self.models):
            say(f"making {model.title} in every format, once")
            making.make(self.models, model)

    def group(self, name: str) -> Group:
        if name not in self.groups:
            self.groups[name] = measure_group(
                self.effort.engines(self.model, name),
                self.models,
                self.model,
                self.effort,
                self.threads,
                lambda what: self.say(f"{name}: {what}"),
            )
        return self.groups[name]


def models_folder() -> Path:
    """Where the models are kept between runs, up to 1.4 GB each."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmfast" / "peers"
    return Path(os.environ.get("LLMFAST_PEERS_CACHE") or default)
