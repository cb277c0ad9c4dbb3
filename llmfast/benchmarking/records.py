"""A result, and the JSON file that keeps many of them with the machine and the limits they were measured beside.

    {"facts": {...}, "limits": {...}, "records": [{...}, ...]}

Times are in seconds, memory in bytes, rates in tokens, 10^9 bytes and 10^9 operations a second.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmfast.files import write_atomic

# The groups of a report, in its order.
GROUPS = {
    "ops": "single operations, forward and backward",
    "launches": "what Python takes to launch a single operation on a GPU",
    "prefill": "reading a prompt",
    "decode": "a token at a time after a prompt",
    "generate": "whole texts, with the KV cache and without it",
    "latency": "import, loading, and the time to the first token",
    "training": "a step of training",
    "tokenizer": "text to tokens and back, and learning a vocabulary",
    "memory": "the most memory at once",
    "peers": "models of known shapes beside other libraries",
}
RATES = ("tokens_per_second", "megabytes_per_second", "gigabytes_per_second", "gigaflops_per_second")
LIMITS = ("read", "copy", "fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Spread:
    """The median, the lowest and the highest of `rounds` values."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Versus:
    """How many times as fast as `competitor`: the ratio of each round, in which both had their turn."""

    competitor: str
    ratio: Spread


@dataclass(frozen=True)
class Record:
    """One thing measured: what `backend` takes for `name` at these sizes.

    Either `seconds` or `bytes` is there, or `problem` says why neither is: it gave wrong results, or could not run.
    """

    group: str  # one of GROUPS
    name: str  # "causal_attention forward", "decode", …
    backend: str  # or the peer
    precision: str  # "fp32", "bf16", "int8", …; a peer's own name for it
    device: str  # "cpu", "cuda"
    sizes: dict[str, int] = field(default_factory=dict)  # {"tokens": 1024, "batch": 1, "width": 768}
    model: str | None = None  # "gpt2", "stories", …, where a model ran
    seconds: Spread | None = None
    bytes: int | None = None
    rates: dict[str, float] = field(default_factory=dict)  # by the names in RATES, of the median
    limit: str | None = None  # which of LIMITS bounds it
    share_of_limit: float | None = None  # 0 … 1, a little above where the limit was measured in a worse moment
    versus: tuple[Versus, ...] = ()
    checked: float | None = None  # its error against the reference, as a multiple of what is allowed: at most 1
    note: str | None = None  # what a reader has to know, such as that the inputs lay in the cache
    problem: str | None = None

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"a record's group must be one of {', '.join(GROUPS)}, got {self.group!r}")
        if (self.seconds is None) + (self.bytes is None) + (self.problem is None) != 2:
            raise ValueError(f"a record of {self.name!r} needs one of seconds, bytes and problem")
        if unknown := [name for name in self.rates if name not in RATES]:
            raise ValueError(f"a record's rates must be of {', '.join(RATES)}, got {', '.join(unknown)}")
        if self.limit is not None and self.limit not in LIMITS:
            raise ValueError(f"a record's limit must be one of {', '.join(LIMITS)}, got {self.limit!r}")

    @property
    def same_task(self) -> tuple[Any, ...]:
        """What competitors have in common: rows with the same value may stand side by side."""
        return (self.group, self.name, self.model, self.device, tuple(sorted(self.sizes.items())))


@dataclass(frozen=True)
class Results:
    """What a run found. `facts` are `facts.facts()`, `limits` what `limits.measure()` gave (empty if not measured)."""

    facts: dict[str, Any]
    limits: dict[str, Any]
    records: tuple[Record, ...]

    def of(self, group: str) -> list[Record]:
        return [record for record in self.records if record.group == group]


def save(results: Results, path: str | Path) -> None:
    """Writes the file whole or not at all; numbers that are not finite are a `ValueError`."""
    content = {"facts": results.facts, "limits": results.limits, "records": [_short(r) for r in results.records]}
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load(path: str | Path) -> Results:
    """Reads what `save` wrote; `ValueError` in one line where a file is something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        records = [_record(row) for row in content["records"]]
        return Results(dict(content["facts"]), dict(content["limits"]), tuple(records))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of benchmark results ({type(error).__name__}: {error})") from None


def _short(record: Record) -> dict[str, Any]:
    """Without the fields that hold nothing."""
    return {name: value for name, value in asdict(record).items() if value not in (None, (), {}, [])}


def _record(row: Mapping[str, Any]) -> Record:
    if unknown := set(row) - {f.name for f in fields(Record)}:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    values = dict(row)
    if "seconds" in values:
        values["seconds"] = Spread(**values["seconds"])
    values["versus"] = tuple(Versus(v["competitor"], Spread(**v["ratio"])) for v in values.get("versus", []))
    return Record(**values)
