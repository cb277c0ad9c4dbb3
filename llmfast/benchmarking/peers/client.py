"""The other end of a worker's pipes, and what else runs beside it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import llmfast
from llmfast.benchmarking.peers.plan import OURS, Engine

# Runs a module of this folder as the package `peers`, whose parent comes last on the path: it holds other names too.
RUN = (
    "import runpy, sys; sys.path[:1] = []; sys.path.append({path!r}); sys.argv = ['', *sys.argv[1:]]; "
    "runpy.run_module('peers.{module}', run_name='__main__')"
)
PATIENCE = 180.0  # seconds for any answer; loading included
PATIENCE_WITH_A_SLOW_START = 900.0
PACKAGES = {  # what is imported -> what is installed
    "llama_cpp": "llama-cpp-python",
    "ctranslate2": "ctranslate2",
    "transformers": "transformers",
}
OPTIONAL = ["openvino-genai"]  # whose wheels are not everywhere: an engine without it says so


class WorkerError(RuntimeError):
    """A worker that said why it could not, ended, or never answered."""


def peers_python() -> str:
    """The Python that has the peers' packages: this one, or the one that LLMFAST_PEERS_PYTHON names."""
    return os.environ.get("LLMFAST_PEERS_PYTHON") or sys.executable


def code_of(module: str) -> list[str]:
    """The arguments of a Python that run a module of this folder."""
    return ["-c", RUN.format(path=str(Path(__file__).resolve().parents[1]), module=module)]


def run_module(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a module of this folder to its end, by the Python that has the peers' packages."""
    return subprocess.run([peers_python(), *code_of(module), *map(str, arguments)], capture_output=True, text=True)


def missing_packages() -> list[str]:
    code = f"import importlib.util as i; print(*[n for n in {list(PACKAGES)} if i.find_spec(n) is None])"
    found = subprocess.run([peers_python(), "-c", code], capture_output=True, text=True, check=True).stdout
    return [PACKAGES[name] for name in found.split()]


def versions() -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json; there = {d.name.replace('_', '-') for d in m.distributions()}; "
        f"print(json.dumps({{n: m.version(n) for n in {[*PACKAGES.values(), *OPTIONAL, 'torch']} if n in there}}))"
    )
    return json.loads(subprocess.run([peers_python(), "-c", code], capture_output=True, text=True, check=True).stdout)


class Worker:
    """A process with one engine. It begins to load at once; `wait_until_ready` returns when it has."""

    def __init__(self, engine: Engine, models: Path, capacity: int, threads: int):
        self.engine = engine
        ours = engine.library == OURS
        path = {"PYTHONPATH": str(Path(llmfast.__file__).parents[1])} if ours else {}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self.process = subprocess.Popen(
            [
                *(sys.executable if ours else peers_python(), *code_of("worker")),
                *(engine.library, engine.precision, str(models), str(capacity), str(threads)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)} | path,
        )

    def wait_until_ready(self) -> None:
        self._read()

    def ask(self, what: str, **arguments: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{self.engine.name} has ended{self._last_words()}") from None
        return self._read()

    def logits(self, prompt: int, new: int = 0) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.ask("logits", prompt=prompt, new=new)["logits"]), dtype=np.float32)

    def _read(self) -> dict[str, Any]:
        """One line; the worker never writes more than one before it is asked again."""
        stdout = self.process.stdout
        assert stdout is not None
        patience = PATIENCE_WITH_A_SLOW_START if self.engine.slow_start else PATIENCE
        if not select.select([stdout], [], [], patience)[0]:
            raise WorkerError(f"{self.engine.name} gave no answer in {patience:.0f} seconds")
        line = stdout.readline()
        if not line:
            raise WorkerError(f"{self.engine.name} has ended{self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.engine.name}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def settle(self) -> None:
        """Waits until the process computes nothing: threads of OpenMP spin on for a while after their work.

        An engine's idle threads must not slow down the next one, so one that never rests is an error.
        """
        end = time.monotonic() + 5
        before = self._cpu_seconds()
        while time.monotonic() < end:
            time.sleep(0.02)
            now = self._cpu_seconds()
            if now - before < 0.001:
                return
            before = now
        raise WorkerError(f"{self.engine.name} goes on computing while nothing is asked of it")

    def _cpu_seconds(self) -> float:
        """What its threads have used so far. Where the system doesn't say, it is believed to rest."""
        total = 0
        for thread in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # a thread that has just ended
                total += int(thread.read_text().split()[0])
        return total / 1e9

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def cpus_in_use(seconds: float = 0.5) -> float | None:
    """How many CPUs' worth of time goes to other work while this waits; None where the system doesn't say."""

    def busy() -> float:
        words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        ticks = [int(word) for word in words]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting for a disk

    if not Path("/proc/stat").exists():
        return None
    before, start = busy(), time.monotonic()
    time.sleep(seconds)
    return round((busy() - before) / (time.monotonic() - start), 2)


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """One other process that computes all the time, wherever the system puts it."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()
