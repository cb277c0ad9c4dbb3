"""Which kernels an operation runs on: the registry of backends and the choice between them.

A backend is a module, a flat list of functions with the names and signatures of `llmfast.ops`, and a function
`why_not(op, device, dtype)` that gives the reason it can't run something, or None. Four come with the package:
`pytorch`, `cpp`, `triton`, and `reference` (float64, for tests). Others are added by `register_backend`, by
`load_backend` from a file or a module, or by the entry-point group `llmfast.backends`.

What is chosen, first match first: the innermost `use_backend` of this thread, the environment variable
`LLMFAST_BACKEND`, and "auto": triton on a GPU, cpp on a CPU, pytorch where neither can. A backend chosen by name that
can't run raises `BackendUnavailable`; only "auto" looks further. Inside a derivative by `torch.func` or in forward mode
no backend runs that says `TRANSFORMABLE = False`, as cpp and triton do.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from llmfast.backends.derivatives import ADVICE, differentiating
from llmfast.backends.importing import import_module_or_file

OPS = (
    "causal_attention",
    "bidirectional_attention",
    "layer_norm",
    "add_layer_norm",
    "rms_norm",
    "add_rms_norm",
    "rotary",
    "gelu",
    "linear",
    "gated_linear",
    "linear_cross_entropy",
    "quantized_linear",
)
AUTO = {"cuda": ("triton", "pytorch"), "cpu": ("cpp", "pytorch")}
ALIASES = {"torch": "pytorch"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# name -> a module-like object, or where to import it from when it is first needed (Triton is slow to import).
BUILT_IN = ("pytorch", "cpp", "triton", "reference")
_registry: dict[str, Any] = {name: f"llmfast.backends.{name}" for name in BUILT_IN}


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and can't run this operation here; the message says why."""


class _Choice(threading.local):
    """The backend of each op in this thread. Thread-local because Dynamo guards it: switching recompiles."""

    def __init__(self) -> None:
        self.backend_of: dict[str, str] = dict.fromkeys(OPS, PROCESS_DEFAULT)


def register_backend(name: str, module: Any) -> None:
    """Makes `module` (anything with functions named as in `llmfast.ops`) selectable as `name`.

    It needs `why_not(op, device, dtype)` only if there are ops, devices or dtypes that it can't run; an op that it
    does not define counts as one it can't run.
    """
    if name in ("auto", *ALIASES, *BUILT_IN) or not name.isidentifier():
        raise ValueError(f"{name!r} can't be the name of a new backend")
    if not any(hasattr(module, op) for op in OPS):
        raise ValueError(f"backend {name!r} defines none of the ops {', '.join(OPS)}")
    _registry[name] = module


def load_backend(text: str) -> str:
    """The name of the backend that a command line means by `text`, loaded and, if it is new, registered.

    A known name ("cpp", "auto"), a Python file ("kernels/mine.py", which becomes `mine`), or a module to import
    ("my_package.kernels", from the current folder too, which becomes `my_package_kernels`).

    `ValueError` where there is no such backend or it defines no op, `BackendUnavailable` where it fails to import.
    """
    name = ALIASES.get(text, text)
    if name == "auto":
        return name
    if name in backend_names():
        _module(name)
        return name
    file = Path(text).resolve() if text.endswith(".py") else None
    name = re.sub(r"\W", "_", file.stem if file else text)
    if name in _registry:
        module = _registry[name]
        if getattr(module, "__file__", None) == str(file) if file else module is sys.modules.get(text):
            return name
        raise ValueError(f"backend {text} would be named {name!r}, and another backend has that name")
    try:
        register_backend(name, import_module_or_file(text, name))
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    except ModuleNotFoundError as error:
        known = f"known: auto, {', '.join(backend_names())}"
        raise ValueError(f"unknown backend {text!r} ({error}); {known}; or give a module or a .py file") from None
    except ImportError as error:
        raise BackendUnavailable(f"backend {text} can't be loaded: {error}") from error
    return name


def backend_names() -> list[str]:
    """Every backend that can be named: built in, registered, or announced by an installed package."""
    announced = [entry.name for entry in entry_points(group="llmfast.backends")]
    return list(dict.fromkeys([*_registry, *announced]))


@contextmanager
def use_backend(backend: str | Mapping[str, str]) -> Iterator[None]:
    """Runs the ops of this block, in this thread, on one backend, or on one per op.

    >>> with use_backend("pytorch"): ...
    >>> with use_backend({"causal_attention": "cpp"}): ...     # the other ops stay as they were

    `ValueError` for a name that is not known, `BackendUnavailable` for one that can't be loaded here.
    """
    before = _choice.backend_of
    _choice.backend_of = before | _normalise(backend)
    try:
        yield
    finally:
        _choice.backend_of = before


def chosen() -> frozenset[tuple[str, str]]:
    """The backend chosen for each op in this thread, "auto" where none is: something to remember results by."""
    return frozenset(_choice.backend_of.items())


def select(op: str, x: torch.Tensor, head_dim: int = 0) -> Callable[..., Any]:
    """The function that runs `op` on tensors like `x` under the current choice of backend."""
    return getattr(_module(resolve(op, x.device, x.dtype, head_dim)[0]), op)


