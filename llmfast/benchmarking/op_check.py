"""Is an op's result right at the size that is about to be timed? By the contract's rule, on some of its rows.

The whole float64 reference of a long sequence would not fit memory (8192 tokens in 12 heads have 6.4 GB of scores), so
up to three runs of `ROWS` tokens are compared: at the beginning, in the middle and at the end. The kernel computes
everything as it will when it is timed; the gradients that it is given are zero for the other tokens, so that the
reference, which only has these rows, has the same gradients for every argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmfast.backends import pytorch, reference
from llmfast.benchmarking.comparison import WrongResult
from llmfast.contract.cases import Case, Tensors
from llmfast.contract.checking import Comparison, allowed

ROWS = 64
SLACK = 2  # times the contract's tolerance: PyTorch's own error, part of the rule, may be small by luck at one size
ATTENTION = ("causal_attention", "bidirectional_attention")
TOKEN_ROWS = (
    "x",
    "residual",
    "hidden",
    "targets",
)  # arguments with a row for each token, where that is the first dimension


class OpCheck:
    """What a case's results have to be, and how far they may be from it; with `backward` its gradients too."""

    def __init__(self, case: Case, tensors: Tensors, backward: bool):
        self.case, self.backward = case, backward
        self.dim = 2 if case.op in (*ATTENTION, "rotary") else 0  # of the tokens
        first = next(t for t in tensors.values() if t is not None)
        self.rows = checked_rows(first.shape[self.dim])
        # Tokens that are not checked do not count in a mean over tokens.
        self.tensors = {n: self._only(t, -100) if n == "targets" and t is not None else t for n, t in tensors.items()}
        with torch.inference_mode():
            results = case.call(pytorch, self.tensors)
        generator = torch.Generator().manual_seed(1)
        self.given = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in results]
        self.given = [self._only(g, 0.0) for g in self.given]  # the gradients that backward starts from
        self.expected, own = self._expected(), self._found(pytorch)
        self.allowed = {
            name: SLACK * allowed(_error(own[name], value), value, first.dtype) for name, value in self.expected.items()
        }

    def __call__(self, functions: Any) -> float:
        """The largest error in units of what is allowed; `WrongResult` where that is more than 1."""
        found, worst = self._found(functions), 0.0
        for name, value in self.expected.items():
            if name not in found or found[name].shape != value.shape:
                shape = tuple(found[name].shape) if name in found else "missing"
                raise WrongResult(f"wrong, so not timed: the {name} is {shape}, not {tuple(value.shape)}")
            comparison = Comparison(name, _error(found[name], value), self.allowed[name])
            if not comparison.relative <= 1:
                off, allowed = f"{comparison.error:.3g}", f"{comparison.allowed:.3g}"
                raise WrongResult(f"wrong, so not timed: the {name} is off by {off}, where {allowed} is allowed")
            worst = max(worst, comparison.relative)
        return worst

    def _expected(self) -> dict[str, Tensor]:
        """By the reference, from the checked rows alone."""
        doubles = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in self.tensors.items()}
        leaves = self.case.leaves(doubles)
        parts = [part_of(self.case.op, leaves, rows) for rows in self.rows]
        if self.case.op == "linear_cross_entropy":  # one mean over all rows
            parts = [leaves | {n: torch.cat([part[n] for part in parts]) for n in ("hidden", "targets")}]  # type: ignore
        pieces = [self.case.call(reference, part) for part in parts]
        results = [torch.cat(list(each), self.dim) if each[0].ndim else each[0] for each in zip(*pieces, strict=True)]
        return self._named(results, [self._taken(g).double() for g in self.given], leaves)

    def _found(self, functions: Any) -> dict[str, Tensor]:
        """By the competitor's functions, from all rows, as it will be timed."""
        leaves = self.case.leaves(self.tensors) if self.backward else self.tensors
        with torch.inference_mode(not self.backward):
            results = self.case.call(functions, leaves)
        if len(results) != len(self.given) or not all(isinstance(r, Tensor) for r in results):
            raise WrongResult("wrong, so not timed: it does not return what the contract says")
        named = self._named(results, self.given, leaves)
        return {n: t if n.startswith("grad") else self._taken(t) for n, t in named.items()}

    def _named(self, results: Sequence[Tensor], given: list[Tensor], leaves: Tensors) -> dict[str, Tensor]:
        named = {f"result {i}": r.detach() for i, r in enumerate(results)}
        if not self.backward:
            return named
        wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(list(results), list(wanted.values()), given, allow_unused=True)
        return named | {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True) if g is not None}

    def _taken(self, result: Tensor) -> Tensor:
        """The checked rows of a result."""
        if result.ndim <= self.dim:
            return result
        return torch.cat([result.narrow(self.dim, r.start, r.stop - r.start) for r in self.rows], self.dim)

    def _only(self, t: Tensor, elsewhere: float) -> Tensor:
        """`t` with `elsewhere` in all other rows."""
        if t.ndim <= self.dim:
            return t
        kept = torch.full_like(t, elsewhere)
        for r in self.rows:
            kept.narrow(self.dim, r.start, r.stop - r.start).copy_(t.narrow(self.dim, r.start, r.stop - r.start))
        return kept


def checked_rows(tokens: int) -> list[slice]:
    """At most three runs of `ROWS` tokens; all of them where there are no more."""
    if tokens <= 3 * ROWS:
        return [slice(0, tokens)]
    return [slice(start, start + ROWS) for start in (0, (tokens - ROWS) // 2, tokens - ROWS)]


def part_of(op: str, tensors: Tensors, rows: slice) -> Tensors:
    """The arguments that give just these rows of the result."""
    if op in ATTENTION:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        assert q is not None and k is not None and v is not None
        # A causal query sees the keys up to its own.
        keys = slice(0, k.shape[2] - q.shape[2] + rows.stop if op == "causal_attention" else None)
        return {"q": q[:, :, rows], "k": k[:, :, keys], "v": v[:, :, keys]}
    if op == "rotary":
        x, cos, sin = tensors["x"], tensors["cos"], tensors["sin"]
        assert x is not None and cos is not None and sin is not None
        return {"x": x[:, :, rows], "cos": cos[:, rows], "sin": sin[:, rows]}
    return {n: t[rows] if n in TOKEN_ROWS and t is not None else t for n, t in tensors.items()}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())
