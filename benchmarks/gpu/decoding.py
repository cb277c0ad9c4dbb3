"""Tokens a second of GPT-2 124M after a prompt of 32 tokens, greedy: step by step, and as a CUDA graph.

The weights are random, which costs the same as trained ones. A step's time is that of a text less that of a text of
one token, over the steps between. What it has to read are the weights and each sequence's keys and values, whose number
is that of half the text: the graph's texts are longer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from llmfast import GPT, LLM, GPTConfig
from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work
from llmfast.benchmarking.timing import Effort, Turn
from llmfast.quantization.formats import quantize
from llmfast.quantization.modules import fill
from llmfast.quantization.plan import plan

BASELINE = "pytorch eager"
EFFORT = Effort(seconds=1.0, rounds=(2, 5), turn=0.0)


@dataclass(frozen=True)
class Text:
    """Tokens of the prompt, and those that follow it: few step by step, where a step takes Python a long time."""

    prompt: int
    eager: int
    graph: int

    def tokens(self, entry: Entry) -> int:
        return self.graph if entry.backend.endswith("graph") else self.eager


def run(bench: Bench) -> None:
    """What the target is about comes first."""
    config = bench.pick(GPTConfig.preset("gpt2"), GPTConfig.preset("gpt2"), TINY)
    text = bench.pick(Text(32, 32, 192), Text(32, 8, 192), Text(3, 2, 2))
    torch.manual_seed(0)
    with torch.device(bench.device):
        trained = GPT(config).eval()
    for precision, batch in bench.pick(FULL, QUICK, (("fp32", 1), ("int4", 1))):
        model = in_precision(trained, precision, bench.dtype)
        ways = ["triton"] if precision in ("int8", "int4") else ["pytorch", "triton"]
        decode(bench, model, precision, ways, batch, text)
        del model


QUICK = (("bf16", 1), ("int8", 1), ("int4", 1), ("bf16", 64), ("fp32", 1))
FULL = (*QUICK, *((p, b) for p in ("bf16", "int8", "int4", "fp32") for b in (1, 8, 64) if (p, b) not in QUICK))
TINY = GPTConfig(vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=2)


def in_precision(trained: GPT, precision: str, dtype: torch.dtype) -> GPT:
    with torch.device("meta"):
        model = GPT(trained.config)
    if precision in ("int8", "int4"):
        formats = plan(trained.config, precision)
        state = {name: t for name, t in trained.state_dict().items() if name != "lm_head.weight"}
        weights = ((name, quantize(t, formats[name]) if name in formats else t) for name, t in state.items())
        return fill(model, precision, weights, dtype, trained.device)
    to = torch.float32 if precision == "fp32" else torch.bfloat16
    model.load_state_dict({name: t.to(to) for name, t in trained.state_dict().items()}, assign=True)
    model.tie_head()
    return model.eval()


def decode(bench: Bench, model: GPT, precision: str, ways: list[str], batch: int, text: Text) -> None:
    config = model.config
    ids = torch.randint(config.vocab_size, (batch, text.prompt), device=bench.device)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "wpe" not in name)
    a_token = 2 * config.n_layer * config.n_embd * model.dtype.itemsize  # in the cache

    def work(entry: Entry) -> Work:
        return Work(tokens=batch, read=weights + batch * a_token * (text.prompt + text.tokens(entry) / 2))

    entries = tuple(Entry(f"{backend} {how}", precision) for backend in ways for how in ("eager", "graph"))
    comparison = Comparison(
        group="decode",
        name="decode",
        device=bench.device,
        entries=entries,
        start=lambda: Ready(model, ids, text),
        work=work,
        sizes={"batch": batch, "prompt": text.prompt},
        model="gpt2" if bench.on_gpu else None,
        baselines=(BASELINE, "triton eager"),
    )
    bench.compare(comparison, EFFORT if bench.on_gpu else None)


class Ready:
    """Makes competitors ready, and says of a graph how much of its text is the eager decoder's."""

    def __init__(self, model: GPT, ids: Tensor, text: Text):
        self.model, self.ids, self.text = model, ids, text
        self.eager: dict[str, Tensor] = {}  # by backend

    def __call__(self, entry: Entry) -> Contestant:
        backend, how = entry.backend.split()
        llm, count, prompt = LLM(self.model, None, backend), self.text.tokens(entry), self.ids.shape[1]
        with graphs(how == "graph"):
            reason = llm.why_not_cuda_graph()
            if how == "graph" and reason is not None:
                raise ValueError(f"no CUDA graph: {reason}")
            new = llm.generate(self.ids, max_new_tokens=count, temperature=0)[:, prompt:]
        note = None
        if how == "eager":
            self.eager[backend] = new
        elif backend in self.eager:
            expected = self.eager[backend]
            same = float((new[:, : expected.shape[1]] == expected[:, : new.shape[1]]).float().mean())
            note = f"{same:.0%} of the tokens are the eager decoder's"
        return Contestant(a_step(llm, self.ids, count, how == "graph"), note=note)


def a_step(llm: LLM, ids: Tensor, steps: int, graph: bool) -> Turn:
    """Seconds of a step: a text of `steps` tokens less one of a single token."""

    def turn() -> float:
        with graphs(graph):
            return (timed(llm, ids, steps) - timed(llm, ids, 1)) / (steps - 1)

    return turn


def timed(llm: LLM, ids: Tensor, count: int) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if ids.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    llm.generate(ids, max_new_tokens=count, temperature=0)
    wait()
    return time.perf_counter() - start


@contextmanager
def graphs(wanted: bool) -> Iterator[None]:
    before = os.environ.get("LLMFAST_CUDA_GRAPH")
    os.environ["LLMFAST_CUDA_GRAPH"] = "1" if wanted else "0"
    try:
        yield
    finally:
        del os.environ["LLMFAST_CUDA_GRAPH"]
        if before is not None:
            os.environ["LLMFAST_CUDA_GRAPH"] = before
