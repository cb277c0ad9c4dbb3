"""One case on one backend, against the float64 reference: result, gradients, bits and inputs.

The tolerance rule: the error against the reference is at most twice that of PyTorch's own op in the same dtype, plus
eps(dtype) · max(1, max |reference|), for every result and every gradient. Twice PyTorch's own error counts up to `CAP`
such eps: where PyTorch is further off, the reference is wrong, or PyTorch is, and either has to show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmfast import ops
from llmfast.backends import pytorch, reference, use_backend
from llmfast.contract.cases import Case, Tensors

# In units of eps · max(1, max |reference|). PyTorch's own error is up to 7 in the float32 cases, 4 in bfloat16 and
# float16: sums of n terms are off by about √n / 4 where they are added one by one. The nearest of the answers that
# ignore an argument is 556 off in float32, one GELU in place of the other; the next are a million off.
CAP = 16


def allowed(torchs_error: float, expected: Tensor, dtype: torch.dtype) -> float:
    """How far a result in `dtype` may be from what the reference expects, where PyTorch's own op is `torchs_error` off.

    A reference that holds NaN allows nothing.
    """
    unit = torch.finfo(dtype).eps * (max(1.0, float(expected.abs().max())) if expected.numel() else 1.0)
    return min(2 * torchs_error, CAP * unit) + unit


@dataclass(frozen=True)
class Comparison:
    """A result or a gradient beside the reference. `error` is the largest of any element."""

    name: str  # "result", "gradient of x"
    error: float
    allowed: float

    @property
    def relative(self) -> float:
        """The error in units of what is allowed: up to 1 is right."""
        return math.inf if math.isnan(self.error) or math.isnan(self.allowed) else self.error / self.allowed


@dataclass(frozen=True)
class Outcome:
    """What became of a case: every comparison that could be made, and all that is wrong, in words."""

    comparisons: tuple[Comparison, ...]
    problems: tuple[str, ...]


def check(case: Case, backend: str, device: str, dtype: torch.dtype, slack: float = 1.0, floor: float = 0.0) -> Outcome:
    """Runs `case` on `backend` and compares; what the backend raises is raised.

    For shapes at which PyTorch's own error may be small by luck, `slack` times the rule is allowed, and never less than
    `floor` · eps(float32) · max(1, max |reference|): what sums in float32 lose by the order of their terms.
    """
    tensors = case.make(dtype, device)
    before = {name: t.clone() for name, t in tensors.items() if t is not None}
    expected = _Run(case, reference, {name: _double(t) for name, t in tensors.items()}, dtype)
    torch_own = _Run(case, pytorch, tensors, dtype)
    with use_backend(backend):
        run = _Run(case, ops, tensors, dtype)
        problems = _wrong_kind(run.results, torch_own.results)
        if problems:  # nothing to compare
            return Outcome((), tuple(problems))
        if case.differentiable and not run.differentiable:
            problems.append("the result has no gradient: the op has to be differentiable")
        again = _Run(case, ops, tensors, dtype)
        got, got_again = run.values(), run.values() | again.outputs()

    comparisons = []
    for name, t in before.items():
        if not torch.equal(tensors[name], t):  # type: ignore[arg-type]
            problems.append(f"the argument {name} was changed")
    torchs = torch_own.values()
    for name, reference_value in expected.values().items():
        value = got.get(name)
        if value is None:
            if run.differentiable:
                problems.append(f"the {name} is missing")
            continue
        if value.shape != reference_value.shape:
            problems.append(f"the {name} has shape {tuple(value.shape)}, not {tuple(reference_value.shape)}")
            continue
        if not (torch.equal(value, got_again[name]) or bool(value.isnan().all())):
            problems.append(f"the {name} differs between two runs")
        limit = slack * allowed(_error(torchs[name], reference_value), reference_value, dtype)
        limit = max(limit, floor * allowed(0.0, reference_value, torch.float32))
        comparison = Comparison(name, _error(value, reference_value), limit)
        comparisons.append(comparison)
        if not comparison.relative <= 1:
            by = "is not a number" if math.isnan(comparison.error) else f"is off by {comparison.error:.3g}"
            problems.append(f"the {name} {by}, where {limit:.3g} is allowed")
    return Outcome(tuple(comparisons), tuple(problems))


class _Run:
    """A case computed once, by `functions`: its results, and its gradients whenever they are asked for."""

    def __init__(self, case: Case, functions: Any, tensors: Tensors, dtype: torch.dtype):
        leaves = case.leaves(tensors)  # sharing memory, so that a changed input shows
        self.wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        self.dtype = dtype
        self.results = case.call(functions, leaves)

    @property
    def differentiable(self) -> bool:
        return any(isinstance(r, Tensor) and r.requires_grad for r in self.results)

    def outputs(self) -> dict[str, Tensor]:
        if len(self.results) == 1:
            return {"result": self.results[0].detach()}
        return {f"result {i}": r.detach() for i, r in enumerate(self.results)}

    def values(self) -> dict[str, Tensor]:
        """The results and the gradients of a fixed random projection of them, by name.

        Every call goes backward again through one graph: what backward had overwritten would show.
        """
        if not self.differentiable:
            return self.outputs()
        generator = torch.Generator().manual_seed(1)
        projections = []
        for r in self.results:
            projection = torch.randn(r.shape, generator=generator, dtype=torch.float64)
            # In the precision of the case, also for the reference: all differentiate the same function.
            projections.append(projection.to(r.device).to(self.dtype).to(r.dtype))
        total = torch.stack([(r * p).sum() for r, p in zip(self.results, projections, strict=True)]).sum()
        grads = torch.autograd.grad(total, list(self.wanted.values()), retain_graph=True, allow_unused=True)
        named = zip(self.wanted, grads, strict=True)
        return self.outputs() | {f"gradient of {name}": grad for name, grad in named if grad is not None}


def _wrong_kind(results: tuple[Any, ...], expected: tuple[Tensor, ...]) -> list[str]:
    """What makes results unlike those of the contract at first sight: their number, type, dtype, device."""
    if len(results) != len(expected):
        return [f"it returns {len(results)} results, not {len(expected)}"]
    problems = []
    for got, own in zip(results, expected, strict=True):
        if not isinstance(got, Tensor):
            problems.append(f"it returns {type(got).__name__}, not a tensor")
        elif got.dtype != own.dtype or got.device != own.device:
            problems.append(f"the result is {got.dtype} on {got.device}, not {own.dtype} on {own.device}")
        elif got.shape != own.shape:
            problems.append(f"the result has shape {tuple(got.shape)}, not {tuple(own.shape)}")
    return problems


def _double(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max()) if got.numel() else 0.0
