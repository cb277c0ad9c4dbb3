"""An engine in a process of its own, so that no library shares another's memory, threads or packages: it is told what
to do line by line, and answers each line with one of JSON. Between an answer and the next line it is stopped: threads
of OpenMP and ONNX Runtime would turn round and round for a while, on processors that another engine is measured on.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class EngineProcess:
    """`script` with `arguments`, run by `python`; what it writes to stderr goes to the file `errors`. Only an engine of
    this project (`own`) finds the package in this checkout."""

    def __init__(self, python: str, script: str, arguments: Sequence[str], threads: int, errors: Path, own: bool):
        self._errors = errors.open("w+")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment | ({"PYTHONPATH": str(ROOT)} if own else {}),
        )
        atexit.register(self.kill)  # what is stopped does not see that nobody is left to ask

    def read(self) -> dict[str, Any]:
        """Its next answer. `SystemExit` with the end of its errors where there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"an engine has ended:\n{self._errors.read()[-2000:]}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, what: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        print(what, file=self._process.stdin, flush=True)
        return self.read()

    def kill(self) -> None:
        self._process.kill()


def answers() -> Callable[..., None]:
    """For the process itself: what writes an answer. What a library prints goes to stderr from now on, so that it does
    not come between the answers."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**document: Any) -> None:
        print(json.dumps(document), file=lines, flush=True)

    return answer
