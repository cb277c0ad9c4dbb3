"""What the sections share: sizes, timing with a cold cache, and contests that become records."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, LeftOut, Work, WrongResult, run
from llmfast.benchmarking.records import Record
from llmfast.benchmarking.timing import Effort, Turn

COMPILED = "torch.compile"
# What is written between two calls, so that neither finds its inputs in the L2 cache (50 MB on an H200).
FLUSH_BYTES = 512 << 20
# It is written again, so many times at most, until Python has launched the next call before the GPU is done writing:
# then the time between two events is the GPU's alone. What launching costs is measured in launches.py.
MOST_WRITES = 16
TIME_IS_UP = "left out: the section's time was up"
# The largest difference from torch's result that is not a mistake, relative to its largest element.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}

Result = Tensor | tuple[Tensor, ...]
Call = Callable[[], Result]


@dataclass
class Bench:
    """One section's run: `scale` is "full", "quick" or "tiny" (without a GPU); `save` keeps what there is so far."""

    device: str
    scale: str
    deadline: float  # of time.monotonic()
    limits: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    save: Callable[[Bench], None] = lambda bench: None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def precision(self) -> str:
        return "bf16" if self.on_gpu else "fp32"

    @property
    def effort(self) -> Effort:
        if not self.on_gpu:
            return Effort(seconds=0.0, rounds=(1, 1), turn=0.0)
        return Effort(seconds=0.3 if self.scale == "full" else 0.1, rounds=(5, 100), turn=0.0)

    def pick(self, full: Any, quick: Any, tiny: Any) -> Any:
        return {"full": full, "quick": quick, "tiny": tiny}[self.scale]

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype or self.dtype)

    def compare(self, comparison: Comparison, effort: Effort | None = None, needs: float = 0.0) -> None:
        """Runs it, unless the section has not the seconds left that it `needs`, and keeps the records.

        A competitor whose turn to be made ready comes after the section's time is left out; the rest is timed.
        """
        left = self.deadline - time.monotonic()
        if left < needs:
            for entry in comparison.entries:
                self.problem(comparison, entry, TIME_IS_UP)
            return
        torch._dynamo.reset()  # or torch.compile gives up on a function after eight sizes of it
        effort = effort or self.effort
        effort = replace(effort, seconds=max(0.0, min(effort.seconds, left)))
        try:
            found = run(self.in_time(comparison), effort, [self.limits] if self.limits else [])
            self.records += [measured.record for measured in found]
        except Exception as error:  # while timing, when every competitor had run once: the next task goes on
            for entry in comparison.entries:
                self.problem(comparison, entry, f"{type(error).__name__}: {' '.join(str(error).split())}")
        self.save(self)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def in_time(self, comparison: Comparison) -> Comparison:
        """The same, but no competitor is made ready after the deadline."""

        def start() -> Callable[[Entry], Contestant]:
            make_ready = comparison.start()

            def ready(entry: Entry) -> Contestant:
                if time.monotonic() > self.deadline:
                    raise LeftOut(TIME_IS_UP)
                return make_ready(entry)

            return ready

        return replace(comparison, start=start)

    def problem(self, comparison: Comparison, entry: Entry, words: str) -> None:
        c = comparison
        self.records.append(
            Record(c.group, c.name, entry.backend, entry.precision, c.device, c.sizes, c.model, problem=words)
        )

    def contest(
        self,
        name: str,
        sizes: dict[str, int],
        makers: Mapping[str, Callable[[], Call]],
        work: Work,
        baselines: tuple[str, ...] = (COMPILED,),
        precision: str | None = None,
    ) -> None:
        """Times calls that do the same: the first competitor's result is what the others' are compared with."""
        entries = tuple(Entry(backend, precision or self.precision) for backend in makers)

        def start() -> Callable[[Entry], Contestant]:
            expected: list[Result] = []

            def make_ready(entry: Entry) -> Contestant:
                call = makers[entry.backend]()
                result = call()
                if not expected:
                    expected.append(result)
                return Contestant(self.turn(call), checked=_checked(result, expected[0], self.dtype))

            return make_ready

        comparison = Comparison("ops", name, self.device, entries, start, lambda entry: work, sizes, None, baselines)
        self.compare(comparison)

    def turn(self, call: Callable[[], Any]) -> Turn:
        """Times one call, its inputs not in the cache; on a GPU by events around it, without what launching takes."""
        if not self.on_gpu:

            def on_cpu() -> float:
                start = time.perf_counter()
                call()
                return time.perf_counter() - start

            return on_cpu

        writes = 1

        def on_gpu() -> float:
            nonlocal writes
            before, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            before.record()
            for _ in range(writes):
                _flush_buffer().zero_()
            start.record()
            launched = time.perf_counter()
            call()
            launching = time.perf_counter() - launched
            end.record()
            end.synchronize()
            writes = enough_writes(writes, before.elapsed_time(start) / 1e3 / writes, launching)
            return start.elapsed_time(end) / 1e3

        return on_gpu

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By Inductor on a GPU; without one only traced, since compiling would take longer than all the rest."""
        return torch.compile(function, dynamic=False, backend="inductor" if self.on_gpu else "eager")


def enough_writes(now: int, seconds: float, launching: float) -> int:
    """How often to write the buffer, `seconds` each time, so that it outlasts `launching` by half; never fewer than
    `now`.
    """
    return max(now, min(MOST_WRITES, math.ceil(1.5 * launching / max(seconds, 1e-6))))


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def gradients(call: Call, inputs: tuple[Tensor, ...]) -> Call:
    """The backward pass alone of what `call` computes: the graph is made once, and gone through every time."""
    result = call()
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    directions = [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]

    def backward() -> Result:
        return torch.autograd.grad(outputs, inputs, directions, retain_graph=True)

    return backward


def _checked(result: Result, expected: Result, dtype: torch.dtype) -> float:
    """The largest error of any result in units of what is allowed. `WrongResult` beyond it."""
    worst = 0.0
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True)
    for got, wanted in pairs:
        scale = max(float(wanted.abs().max()), 1e-6)
        error = float((got.float() - wanted.float()).abs().max()) / scale / ALLOWED[dtype]
        worst = error if math.isnan(error) else max(worst, error)
    if not worst <= 1:
        raise WrongResult(f"off from the first competitor by {worst:.3g} times what is allowed")
    return round(worst, 4)
