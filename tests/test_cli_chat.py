"""`llmfast chat`: through a pipe, and one clear line for bad input."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import termios
import time

import pytest
from test_chat_conversation import talker, talker_directory  # noqa: F401, fixtures
from test_cli import run, settings_of_this_process  # noqa: F401, a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_pipe(talker_directory):  # noqa: F811
    ran = run("chat", "-m", str(talker_directory), "-t", "0", stdin="hello\nwho is it?\n\n/speed\nbye\n")
    assert (ran.code, ran.stdout) == (0, "A ☃!\nThe cat, said it.\nok\n")
    assert ran.stderr.startswith("(speed is shown)\n[") and " tokens/s" in ran.stderr


def test_options(talker_directory, tmp_path):  # noqa: F811
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "A ☃!"}]))
    model = ("chat", "-m", str(talker_directory), "-t", "0")
    ran = run(*model, "--load", str(file), "--speed", stdin="who is it?\n")
    assert ran.stdout == "The cat, said it.\n" and "prompt tokens computed" in ran.stderr
    assert run(*model, "--stop", "☃", stdin="hello\n").stdout == "A \n"
    ran = run(*model, "-s", "be kind", stdin="/system\n/set\n")
    assert ran.stderr.startswith("be kind\n") and "max_new_tokens 512, " in ran.stderr and ran.stdout == ""


def test_json_of_a_schema(talker_directory, tmp_path):  # noqa: F811
    pytest.importorskip("llguidance")
    file = tmp_path / "schema.json"
    file.write_text(
        '{"type": "object", "properties": {"ok": {"enum": [1]}}, "required": ["ok"], "additionalProperties": false}'
    )
    model = ("-m", str(talker_directory), "--json-schema", str(file))
    assert "ok" in json.loads(run("chat", *model, stdin="hello\n").stdout)
    assert "ok" in json.loads(run("generate", *model, "--json", "hello").stdout)["texts"][0].removeprefix("hello")
    file.write_text("[]")
    ran = run("chat", *model, stdin="hello\n")
    assert ran.code == 2 and ran.stderr == "llmfast: --json-schema is not a JSON schema: it should be a JSON object\n"
    file.write_bytes(b"\xff")
    assert run("chat", *model, stdin="hello\n").code == 2


@pytest.mark.parametrize(
    "arguments, stdin, message",
    [
        ((), "/bogus\n", "there is no command /bogus"),
        ((), "z" * 400, "the last turn has 4"),
        (("-t", "-1"), "hello\n", "temperature must be"),
        (("-m", "stories"), "hello\n", "this model has no chat template"),
        (("-m", "nowhere.gguf"), "hello\n", "no model"),
    ],
)
def test_bad_input_is_one_clear_line(talker_directory, arguments, stdin, message):  # noqa: F811
    ran = run("chat", "-m", str(talker_directory), *arguments, stdin=stdin)
    assert ran.code == 2 and ran.stderr.startswith("llmfast: ") and message in ran.stderr
    assert ran.stderr.count("\n") == 1 and ran.stdout == ""


def test_without_a_model_it_says_how_to_get_one(tmp_path):
    ran = run("chat", stdin="hello\n", LLMFAST_HOME=str(tmp_path))
    assert ran.code == 2 and "llmfast get smollm2" in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["prompt_toolkit", "readline"])
def test_a_terminal(talker_directory, editor):  # noqa: F811
    """As a user sees it: replies, an error that ends nothing, Ctrl-C at the prompt, and Ctrl-D."""
    without = "import sys; sys.modules['prompt_toolkit'] = None; " if editor == "readline" else ""
    code = f"{without}from llmfast.cli import main; main()"
    ours, theirs = pty.openpty()
    chat = subprocess.Popen(
        [sys.executable, "-c", code, "chat", "-m", str(talker_directory), "-t", "0"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tempfile.gettempdir(), start_new_session=True,
        env={**os.environ, "TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"},
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while text not in seen:
            ready, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(ours, 4096).decode("utf-8", "replace")
        seen = seen.partition(text)[2]

    try:
        until("/help lists the rest.")
        for entered, shown in [
            (b"hello\r", "A \N{SNOWMAN}!"),
            (b"/bogus\r", "there is no command /bogus"),
            (b"\x03", "(Ctrl-D ends)"),
            (b"who is it?\r", "The cat, said it."),
        ]:
            until("> ")  # a key that comes sooner may be lost
            os.write(ours, entered)
            until(shown)
        for _ in range(30):
            os.write(ours, b"\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                chat.wait(1)
                break
        assert chat.returncode == 0
    finally:
        chat.kill()
        os.close(ours)
