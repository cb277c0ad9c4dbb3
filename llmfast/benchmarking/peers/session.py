"""All groups, each measured when it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from llmfast.benchmarking import limits
from llmfast.benchmarking.peers import client
from llmfast.benchmarking.peers.campaign import Group, measure_group
from llmfast.benchmarking.peers.models import is_made
from llmfast.benchmarking.peers.plan import Effort, Model
from llmfast.models import PRESETS


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
        self.models = models_folder() / model.preset
        if not is_made(self.models):
            say(f"making {model.title} with random weights in every format, once")
            document = PRESETS[model.preset].to_document()
            made = client.run_module("models", self.models, json.dumps(document))
            if made.returncode:
                raise ValueError(f"the models could not be made: {made.stderr.strip().splitlines()[-1]}")

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
    """Where the models are kept between runs, about 1.4 GB each."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmfast" / "peers"
    return Path(os.environ.get("LLMFAST_PEERS_CACHE") or default)
