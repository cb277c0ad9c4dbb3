"""A chat at a terminal: lines that are turns, commands, and Ctrl-C."""

from __future__ import annotations

import pytest
from test_chat_conversation import TALK, talker, talker_directory  # noqa: F401, fixtures

from llmfast.chat import Conversation
from llmfast.chat.session import SETTINGS, Ended, Session, turns

pytestmark = pytest.mark.usefixtures("one_thread")


class Screen:
    def __init__(self, conversation, **settings):
        self.replies, self.notes = [], []
        self.session = Session(conversation, {"temperature": 0, **settings}, self.replies.append, self.notes.append)

    def enter(self, turn: str) -> tuple[str, list[str]]:
        """What a turn writes, and what it notes."""
        self.replies.clear()
        self.notes.clear()
        self.session.take(turn)
        return "".join(self.replies), list(self.notes)


@pytest.fixture
def screen(talker):  # noqa: F811
    return Screen(Conversation(talker))


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["a", "", "b"], ["a", "", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""a', "b", 'c"""', "d"], ["a\nb\nc", "d"]),
        (['  """', "  b\\", '"""', "d"], ["  b\\", "d"]),
        (['"""a"""'], ["a"]),
        (['"""a', "b"], ["a\nb"]),
        (["a\\"], ["a\\"]),
        ([], []),
    ],
)
def test_turns(lines, expected):
    waiting = iter(lines)

    def read_line() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    assert list(turns(read_line)) == expected


def test_replies_are_written(screen):
    for question, answer in TALK:
        assert screen.enter(question) == (f"{answer}\n", [])
    assert screen.enter("  ") == ("", [])


def test_commands(screen, tmp_path):
    screen.enter("hello")
    file = str(tmp_path / "talk.json")
    assert screen.enter("/retry") == ("A ☃!\n", [])
    assert screen.enter(f"/save {file}") == ("", [f"(2 messages in {file})"])
    assert screen.enter("/reset") == ("", ["(a new conversation)"])
    assert screen.session.conversation.messages == []
    assert screen.enter(f"/load {file}") == ("", [f"(2 messages from {file})"])
    assert screen.enter("who is it?") == ("The cat, said it.\n", [])
    assert screen.enter("/system") == ("", ["(the model is told what its template says)"])
    assert screen.enter("/system be kind") == ("", ["be kind"])
    assert screen.session.conversation.messages == [{"role": "system", "content": "be kind"}]
    with pytest.raises(Ended):
        screen.enter("/quit")


def test_help_names_every_command(screen):
    _, notes = screen.enter("/help")
    for name in ("help", "system", "reset", "retry", "save", "load", "set", "speed", "quit"):
        assert any(note.startswith(f"/{name} ") for note in notes), name
    assert "/set [NAME VALUE]       shows the settings, or changes one: /set temperature 0.2" in notes


def test_settings(screen):
    assert screen.enter("/set temperature 0.2") == ("", ["temperature 0.2"])
    assert screen.enter("/set top-k=5")[1] == ["temperature 0.2, top_k 5"]
    assert screen.enter("/set top_k none")[1] == screen.enter("/set")[1] == ["temperature 0.2, top_k none"]
    screen.enter("/set temperature 0")
    screen.enter("/set max_new_tokens 1")
    assert screen.enter("hello") == ("A\n", [])


@pytest.mark.parametrize(
    "turn, message",
    [
        ("/bogus", "there is no command /bogus; /help lists them"),
        ("/", "there is no command /;"),
        ("/set warmth 3", "there is no setting warmth; there are temperature, "),
        ("/set temperature hot", "temperature can't be 'hot'"),
        ("/set temperature -1", "temperature must be a number of at least 0"),
        ("/set temperature none", "temperature can't be 'none'"),
        ("/set top_p 2", r"top_p must be in \(0, 1\]"),
        ("/retry", "nothing to answer yet"),
        ("/save", "which file"),
        ("/load nowhere/at.all", "No such file"),
    ],
)
def test_what_can_not_be_done_is_one_clear_line(screen, turn, message):
    before = dict(screen.session.settings)
    with pytest.raises((ValueError, OSError), match=message):
        screen.enter(turn)
    assert screen.session.settings == before and screen.session.conversation.messages == []


def test_ctrl_c_stops_a_reply_and_not_the_program(screen):
    def interrupted(piece: str) -> None:
        screen.replies.append(piece)
        if piece == " ":
            raise KeyboardInterrupt

    screen.session.write = interrupted
    assert screen.enter("hello") == ("A \n", ["(stopped)"])
    assert screen.session.conversation.messages[-1] == {"role": "assistant", "content": "A "}
    screen.session.write = screen.replies.append
    assert screen.enter("/retry") == ("A ☃!\n", [])


def test_speed(screen):
    assert screen.enter("/speed") == ("", ["(speed is shown)"])
    _, (note,) = screen.enter("hello")
    prompt = len(screen.session.conversation.template.encode([{"role": "user", "content": "hello"}]))
    assert f"of {prompt} prompt tokens computed, the first after " in note and " tokens/s; " in note


def test_settings_are_those_of_a_chat():
    assert {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "seed", "stop"} == {
        *SETTINGS
    }
