"""A chat at a terminal, or through a pipe: lines in, replies out, and commands that begin with a slash."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llmfast.chat.conversation import Conversation, Reply
from llmfast.inference.sampling import SamplingSettings

BLOCK = '"""'
SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "seed": int,
    "stop": str,
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CHANGEABLE = ("top_k", "top_p", "min_p", "seed", "stop")  # to none


class Ended(Exception):
    """The user has had enough."""


def turns(read_line: Callable[[], str]) -> Iterator[str]:
    '''What a user enters, turn by turn: a line, several that end in a backslash but the last, or all between two """.

    `read_line` raises `EOFError` at the end.
    '''
    while True:
        try:
            turn = read_line()
        except EOFError:
            return
        try:
            if turn.lstrip().startswith(BLOCK):
                turn = turn.lstrip().removeprefix(BLOCK)
                while not turn.rstrip().endswith(BLOCK):
                    turn += "\n" + read_line()
                turn = turn.rstrip().removesuffix(BLOCK).strip("\n")
            else:
                while turn.endswith("\\"):
                    turn = turn[:-1] + "\n" + read_line()
        except EOFError:  # in the middle of one, which counts as far as it came
            pass
        yield turn


@dataclass
class Session:
    """`write` gets the replies, piece by piece, and `note` what else there is to say, a line at a time."""

    conversation: Conversation
    settings: dict[str, Any]
    write: Callable[[str], None]
    note: Callable[[str], None]
    speed: bool = False
    _commands: dict[str, Callable[[str], None]] = field(init=False)

    def __post_init__(self) -> None:
        self._commands = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(type(self)) if name.startswith("do_")
        }

    def take(self, turn: str) -> None:
        """Answers a turn, or obeys a command. `ValueError` or `OSError` for what can't be done, `Ended` at the end."""
        if not turn.strip():
            return
        word, _, argument = turn.strip().partition(" ")
        if not word.startswith("/") or "\n" in word:
            self._answer(lambda: self.conversation.say(turn, **self.settings))
        elif (command := self._commands.get(word[1:])) is not None:
            command(argument.strip())
        else:
            raise ValueError(f"there is no command {word}; /help lists them")

    def _answer(self, begin: Callable[[], Reply]) -> None:
        """Writes a reply as it comes. Ctrl-C ends it, and what came of it stays."""
        start = time.perf_counter()
        first = 0.0
        reply = begin()
        try:
            for piece in reply:
                first = first or time.perf_counter()
                self.write(piece)
        except KeyboardInterrupt:
            self.note("(stopped)")
        finally:
            reply.close()
            self.write("\n")
        stream, end = reply.stream, time.perf_counter()
        if self.speed and first:
            rate = f", {(stream.tokens - 1) / (end - first):,.0f} tokens/s" if stream.tokens > 1 and end > first else ""
            self.note(
                f"[{stream.prompt_tokens - stream.reused} of {stream.prompt_tokens} prompt tokens computed, the first"
                f" after {1000 * (first - start):.0f} ms; {stream.tokens} tokens{rate}; {stream.how}]"
            )

    # --- commands: their first lines are what /help shows ---------------------------------------------------------

    def do_help(self, _: str) -> None:
        """what can be entered here"""
        for name, command in self._commands.items():
            about = command.__doc__ or ""
            usage, _, about = about.partition(": ") if ": " in about else ("", "", about)
            self.note(f"{f'/{name} {usage}':<24}{about}")
        self.note('Lines that end in \\ go on in the next; """ begins and ends a text of several lines.')

    def do_system(self, text: str) -> None:
        """[TEXT]: shows what the model is told beforehand, or starts anew with TEXT"""
        if text:
            self.conversation.system = text
        self.note(self.conversation.system or "(the model is told what its template says)")

    def do_reset(self, _: str) -> None:
        """forgets all turns"""
        self.conversation.reset()
        self.note("(a new conversation)")

    def do_retry(self, _: str) -> None:
        """another reply to the last turn"""
        self._answer(lambda: self.conversation.retry(**self.settings))

    def do_save(self, path: str) -> None:
        """FILE: writes the conversation as JSON"""
        self.conversation.save(_file(path))
        self.note(f"({len(self.conversation.messages)} messages in {path})")

    def do_load(self, path: str) -> None:
        """FILE: goes on with a conversation that was saved"""
        self.conversation.load(_file(path))
        self.note(f"({len(self.conversation.messages)} messages from {path})")

    def do_set(self, text: str) -> None:
        """[NAME VALUE]: shows the settings, or changes one: /set temperature 0.2"""
        name, _, value = text.replace("=", " ").partition(" ")
        if name:
            self._set(name.replace("-", "_"), value.strip())
        self.note(
            ", ".join(
                f"{name} {'none' if value is None else value}"
                for name, value in self.settings.items()
                if name in SETTINGS
            )
        )

    def _set(self, name: str, value: str) -> None:
        if name not in SETTINGS:
            raise ValueError(f"there is no setting {name}; there are {', '.join(SETTINGS)}")
        if value == "none" and name in CHANGEABLE:
            changed = None
        else:
            try:
                changed = SETTINGS[name](value)
            except ValueError:
                raise ValueError(f"{name} can't be {value!r}") from None
        settings = self.settings | {name: changed}
        SamplingSettings(**{name: settings[name] for name in SAMPLING if name in settings})  # says what is wrong
        self.settings = settings

    def do_speed(self, _: str) -> None:
        """shows how fast replies come, or no longer"""
        self.speed = not self.speed
        self.note(f"(speed is {'shown' if self.speed else 'not shown'})")

    def do_quit(self, _: str) -> None:
        """ends, as Ctrl-D does"""
        raise Ended


def _file(path: str) -> str:
    if not path:
        raise ValueError("which file? /save FILE, /load FILE")
    return path
