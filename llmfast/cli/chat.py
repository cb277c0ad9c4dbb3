"""`llmfast chat`: talk to a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import click

import llmfast
from llmfast.chat import Conversation
from llmfast.chat.session import Ended, Session, turns
from llmfast.cli.common import (
    BAD_INPUT,
    backend_option,
    common_options,
    in_options,
    json_schema_option,
    running_options,
    sampling_options,
)


@click.command()
@click.option("-m", "--model", default="smollm2", show_default=True, help="Name, directory, .gguf file or hub name.")
@click.option("-s", "--system", metavar="TEXT", help="What the model is told beforehand.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of a reply.")
@sampling_options(temperature=0.5)
@click.option("--load", "saved", type=click.Path(exists=True, dir_okay=False), help="Go on with a saved conversation.")
@click.option("--speed", is_flag=True, help="Show how fast replies come.")
@json_schema_option
@running_options
@common_options
def chat(
    model: str,
    system: str | None,
    saved: str | None,
    speed: bool,
    backend: str,
    precision: str,
    device: str,
    adapter: str | None,
    stop: tuple[str, ...],
    **settings: Any,
) -> None:
    """Talk to a model: what you enter is a turn, and the reply streams back.

    Enter /help for what else can be entered; Ctrl-C stops a reply, Ctrl-D ends. In a pipe every line of stdin is a
    turn, and stdout gets the replies alone.
    """
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device, adapter=adapter)
    conversation = Conversation(llm, system)
    if saved is not None:
        conversation.load(saved)
    settings |= {"stop": list(stop) or None}

    def write(text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()

    session = Session(conversation, settings, write, lambda line: click.echo(line, err=True), speed)
    at_a_terminal = sys.stdin.isatty()
    for turn in turns(line_reader() if at_a_terminal else lines_of_a_pipe):
        try:
            session.take(turn)
        except Ended:
            return
        except KeyboardInterrupt:  # before a reply has begun, or after it has ended
            if not at_a_terminal:
                raise
        except BAD_INPUT as error:
            if not at_a_terminal:
                raise
            session.note(in_options(" ".join(str(error).split())))


def lines_of_a_pipe() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def line_reader() -> Callable[[], str]:
    """Asks for a line, with history and editing: by `prompt_toolkit` where it is installed, else by readline."""
    click.echo("Ctrl-C stops a reply, Ctrl-D ends, /help lists the rest.", err=True)
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, which teaches `input` to edit
        ask: Callable[[str], str] = input
    else:
        ask = PromptSession().prompt

    def read() -> str:
        while True:
            try:
                return ask("> ")
            except KeyboardInterrupt:
                click.echo("(Ctrl-D ends)", err=True)

    return read
