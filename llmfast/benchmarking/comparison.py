"""A comparison: who competes at what, how much work that is, and the records that come out.

What can be measured is a `Comparison`, plain data until it is run: the folder `benchmarks/` and `llmfast bench` list
and choose among them. Running one makes what the competitors share, checks each of them, times those that are right in
turns, and sets the times beside the machine's limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmfast.backends import BackendUnavailable
from llmfast.benchmarking import limits
from llmfast.benchmarking.records import Record, Spread, Versus
from llmfast.benchmarking.timing import Effort, Turn, take_turns, warm_up


class WrongResult(ValueError):
    """A competitor's result is not what the reference says: it has no speed."""


class LeftOut(Exception):
    """A competitor that there was no time for."""


@dataclass(frozen=True)
class Entry:
    """A competitor: a backend or a library, in a precision."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Work:
    """What one call needs, whatever a competitor really does: bytes of memory, and operations (a product and a sum
    are two) in the format `arithmetic` of the limits. `tokens` or bytes of `text` are what a reader counts in. Memory
    does not bound work whose bytes stay `in_cache` from call to call."""

    tokens: int = 0
    text: int = 0
    read: float = 0.0
    written: float = 0.0
    operations: float = 0.0
    arithmetic: str = "fp32"
    in_cache: bool = False

    def rates(self, seconds: float) -> dict[str, float]:
        """By the names in `records.RATES`; what there is none of is left out."""
        amounts = {
            "tokens_per_second": self.tokens,
            "megabytes_per_second": self.text / 1e6,
            "gigabytes_per_second": (self.read + self.written) / 1e9,
            "gigaflops_per_second": self.operations / 1e9,
        }
        return {name: float(f"{amount / seconds:.4g}") for name, amount in amounts.items() if amount}

    def least_seconds(self, measured: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
        """The limit that bounds the work and the seconds it allows (the roofline model: Williams et al., 2009).

        Work that mostly reads is held to the bandwidth of reading, work that writes too to that of copying. None
        where nothing is known about the limit, or there is nothing to be limited.
        """
        bandwidth = "copy" if 4 * self.written >= self.read else "read"
        needs = {bandwidth: 0.0 if self.in_cache else self.read + self.written, self.arithmetic: self.operations}
        found = {}
        for name, amount in needs.items():
            if amount:
                limit = limits.best(measured, name)
                if limit is None:
                    return None
                found[name] = amount / (limit * 1e9)
        return max(found.items(), key=lambda item: item[1]) if found else None


@dataclass(frozen=True)
class Contestant:
    """A competitor that is right and ready. `checked` is its error in units of what is allowed."""

    turn: Turn
    checked: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Competitors at one task. Calling `start` makes what they share, and returns what makes each one ready.

    That one raises `WrongResult`, or whatever a competitor's code raises; the others go on without it. A record says
    how many times as fast a competitor is as each of the `baselines`, in its own precision or else in fp32.
    """

    group: str
    name: str
    device: str
    entries: tuple[Entry, ...]
    start: Callable[[], Callable[[Entry], Contestant]]
    work: Callable[[Entry], Work]
    sizes: dict[str, int] = field(default_factory=dict)
    model: str | None = None
    baselines: tuple[str, ...] = ("pytorch",)

    @property
    def title(self) -> str:
        """ "causal_attention forward, tokens 1024" """
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        return ", ".join(part for part in (self.name, self.model or "", sizes) if part)


@dataclass(frozen=True)
class Measured:
    """A record, and the seconds of a call in every round (none where there is a problem)."""

    record: Record
    rounds: tuple[float, ...]


def run(comparison: Comparison, effort: Effort, measured_limits: Sequence[dict[str, Any]] = ()) -> list[Measured]:
    """Checks and times a comparison: one result for each of its entries, in their order."""
    ready: dict[Entry, Contestant] = {}
    calls: dict[Entry, int] = {}
    problems: dict[Entry, str] = {}
    make_ready = comparison.start()
    for entry in comparison.entries:
        try:
            contestant = make_ready(entry)
            calls[entry], ready[entry] = warm_up(contestant.turn, effort), contestant
        except Exception as error:  # anybody's kernel may fail in any way; the others are still to be measured
            problems[entry] = explained(error)
    seconds = take_turns({entry: contestant.turn for entry, contestant in ready.items()}, calls, effort)
    found = []
    for entry in comparison.entries:
        if entry in problems:
            found.append(Measured(_record(comparison, entry, problem=problems[entry]), ()))
            continue
        rounds, work = seconds[entry], comparison.work(entry)
        median = Spread.of(rounds).median
        least = work.least_seconds(measured_limits)
        record = _record(
            comparison,
            entry,
            seconds=Spread.of(rounds),
            rates=work.rates(median),
            limit=least[0] if least else None,
            share_of_limit=round(least[1] / median, 4) if least else None,
            versus=_versus(comparison, entry, seconds),
            checked=ready[entry].checked,
            note=ready[entry].note or ("what it reads lies in the cache" if work.in_cache else None),
        )
        found.append(Measured(record, tuple(rounds)))
    return found


def explained(error: Exception) -> str:
    """What went wrong, in one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, (WrongResult, LeftOut, BackendUnavailable)) else f"{type(error).__name__}: {said}"


def _record(comparison: Comparison, entry: Entry, **found: Any) -> Record:
    return Record(
        group=comparison.group,
        name=comparison.name,
        backend=entry.backend,
        precision=entry.precision,
        device=comparison.device,
        sizes=comparison.sizes,
        model=comparison.model,
        **found,
    )


def _versus(comparison: Comparison, entry: Entry, seconds: dict[Entry, list[float]]) -> tuple[Versus, ...]:
    """The ratios to the baselines, round by round."""
    found = []
    for name in comparison.baselines:
        choices = [Entry(name, precision) for precision in (entry.precision, "fp32")]
        other = next((choice for choice in choices if choice in seconds), None)
        if other is not None and name != entry.backend:
            ratios = [theirs / ours for theirs, ours in zip(seconds[other], seconds[entry], strict=True)]
            found.append(Versus(str(other), Spread.of(ratios)))
    return tuple(found)
