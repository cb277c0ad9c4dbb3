"""Which cases a backend has to pass, and passing them: the whole suite behind `llmfast verify`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

from llmfast import ops
from llmfast.backends import DTYPES, OPS, BackendUnavailable, Support, backends
from llmfast.contract.cases import CASES, Case
from llmfast.contract.checking import Outcome, check

# More would take Triton's interpreter seconds to minutes a case.
SMALL = 300_000
DTYPE_NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Task:
    """One case to run on one backend."""

    case: Case
    backend: str
    device: str
    dtype: str

    @property
    def small(self) -> bool:
        return self.case.elements <= SMALL

    @property
    def interpreted(self) -> bool:
        return (self.backend, self.device) == ("triton", "cpu")

    @property
    def name(self) -> str:
        return f"{self.case.op}-{self.case.name}-{self.backend}-{self.device}-{self.dtype}"


@dataclass(frozen=True)
class Plan:
    """What is to be run, and what a backend does not offer, with its reasons."""

    tasks: list[Task]
    not_offered: list[Support]


def plan(
    names: Iterable[str] | None = None,
    chosen_ops: Iterable[str] = OPS,
    dtypes: Iterable[str] | None = None,
    device: str | None = None,
) -> Plan:
    """The tasks of some backends (by default of all but the reference, which is what they are compared with).

    Without `dtypes` they are the contract's: float32 and bfloat16, and float16 where there is a GPU or Triton's
    interpreter stands in for one. Without `device` they are all that this machine has.
    """
    chosen_ops = tuple(chosen_ops)
    wanted = None if names is None else tuple(names)
    tasks, missing = [], []
    for row in backends():
        if row.backend == "reference" or (wanted is not None and row.backend not in wanted):
            continue
        if row.op not in chosen_ops or device not in (None, row.device):
            continue
        of_the_contract = row.dtype != "float16" or row.device != "cpu" or row.backend == "triton"
        if row.dtype not in dtypes if dtypes is not None else not of_the_contract:
            continue
        if row.available:
            tasks += [Task(case, row.backend, row.device, row.dtype) for case in CASES if case.op == row.op]
        else:
            missing.append(row)
    return Plan(tasks, missing)


@dataclass(frozen=True)
class Verdict:
    """What became of a task; `left_out` is the backend's reason for not running this case."""

    task: Task
    outcome: Outcome
    left_out: str | None = None


def run(task: Task) -> Verdict:
    """The task's outcome; an error that the backend raises is one of its problems."""
    try:
        return Verdict(task, check(task.case, task.backend, task.device, DTYPE_NAMED[task.dtype]))
    except BackendUnavailable as error:
        return Verdict(task, Outcome((), ()), str(error))
    except Exception as error:  # anybody's kernel may fail in any way; the others are still to be judged
        said = f"it raised {type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, TypeError):  # most likely another signature than the contract's
            said += f"; it is called as {_signature(task.case.op)}"
        return Verdict(task, Outcome((), (said,)))


def _signature(op: str) -> str:
    """`gelu(x, approximate='tanh')`, without annotations."""
    signature = inspect.signature(getattr(ops, op))
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return f"{op}{inspect.Signature(bare)}"


@dataclass(frozen=True)
class Summary:
    """All verdicts on one op of one backend on one device in one dtype."""

    backend: str
    device: str
    op: str
    dtype: str
    verdicts: tuple[Verdict, ...]

    @property
    def judged(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.left_out is None]

    @property
    def left_out(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.left_out is not None]

    @property
    def failed(self) -> list[Verdict]:
        """What is wrong, the largest error first."""
        wrong = [verdict for verdict in self.verdicts if verdict.outcome.problems]
        return sorted(wrong, key=lambda v: -max((c.relative for c in v.outcome.comparisons), default=0.0))

    @property
    def worst(self) -> dict[str, float]:
        """The largest error of any case for the result and for each gradient, in units of what is allowed."""
        worst: dict[str, float] = {}
        for verdict in self.verdicts:
            for comparison in verdict.outcome.comparisons:
                worst[comparison.name] = max(worst.get(comparison.name, 0.0), comparison.relative)
        return worst


def summarise(verdicts: Iterable[Verdict]) -> list[Summary]:
    """The verdicts by backend, device, op and dtype, in the order in which they come first."""
    groups: dict[tuple[str, str, str, str], list[Verdict]] = {}
    for verdict in verdicts:
        task = verdict.task
        groups.setdefault((task.backend, task.device, task.case.op, task.dtype), []).append(verdict)
    return [Summary(*key, tuple(group)) for key, group in groups.items()]
