"""`confirm` holds a number of a lesson to what it should be; `check` looks at a reader's answer and says what is wrong.

An exercise's judge is a function in `llmfast/lessons/checks/lesson_NN.py`: it takes the answer, and returns what is
wrong with it in words, or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch


def confirm(what: str, found: Any, expected: Any, within: float = 1e-4) -> None:
    """Prints that `found` is `expected`, up to `within`; an `AssertionError` says where it is not."""
    wrong = difference(found, expected, within)
    assert wrong is None, f"{what}: {wrong}"
    confirmed.append(what)
    print(f"✓ {what}")


confirmed: list[str] = []  # what has been, in this process


def check(exercise: str, answer: Any) -> None:
    """Looks at the answer to an exercise, as in `check("5.2", my_function)`; prints what it finds.

    A `ValueError` names the exercises of the lesson where there is none of that name.
    """
    wrong = judgement(exercise, answer)
    if wrong is not None and wrong.endswith(NOTHING):
        print(f"○ {exercise} waits for you")
    else:
        print(f"✓ {exercise} is right" if wrong is None else f"✗ {exercise}: {wrong}")


def judgement(exercise: str, answer: Any) -> str | None:
    """What is wrong with an answer, or None."""
    lesson, _, number = exercise.partition(".")
    known = exercises(lesson)
    if number not in known:
        raise ValueError(f"there is no exercise {exercise}; lesson {lesson} has {', '.join(known) or 'none'}")
    if answer is None or answer is ...:
        return NOTHING
    try:
        return known[number](answer)
    except Exception as error:  # of the answer: it is the reader's code that runs
        return f"it raises {type(error).__name__}: {error}"


def exercises(lesson: str) -> dict[str, Any]:
    """The judges of a lesson, by the number of the exercise."""
    try:
        module = importlib.import_module(f"llmfast.lessons.checks.lesson_{int(lesson):02}")
    except (ImportError, ValueError):
        return {}
    prefix = "exercise_"
    return {name.removeprefix(prefix): judge for name, judge in vars(module).items() if name.startswith(prefix)}


NOTHING = "there is no answer yet, or a `return` is missing"


def difference(
    found: Any, expected: Any, within: float = 1e-4, mistakes: Mapping[str, Any] | None = None, where: str = ""
) -> str | None:
    """How `found` differs from `expected` (numbers, lists, tensors, or text), in words; None if it does not.

    `mistakes` says what each of some wrong values comes from; `where` is said of the call that gave `found`.
    """
    before = f"{where}: " if where else ""
    if found is None or found is ...:
        return before + NOTHING
    for mistake, wrong in (mistakes or {}).items():
        if difference(found, expected, within) is not None and difference(found, wrong, within) is None:
            return before + mistake
    if isinstance(expected, str) or not _is_numeric(expected):
        return None if found == expected else f"{before}it is {found!r}, not {expected!r}"
    if isinstance(found, str) or not _is_numeric(found):
        return f"{before}it is of type {type(found).__name__}, where numbers are expected"
    a, b = _numbers(found), _numbers(expected)
    if a.shape != b.shape:
        transposed = a.ndim == 2 and a.T.shape == b.shape and a.shape != b.shape
        hint = "; is it transposed?" if transposed else ""
        return f"{before}its shape is {tuple(a.shape)}, not {tuple(b.shape)}{hint}"
    apart = (a - b).abs()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, apart.nan_to_num(torch.inf, torch.inf, torch.inf))
    if not apart.numel() or float(apart.max()) <= within:
        return None
    at = position(int(apart.argmax()), a.shape)
    place = f" at {list(at)}" if at else ""
    return f"{before}it is {float(a[at]):.5g}{place}, where it should be {float(b[at]):.5g}"


def position(flat: int, shape: torch.Size) -> tuple[int, ...]:
    """The index of the element number `flat`, row by row."""
    at: list[int] = []
    for size in reversed(shape):
        flat, remainder = divmod(flat, size)
        at.insert(0, remainder)
    return tuple(at)


def _is_numeric(value: Any) -> bool:
    try:
        _numbers(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _numbers(value: Any) -> torch.Tensor:
    if isinstance(value, (list, tuple)) and any(isinstance(element, torch.Tensor) for element in value):
        value = torch.stack([_numbers(element) for element in value])
    return torch.as_tensor(value, dtype=torch.float64).detach()
