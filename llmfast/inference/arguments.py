"""One clear line for a number that a caller got wrong."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int, where it is one (NumPy's too; not True) from `least` to `most`; else a `ValueError`."""
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
        if number < least or (most is not None and number > most):
            raise TypeError
    except TypeError:
        raise ValueError(f"{name} must be an integer {span}, got {value!r}") from None
    return number


def is_finite(value: Any) -> bool:
    """Whether `value` is a number at all, and neither NaN nor infinite."""
    return isinstance(value, Real) and math.isfinite(value)
