"""The cases vary every argument of every op: a backend that ignores one is caught, and so is a reference that does.

One cheat for each way to ignore an argument, made from the signatures in `llmfast.ops`.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import llmfast
from llmfast import ops
from llmfast.backends import OPS, reference
from llmfast.contract import CASES, Case, check, plan, run

Cheat = Callable[[dict[str, Any]], dict[str, Any]]  # changes the arguments of a call, by name


def small(op: str) -> list[Case]:
    chosen = [case for case in CASES if case.op == op and case.elements <= 60_000]
    return sorted(chosen, key=lambda case: case.elements)


def arguments(op: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(ops, op)).parameters)


def replaced(name: str, value: Callable[[Any], Any]) -> Cheat:
    return lambda given: given if given.get(name) is None else {**given, name: value(given[name])}


def fixed(name: str, value: Any) -> Cheat:
    return lambda given: {**given, name: value}


def cheats(op: str) -> dict[str, Cheat]:
    """Every way to ignore an argument: each of its values at all times, a tensor of zeros, and none where that goes."""
    found: dict[str, Cheat] = {}
    for name, parameter in arguments(op).items():
        if "Tensor" in parameter.annotation:
            found[f"{name} is all zeros"] = replaced(name, torch.zeros_like)
            if "None" in parameter.annotation:
                found[f"{name} is left out"] = fixed(name, None)
        else:
            default = parameter.default
            values = {default, *(case.settings.get(name, default) for case in CASES if case.op == op)}
            found |= {f"{name} is always {value}": fixed(name, value) for value in sorted(values, key=str)}
    return found


def detachments(op: str) -> dict[str, Cheat]:
    """An argument that gets no gradient, for each of those that have one."""
    case = next(case for case in small(op) if case.elements)
    comparisons = check(case, "pytorch", "cpu", torch.float32).comparisons
    names = [c.name.removeprefix("gradient of ") for c in comparisons if c.name.startswith("gradient of ")]
    return {f"{name} has no gradient": replaced(name, torch.Tensor.detach) for name in names}


def everyone(kinds: Callable[[str], dict[str, Cheat]]) -> list[Any]:
    return [pytest.param(op, cheat, id=f"{op}: {name}") for op in OPS for name, cheat in kinds(op).items()]


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Cheat], bool]:
    """Whether `llmfast verify` finds nothing wrong with PyTorch's op on what `cheat` makes of a call's arguments."""
    package = sys.modules["llmfast.backends"]
    monkeypatch.setattr(package, "_registry", package._registry.copy())

    def verify(op: str, cheat: Cheat) -> bool:
        def function(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(getattr(ops, op)).bind(*args, **kwargs).arguments
            with llmfast.use_backend("pytorch"):
                return getattr(ops, op)(**cheat(given))

        llmfast.register_backend("cheat", types.SimpleNamespace(**{op: function}))
        tasks = [task for task in plan(["cheat"], [op], ["float32"], "cpu").tasks if task.case in small(op)]
        assert tasks
        return not any(run(task).outcome.problems for task in sorted(tasks, key=lambda task: task.case.elements))

    return verify


@pytest.mark.parametrize("op, cheat", everyone(cheats) + everyone(detachments))
def test_a_backend_that_ignores_an_argument_is_caught(verified, op: str, cheat: Cheat) -> None:
    assert not verified(op, cheat)


@pytest.mark.parametrize("op", OPS)
def test_a_backend_that_ignores_none_is_right(verified, op: str) -> None:
    assert verified(op, lambda given: given)


@pytest.mark.parametrize("op", OPS)
def test_every_argument_has_its_cheat(op: str) -> None:
    assert {cheat.partition(" is ")[0] for cheat in cheats(op)} == set(arguments(op))


@pytest.mark.parametrize("op, cheat", everyone(cheats))
def test_a_reference_that_ignores_an_argument_is_caught_by_a_right_backend(
    monkeypatch: pytest.MonkeyPatch, op: str, cheat: Cheat
) -> None:
    right = getattr(reference, op)

    def function(*args: Any, **kwargs: Any) -> Any:
        given = cheat(dict(inspect.signature(right).bind(*args, **kwargs).arguments))
        if given.get("scale", 1.0) is None:  # left out: backends are given what `ops` makes of it
            given["scale"] = given["q"].shape[-1] ** -0.5
        return right(**given)

    monkeypatch.setattr(reference, op, function)

    def caught(case: Case) -> bool:
        try:
            return bool(check(case, "pytorch", "cpu", torch.float32).problems)
        except Exception:
            return True

    assert any(map(caught, small(op)))
