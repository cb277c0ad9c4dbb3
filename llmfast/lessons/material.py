"""What lessons work on: a text that is there without a network, and how much of it there is time for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmfast.weights.fetching import home

if TYPE_CHECKING:
    from torch import Tensor

    from llmfast import LLM

T = TypeVar("T")
SHAKESPEARE = "tinyshakespeare.txt"
WHERE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def effort(*, quick: T, full: T) -> T:
    """`full`, or `quick` where LLMFAST_LESSONS=quick: tests run a lesson in seconds, a reader in minutes."""
    return quick if os.environ.get("LLMFAST_LESSONS") == "quick" else full


def shortest(call: Callable[[], object], least: float = 0.2) -> float:
    """Seconds that a call takes: the shortest of many within `least` seconds, three at least, after one to warm up.

    The shortest, because what a shared machine adds is never negative; the benchmarks of llmfast take medians of turns.
    """
    call()
    found: list[float] = []
    end = time.perf_counter() + effort(quick=least / 4, full=least)
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


@dataclass(frozen=True)
class Machine:
    """What this machine can do at most in float32: GB/s, and GFLOP/s on `threads` threads and on one."""

    threads: int
    bandwidth: float
    peak: float
    peak_of_one: float


def machine(threads: int | None = None) -> Machine:
    """Measured now: by loops in C++ that do nothing else, or, without the extension, by what PyTorch reaches."""
    import torch

    from llmfast.benchmarking import limits
    from llmfast.threads import thread_count

    threads = threads or thread_count()
    if limits.why_not() is None:
        found = limits.measure(threads, effort(quick=64, full=512), rounds=effort(quick=3, full=7))
        read, copy, fp32 = (found[name] for name in ("read", "copy", "fp32"))
        best = max(read[str(threads)]["best"], copy[str(threads)]["best"])
        return Machine(threads, best, fp32[str(threads)]["best"], fp32["1"]["best"])
    array, square = torch.ones(effort(quick=16, full=64) << 20), torch.randn(1024, 1024)
    peak = 2 * 1024**3 / shortest(lambda: square @ square) / 1e9
    return Machine(threads, array.nbytes / shortest(array.sum) / 1e9, peak, peak / threads)


@dataclass(frozen=True)
class Corpus:
    """A text: the first nine tenths of its characters to learn from, the last tenth to be judged on."""

    name: str
    text: str

    @property
    def is_shakespeare(self) -> bool:
        return self.name == SHAKESPEARE

    @property
    def train(self) -> str:
        return self.text[: int(0.9 * len(self.text))]

    @property
    def validation(self) -> str:
        return self.text[int(0.9 * len(self.text)) :]


def corpus() -> Corpus:
    """Tiny Shakespeare (1.1 MB) from the folder LLMFAST_DATA or llmfast's own; else 0.6 MB of Python's manual.

    The manual is part of every Python, so that a lesson runs offline; figures are asserted on Shakespeare only.
    """
    folders = [Path(chosen)] if (chosen := os.environ.get("LLMFAST_DATA")) else []
    for folder in (*folders, home()):
        if (file := folder / SHAKESPEARE).is_file():
            return Corpus(SHAKESPEARE, file.read_text(encoding="utf-8"))
    from pydoc_data.topics import topics

    print(f"{SHAKESPEARE} is not here: this is Python's manual instead, and figures are others. To have it:")
    print(f"    curl --create-dirs -o {home() / SHAKESPEARE} {WHERE}")
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return Corpus("Python's manual", "".join(c for c in text if c == "\n" or " " <= c <= "~"))


def journey() -> tuple[list[str], Tensor]:
    """The words of the well-known example of attention (Raschka, 2024), and their vectors, (6, 3)."""
    import torch

    vectors = "0.43 0.15 0.89 0.55 0.87 0.66 0.57 0.85 0.64 0.22 0.58 0.33 0.77 0.25 0.10 0.05 0.80 0.55"
    return ["Your", "journey", "starts", "with", "one", "step"], torch.tensor([float(x) for x in vectors.split()]).view(
        6, 3
    )


def random_llm(precision: str = "fp32", **shape: int) -> LLM:
    """A GPT-2 of random weights in a precision: a smaller model's width is 768, of 4 blocks and 8,192 tokens."""
    import tempfile

    import torch

    import llmfast

    usual = {"vocab_size": 8192, "n_positions": 1024, "n_embd": 768, "n_layer": 4, "n_head": 12}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        llmfast.GPT(llmfast.GPTConfig(**usual | shape)).save_pretrained(folder)
        return llmfast.load(folder, precision=precision)


def step_seconds(llm: LLM, batch: int = 1, context: int = 32, least: float = 0.3) -> float:
    """How long a decoder's step takes: one token more for each of `batch` sequences of `context` tokens."""
    import torch

    room = min(llm.config.context - context, 200)
    with llm.using_backend():
        decoder = llm.decoder(batch, context + room)
        prompts, tokens = [[i % 97 for i in range(context)]] * batch, torch.zeros(batch, dtype=torch.int64)
        decoder.prefill(prompts)
        left = room

        def step() -> None:
            nonlocal left
            if left == 0:
                decoder.prefill(prompts)
                left = room
            left -= 1
            decoder.step(tokens)

        return shortest(step, least)
