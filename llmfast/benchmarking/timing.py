"""Competitors in turns, round by round.

A shared machine drifts by a third and more, so none is measured in one go: a round gives every competitor a turn,
the next round begins with another one, and ratios are taken within a round. What a turn works on is never what was
worked on last (`Rotation`), so that speeds are those of memory and not of the cache, as they are in a model whose
weights pass by once a token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Clock = Callable[[], float]
Turn = Callable[[], float]  # does the work once, and gives the seconds that it took
Name = TypeVar("Name", bound=Hashable)

MOST_CALLS = 10_000  # in a turn
SLOW = 0.2  # seconds from which one call is enough to warm up
MOST_SETS = 2048  # of a rotation's inputs
CACHE_ELSEWHERE = 32 << 20  # where the system does not say how large its caches are


@dataclass(frozen=True)
class Effort:
    """How long a comparison goes on: until `seconds` are over, but within `rounds`. A turn repeats short work until it
    has lasted `turn` seconds."""

    seconds: float
    rounds: tuple[int, int]
    turn: float


QUICK = Effort(seconds=0.1, rounds=(2, 5), turn=0.001)
USUAL = Effort(seconds=0.5, rounds=(3, 15), turn=0.003)
FULL = Effort(seconds=5.0, rounds=(5, 50), turn=0.01)


def warm_up(turn: Turn, effort: Effort) -> int:
    """Calls a competitor before it counts, twice if that is soon done: how many of the last call make a turn."""
    seconds = turn()
    if seconds < SLOW:
        seconds = turn()
    return min(MOST_CALLS, max(1, round(effort.turn / max(seconds, 1e-9))))


def take_turns(
    turns: Mapping[Name, Turn], calls: Mapping[Name, int], effort: Effort, clock: Clock = time.perf_counter
) -> dict[Name, list[float]]:
    """Seconds of one call, by competitor and round; the lists are equally long.

    A turn is as many `calls`, and its figure their median: what interrupts one of them is not its own.
    """
    names = list(turns)
    found: dict[Name, list[float]] = {name: [] for name in names}
    least, most = effort.rounds
    start = clock()
    for number in range(most if names else 0):
        if number >= least and clock() - start >= effort.seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(statistics.median(turns[name]() for _ in range(calls[name])))
    return found


def timed(
    call: Callable[[Any], Any],
    prepare: Callable[[], Any],
    device: str = "cpu",
    clock: Clock = time.perf_counter,
) -> Turn:
    """A turn that times `call(prepare())`, without what preparing takes; on a GPU until its work is done."""
    wait = torch.cuda.synchronize if device == "cuda" else None

    def turn() -> float:
        prepared = prepare()
        if wait is not None:
            wait()
        start = clock()
        call(prepared)
        if wait is not None:
            wait()
        return clock() - start

    return turn


class Rotation:
    """Copies of a call's tensors, handed out one after another: `next()` gives those unused for longest.

    There are enough of them to be twice as large as the caches, unless one is that large itself (then there are two)
    or so small that it would take more than `MOST_SETS`; `hot` says that they fit. One rotation serves all
    competitors, so that none finds in the cache what another has just used.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None], cache: int | None = None):
        size = sum(t.nbytes for t in tensors.values() if t is not None)
        cache = cache_bytes() if cache is None else cache
        count = max(2, min(MOST_SETS, -(-2 * cache // max(1, size))))
        self.hot = count * size < 2 * cache
        self._sets = [dict(tensors), *({n: _copy(t) for n, t in tensors.items()} for _ in range(count - 1))]
        self._at = 0

    def __len__(self) -> int:
        return len(self._sets)

    def next(self) -> dict[str, Tensor | None]:
        self._at = (self._at + 1) % len(self._sets)
        return self._sets[self._at]


def _copy(t: Tensor | None) -> Tensor | None:
    """Its own memory, the same strides; tensors that were views of one (queries, keys and values) come apart."""
    if t is None:
        return None
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return copy.copy_(t)


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The size of the largest cache, as Linux says."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [CACHE_ELSEWHERE] if not root.exists() else []
    for file in root.glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0))
    return max(sizes, default=CACHE_ELSEWHERE)
