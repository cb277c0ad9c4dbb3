"""Importing a user's backend by its name on a command line: a module's dotted name, or a Python file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any


def import_module_or_file(text: str, name: str) -> Any:
    """The module `text` ("my_package.kernels", from the current folder too) or the file `text` ("kernels/mine.py").

    A file becomes the module `llmfast_backend_<name>`. `ModuleNotFoundError` or `FileNotFoundError` where there is no
    such thing, `ImportError`, with the line at fault, where running it fails.
    """
    if text.endswith(".py"):
        path = Path(text).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {text}")
        _make_importable(path.parent)  # a file can import its neighbours, as a script can
        spec = importlib.util.spec_from_file_location(f"llmfast_backend_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where pickle and torch.compile look for it
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[spec.name]
            raise ImportError(_what_went_wrong(error)) from error
        return module

    if not all(part.isidentifier() for part in text.split(".")):
        raise ModuleNotFoundError(f"{text!r} is not the name of a module")
    _make_importable(Path.cwd())  # `python -m llmfast` imports from here anyway, `llmfast` does not
    try:
        return importlib.import_module(text)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{text}.".startswith(f"{error.name}."):
            raise ModuleNotFoundError(f"there is no module {text}") from error
        raise ImportError(_what_went_wrong(error)) from error


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _what_went_wrong(error: Exception) -> str:
    """With the line at fault, which the author of the file needs, and not the whole traceback, which he does not."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # its message names the place
        return said
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({last.filename}, line {last.lineno})"
