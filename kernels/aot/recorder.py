"""A stand-in for a GPU's driver: launches go as far as to say what they would compile, and are noted."""

from __future__ import annotations

import ast
import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..launch import Device, pretend
from .chips import CHIPS, Chip


@dataclass(frozen=True)
class Compilation:
    """What one launch would compile."""

    chip: Chip
    kernel: JITFunction
    dtype: str
    case: str  # which call it came from, in words
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: Any
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Module and function, as in causal_attention.forward."""
        module = self.kernel.fn.__module__.rsplit(".", 1)[1]
        return f"{module}.{self.kernel.fn.__name__.strip('_').removesuffix('_kernel')}"

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the machine code, except for Triton itself."""
        options = {name: self.options.get(name) for name in ("num_warps", "num_stages", "num_ctas")}
        if self.options.get("maxnreg") is not None:
            options["maxnreg"] = self.options["maxnreg"]
        attributes = {str(place): value for place, value in self.attributes.items() if value}
        constants = sorted(map(str, self.constants.items()))
        parts = [source_of(self.kernel), self.signature, constants, attributes, options]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _StandIn:
    """What a launch asks of a GPU's driver before it runs anything."""

    def __init__(self, chip: Chip):
        self.chip = chip

    def get_current_device(self) -> int:
        return list(CHIPS).index(self.chip.name)  # a device for each chip: Triton keeps what it knows by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.chip.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def record(chip: Chip, calls: Iterator[tuple[str, str, Callable[[], object]]]) -> list[Compilation]:
    """What the launches of `calls`, triples of dtype, name and function, would compile on `chip`; each thing once."""
    found: dict[tuple, Compilation] = {}
    with _recording(chip) as noted:
        for dtype, case, call in calls:
            noted.clear()
            call()
            for key, (kernel, signature, constants, attributes, options) in noted.items():
                compilation = Compilation(chip, kernel, dtype, case, signature, constants, attributes, options)
                found.setdefault(key, compilation)
    return list(found.values())


@contextmanager
def _recording(chip: Chip) -> Iterator[dict[tuple, Any]]:
    """In this block CPU tensors count as being on the chip, and launches note what they would compile."""
    noted: dict[tuple, Any] = {}

    def note(self, key, signature, device, constants, options, attributes, warmup):
        noted[self.fn.__module__, self.fn.__name__, str(key)] = (
            self, dict(signature), constants, attributes, dict(options.__dict__),
        )  # fmt: skip
        return None  # nothing was compiled, and nothing runs

    do_compile = JITFunction._do_compile
    driver.set_active(_StandIn(chip))  # for good: where there is no GPU there is no driver to go back to
    JITFunction._do_compile = note
    try:
        with pretend(Device(chip.family, chip.multiprocessors)):
            yield noted
    finally:
        JITFunction._do_compile = do_compile


def source_of(kernel: JITFunction) -> str:
    """The code of a kernel and of the device functions and constants that it uses, without comments or docstrings."""
    texts: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        tree = ast.parse(textwrap.dedent(function.src))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        if ast.get_docstring(definition) is not None:
            definition.body = definition.body[1:] or [ast.Pass()]
        texts[f"{function.fn.__module__}.{function.fn.__name__}"] = ast.dump(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in function.fn.__globals__:
                value = function.fn.__globals__[node.id]
                if isinstance(value, JITFunction):
                    if f"{value.fn.__module__}.{value.fn.__name__}" not in texts:
                        visit(value)
                elif isinstance(value, triton.language.constexpr):
                    texts[node.id] = repr(value.value)

    visit(kernel)
    return json.dumps(texts, sort_keys=True)
