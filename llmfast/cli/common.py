"""What every verb shares: `--threads`, one clear line for bad input, and how a backend is named."""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click
import torch

from llmfast.backends import BackendUnavailable, load_backend

# What the package raises for input it can't use; anything else is a bug and keeps its traceback.
BAD_INPUT = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--threads`, and one clear line for bad input."""

    @click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: what torch chooses).")
    @functools.wraps(command)
    def wrapped(*args: Any, threads: int | None, **kwargs: Any) -> None:
        warnings.showwarning = lambda message, *_, **__: click.echo(f"\nnote: {message}", err=True)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # the reader (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (*BAD_INPUT, BackendUnavailable) as error:
            fail(error)

    return wrapped


def fail(error: Exception) -> None:
    """One line, exit code 2."""
    click.echo(f"llmfast: {in_options(' '.join(str(error).split())) or type(error).__name__}", err=True)
    sys.exit(2)


def in_options(text: str) -> str:
    """Advice of the package, in which the arguments of its functions are named as this command's options:
    `truncate=True` as `--truncate`, `top_k` as `--top-k`."""
    context = click.get_current_context(silent=True)
    for option in context.command.params if context is not None else []:
        if isinstance(option, click.Option) and option.name is not None:
            name = max(option.opts, key=len)
            spelled = rf"\b{option.name}=True\b" + (rf"|\b{option.name}\b" if "_" in option.name else "")
            text = re.sub(spelled, name, text)
    return text


def backend_option(text: str) -> str | dict[str, str]:
    """`cpp`, or one for each op: `causal_attention=cpp,layer_norm=mine.py`; a module or a file is loaded."""
    if "=" not in text:
        return load_backend(text)
    pairs = [item.partition("=") for item in text.split(",")]
    return {op.strip(): load_backend(name.strip()) for op, _, name in pairs}
