"""What every verb shares: `--threads`, one clear line for bad input, and how a backend is named."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from llmfast.backends import BackendUnavailable, load_backend

MOST_SCHEMA_BYTES = 1 << 20
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


def sampling_options(temperature: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """How tokens are chosen, and where a text ends."""
    options = [
        click.option("-t", "--temperature", type=float, default=temperature, show_default=True, help="0 is greedy."),
        click.option("--top-k", type=int, help="Only the K likeliest tokens."),
        click.option("--top-p", type=float, help="Only the likeliest tokens of total probability P."),
        click.option("--min-p", type=float, help="Only tokens P times as likely as the likeliest."),
        click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
        click.option(
            "--logit-bias",
            multiple=True,
            metavar="ID=NUMBER",
            callback=lambda _context, _option, given: dict(map(read_bias, given)) or None,
            help="Add NUMBER to the logit of a token; -inf rules it out.",
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT; may be given several times."),
        click.option("--seed", type=int, help="The same seed gives the same text."),
        click.option(
            "--speculate",
            type=click.IntRange(0, 15),
            metavar="K",
            help="Guess up to K tokens ahead: the same text. By default as many as pay.",
        ),
    ]
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


def read_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise click.BadParameter(f"expected ID=NUMBER, got {text!r}") from None


def json_schema_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--json-schema FILE`, which the command gets as the file's text."""
    return click.option(
        "--json-schema",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        callback=lambda _context, _option, path: None if path is None else read_schema(path),
        help="Answer in JSON that is valid by this schema.",
    )(command)


def read_schema(path: str) -> str:
    if os.path.getsize(path) > MOST_SCHEMA_BYTES:
        raise click.BadParameter(f"{path} is larger than a schema may be ({MOST_SCHEMA_BYTES >> 20} MB)")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path} is not text: {error}") from None


def running_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where a model runs, and in which precision."""
    from llmfast.inference.execution import PRECISIONS  # imports torch, which not every command needs

    options = [
        click.option(
            "--backend", default="auto", show_default=True, help="auto, pytorch, cpp, triton, a .py file, OP=NAME,…"
        ),
        click.option("--precision", default="auto", show_default=True, help=f"auto, {', '.join(PRECISIONS)}."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …"),
        click.option("--adapter", metavar="DIR", help="What `llmfast finetune` or peft made for the model."),
    ]
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


def resume_command(verb: str, out: Path, parallel: str) -> str:
    """What goes on with a run as it was started."""
    command = ["llmfast", verb, "--out", str(out), "--resume"]
    if parallel != "none":
        command = ["torchrun", "--nproc-per-node", "N", "-m", *command, "--parallel", parallel]
    elif any(argument.startswith("--threads") for argument in sys.argv):
        command += ["--threads", str(torch.get_num_threads())]
    return shlex.join(command)


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
