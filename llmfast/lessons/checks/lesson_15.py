"""Lesson 15, C++. The answers are sources: they are compiled, and run on inputs of awkward lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfast.lessons.checking import difference
from llmfast.lessons.compiling import Compiled, compile_cpp

GUARD = 1234.5  # what stands behind an array's end, and must stay


def _compiled(source: str, name: str) -> Compiled | str:
    if not isinstance(source, str):
        return f"it is a {type(source).__name__}, where a string of C++ is expected"
    try:
        compiled = compile_cpp(source)
    except RuntimeError as error:
        errors = [line for line in str(error).splitlines() if "error" in line]
        return f"it does not compile: {(errors or [str(error)])[0]}"
    try:
        getattr(compiled, name)
    except AttributeError:
        return f'there is no function {name}: write EXPORT {name}(…), which is extern "C" void'
    return compiled


def exercise_1(source: str) -> str | None:
    compiled = _compiled(source, "relu")
    if isinstance(compiled, str):
        return compiled
    generator = torch.Generator().manual_seed(15)
    for n in (1003, 64, 5):
        x, y = torch.randn(n, generator=generator), torch.full((n + 64,), GUARD)
        compiled.relu(torch.cat([x, torch.ones(64)]), y, n)
        if bool((y[n:] != GUARD).any()):
            return f"n = {n}: it writes beyond the end; the last elements need a loop of their own"
        if bool((y[:n] == GUARD).any()):
            return f"n = {n}: {int((y[:n] == GUARD).sum())} elements are never written; the last need their own loop"
        mistakes = {"negative numbers come through": x, "the sign is turned: max(x, 0) is meant": x.clamp(max=0)}
        wrong = difference(y[:n], x.clamp(min=0), 0.0, mistakes, f"n = {n}")
        if wrong is not None:
            return wrong
    return None


def exercise_2(source: str) -> str | None:
    compiled = _compiled(source, "row_sums")
    if isinstance(compiled, str):
        return compiled
    for rows, columns in ((3, 5), (2, 100_000)):
        x, y = torch.full((rows, columns), 0.1), torch.full((rows,), GUARD)
        x[0] = torch.linspace(0, 1, columns)
        compiled.row_sums(x, y, rows, columns)
        exact = x.double().sum(dim=1)
        where = f"{rows} rows of {columns:,}"
        mistakes = {
            "every row has the same sum: row r begins at x + r * columns": exact[:1].expand(rows),
            "these are means": exact / columns,
        }
        wrong = difference(
            y.double() / exact, torch.ones(rows), 1e-4, {m: v / exact for m, v in mistakes.items()}, where
        )
        if wrong is not None and columns > 10 and difference(y.double() / exact, torch.ones(rows), 0.02) is None:
            return (
                f"{where}: off by {float((y / exact - 1).abs().max()):.1e} of the sum; when the sum is large, a float "
                "loses the last bits of what is added: use several sums, or a double"
            )
        if wrong is not None:
            return wrong
    return None


def exercise_3(loads: Callable) -> str | None:
    for rows in (12, 1):
        mistakes = {
            "the other way round: this is how often each loaded float is used": rows,
            "a load of a vector brings W floats and serves W multiply-adds: W cancels": 1 / (16 * rows),
            "two vectors are loaded, but they serve two vectors of sums: it cancels": 2 / rows,
            "this is step 2, where every multiply-add loads its weight: a tile uses each load in all its rows": 1.0,
        }
        wrong = difference(loads(rows), 1 / rows, mistakes=mistakes, where=f"{rows} rows")
        if wrong is not None:
            return wrong
    return None