def resolve(op: str, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> tuple[str, str]:
    """The name of the backend that runs `op` there under the current choice, and the reason for it.

    `head_dim` matters to attention only: a backend may have a largest one, `MAX_HEAD_DIM`.

    `BackendUnavailable` where none does.
    """
    name = _choice.backend_of[op]
    if name != "auto":
        reason = _why_not(name, op, device, dtype, head_dim)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} can't run {op} on {device.type} {_short(dtype)}: {reason}")
        return name, "chosen by name"
    passed = ""
    for candidate in AUTO.get(device.type, ("pytorch",)):
        reason = _why_not(candidate, op, device, dtype, head_dim)
        if reason is None:
            return candidate, f"the first of {device.type}'s backends that can" + passed
        passed += f"; {candidate} can't: {reason}"
    raise BackendUnavailable(f"no backend runs {op} on {device.type} {_short(dtype)}{passed}")


def capturable(name: str) -> bool:
    """Whether a backend's functions can be recorded in a CUDA graph, which its module says with `CAPTURABLE = True`.

    They then never wait for the GPU, and launch the same kernels whatever the values of their tensors are.
    """
    return bool(getattr(_module(name), "CAPTURABLE", False))


def _why_not(name: str, op: str, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    module = _module(name)
    if not hasattr(module, op):
        return f"it does not define {op}"
    if head_dim > getattr(module, "MAX_HEAD_DIM", head_dim):
        return f"its attention takes heads of up to {module.MAX_HEAD_DIM} channels, not {head_dim}"
    if differentiating() and not getattr(module, "TRANSFORMABLE", True):
        return f"its kernels have no derivatives by torch.func or in forward mode ({ADVICE})"
    check = getattr(module, "why_not", None)
    return check(op, device, dtype) if check is not None else None


def _module(name: str) -> Any:
    """The module of a backend, imported when it is first needed. `ValueError` for a name that is not registered."""
    module = _registry.get(name)
    return module if module is not None and not isinstance(module, str) else _load(name)


def _load(name: str) -> Any:
    try:
        if isinstance(place := _registry.get(name), str):
            _registry[name] = importlib.import_module(place)
        elif place is None:
            found = [entry for entry in entry_points(group="llmfast.backends") if entry.name == name]
            if not found:
                raise ValueError(f"unknown backend {name!r}; known: auto, {', '.join(backend_names())}")
            register_backend(name, found[0].load())
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(f"backend {name!r} can't be loaded: {error}") from error
    return _registry[name]


def _normalise(backend: str | Mapping[str, str]) -> dict[str, str]:
    """One known, loaded backend name per op."""
    chosen = dict.fromkeys(OPS, backend) if isinstance(backend, str) else dict(backend)
    for op, name in chosen.items():
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
        chosen[op] = name = ALIASES.get(name, name)
        if name != "auto":
            _module(name)
    return chosen


@dataclass(frozen=True)
class Support:
    """One row of `backends()`: can this backend run this op on this device in this dtype, and if not, why."""

    op: str
    backend: str
    device: str
    dtype: str
    reason: str | None

    @property
    def available(self) -> bool:
        return self.reason is None


def backends() -> list[Support]:
    """What there is: every op × backend × device × dtype, with the reason where one can't run."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    rows = []
    for name in backend_names():
        try:
            _module(name)
            problem = None
        except Exception as error:  # a third party's module may fail in any way; it must not hide the others
            problem = str(error)
        for device in devices:
            for op in OPS:
                for dtype in DTYPES:
                    try:
                        reason = problem or _why_not(name, op, device, dtype)
                    except Exception as error:
                        reason = f"its why_not raised {type(error).__name__}: {error}"
                    rows.append(Support(op, name, device.type, _short(dtype), reason))
    return rows


@dataclass(frozen=True)
class Explanation:
    """Which backend a call gets, and why. `configuration` is what the backend says of the kernel it would launch."""

    op: str
    backend: str
    reason: str
    configuration: str

    def __str__(self) -> str:
        return f"{self.op} -> {self.backend} ({self.reason})" + (
            f": {self.configuration}" if self.configuration else ""
        )


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend and configuration `ops.<op>(*args, **kwargs)` would get now, and why; nothing is computed.

    Raises `BackendUnavailable` exactly where the call itself would.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not tensors:
        raise ValueError(f"explain({op!r}, ...) needs the tensors of the call")
    head_dim = tensors[0].shape[-1] if op.endswith("_attention") else 0
    name, reason = resolve(op, tensors[0].device, tensors[0].dtype, head_dim)
    describe = getattr(_module(name), "describe", None)
    return Explanation(op, name, reason, describe(op, *args, **kwargs) if describe is not None else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _preload() -> None:
    """Loads now what may be chosen without being named, because nothing can be imported inside `torch.compile`.

    A wrong LLMFAST_BACKEND is not an error here, where nothing could catch it, but at the first op.
    """
    names = AUTO["cuda"] + AUTO["cpu"] if torch.cuda.is_available() else AUTO["cpu"]
    for name in (*names, PROCESS_DEFAULT):
        if name != "auto":
            with suppress(ValueError, BackendUnavailable):
                _module(name)


PROCESS_DEFAULT = ALIASES.get(name := os.environ.get("LLMFAST_BACKEND") or "auto", name)
_choice = _Choice()
_preload()
