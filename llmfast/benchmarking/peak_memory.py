"""The most memory that something takes, in a process of its own, so that nothing hides behind what came before.

On a CPU it is what the process adds to its resident memory (`VmHWM`) after it has done the same on 8 tokens once (with
the embedded model), and so has its libraries' code in memory: inputs, weights, results and scratch. Linux lets a
process reset that high-water mark; elsewhere the peak of importing remains below it. On a GPU it is
`torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmfast.backends import load_backend
from llmfast.benchmarking import models, op_cases, training_cases
from llmfast.benchmarking.comparison import Entry, Measured, explained
from llmfast.benchmarking.peers.models import prompt_ids
from llmfast.benchmarking.records import Record
from llmfast.threads import thread_count
from llmfast.weights.locate import EMBEDDED

OPS = ("causal_attention", "linear_cross_entropy")  # whose memory could grow with the square, or with the vocabulary
STATUS = Path("/proc/self/status")
WARM_UP = 8  # tokens


@dataclass(frozen=True)
class Task:
    """One thing to measure. `name` is an op ("causal_attention backward"), "prefill", "decode" or "training step"."""

    name: str
    tokens: int
    entry: Entry
    device: str
    model: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        batch = training_cases.BATCH if self.name == "training step" else 1
        return {"batch": batch, "context" if self.name == "decode" else "tokens": self.tokens}


def tasks(
    op_lengths: Sequence[int],
    most_operations: float,
    model: str,
    lengths: Sequence[int],
    training_model: str,
    training_lengths: Sequence[int],
    precisions: Sequence[str],
    device: str = "cpu",
    chosen: Sequence[str] = (),
) -> Iterator[Task]:
    """Some ops backward, prompts and steps of training, by their numbers of tokens, and decoding by precision.

    Ops that take more than `most_operations` are left out.
    """
    for op in OPS:
        for tokens in op_lengths:
            work = op_cases.OPS[op](tokens).backward
            if work is None or work.operations > most_operations:
                continue
            for entry in op_cases.competitors(op, "fp32", device, chosen):
                yield Task(f"{op} backward", tokens, entry, device)
    for tokens in lengths:
        for entry in models.competitors(["fp32"], device, chosen):
            yield Task("prefill", tokens, entry, device, model)
    for entry in models.competitors(precisions, device, chosen):
        yield Task("decode", 32, entry, device, model)
    for tokens in training_lengths:
        for entry in models.competitors(["fp32"], device, chosen):
            yield Task("training step", tokens, entry, device, training_model)


def run(task: Task, places: Mapping[str, str]) -> Measured:
    """The record of a task, and how long its process took. `places` tells the module or the file of a user's own
    backend by its name."""
    found: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        found["bytes"] = _in_a_process(task, places)
    except Exception as error:  # anybody's kernel may fail in any way
        found["problem"] = explained(error)
    record = Record(
        group="memory",
        name=task.name,
        backend=task.entry.backend,
        precision=task.entry.precision,
        device=task.device,
        sizes=task.sizes,
        model=task.model,
        **found,
    )
    return Measured(record, (time.perf_counter() - start,))


def _in_a_process(task: Task, places: Mapping[str, str]) -> int:
    request = {
        "name": task.name,
        "tokens": task.tokens,
        "backend": places.get(task.entry.backend, task.entry.backend),
        "precision": task.entry.precision,
        "device": task.device,
        "model": task.model,
        "path": None if task.model is None else str(models.path_of(task.model).resolve()),
        "threads": thread_count(),
    }
    command = [sys.executable, "-m", "llmfast.benchmarking.peak_memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[-1])
    return int(done.stdout.split()[-1])


# ---- In the process ----


def measure(request: dict[str, Any]) -> int:
    """Bytes at the peak of what is asked for, above those before it."""
    torch.set_num_threads(request["threads"])
    entry = Entry(load_backend(request["backend"]), request["precision"])
    run: Callable[..., None] = _op
    model = request["name"]
    small: Any = model
    if request["name"] == "training step":
        run, model, small = _train, request["model"], EMBEDDED[0]
    elif request["model"] is not None:
        run = functools.partial(_read, decode=request["name"] == "decode")
        model, small = request["path"], EMBEDDED[0]
    run(small, WARM_UP, entry, request["device"])
    models.llm_of.cache_clear()
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's allocator would use again what it has kept
    return peak_of(lambda: run(model, request["tokens"], entry, request["device"]), request["device"])


def peak_of(call: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    before = reset_peak()
    call()
    return peak() - before


def reset_peak() -> int:
    """Sets the process's high-water mark to what it holds now, and returns it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that this process has had in memory.

    `ru_maxrss` would begin with the size of the process that started this one, which Linux carries over.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _op(what: str, tokens: int, entry: Entry, device: str) -> None:
    name, _, direction = what.partition(" ")
    case = op_cases.OPS[name](tokens).case
    functions, choice = op_cases.functions_of(entry.backend, case.op)
    tensors = case.make(op_cases.DTYPES[entry.precision], device)
    reset_peak()  # the inputs were made in float64
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None and t.is_floating_point()]
    with choice():
        results = case.call(functions, tensors)
        if direction == "backward":
            torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])


def _read(path: str, tokens: int, entry: Entry, device: str, decode: bool) -> None:
    llm = models.llm_of(path, entry, device)
    ids = prompt_ids(tokens, llm.config.vocab_size)
    with llm.using_backend():
        decoder = llm.decoder(1, capacity=tokens + 16 * decode)
        decoder.prefill([ids])
        for token in ids[: 16 * decode]:
            decoder.step(torch.tensor([token], device=device))


def _train(model: str, tokens: int, entry: Entry, device: str) -> None:
    config = models.config_of(model).without_dropout()
    text = torch.zeros(training_cases.BATCH, tokens + 1, dtype=torch.int64, device=device)
    step = training_cases.Step(config, None, text, entry, device)
    for _ in range(2):  # the optimizer's state is there from the second step on
        step(None)


if __name__ == "__main__":
    print(measure(json.loads(sys.argv[1])))
