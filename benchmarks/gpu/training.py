"""A step of training GPT-2 124M, float32 weights under bfloat16 autocast and fused AdamW: tokens a second and MFU.

The share of the GPU's peak (MFU) counts 6 N + 12 L C T operations a token, as nanoGPT does: N parameters without the
position embedding, L layers of width C at T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import COMPILED, Bench
from benchmarks.gpu.decoding import TINY
from benchmarks.gpu.plain import PlainGPT
from llmfast import GPT, GPTConfig, use_backend
from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work, WrongResult
from llmfast.benchmarking.timing import Effort

# Dense bfloat16 peaks that the makers state, in 10^12 operations a second.
PEAKS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "RTX 4090": 165, "MI300X": 1307}
EFFORT = Effort(seconds=3.0, rounds=(5, 30), turn=0.0)
EAGER, BOTH = "torch eager", "triton and torch.compile"
COMPILING = 40  # seconds that torch.compile may take for a model

Loss = Callable[[Tensor, Tensor], Tensor]


def run(bench: Bench) -> None:
    config = without_dropout(bench.pick(GPTConfig.preset("gpt2"), GPTConfig.preset("gpt2"), TINY))
    T = bench.pick(1024, 1024, 4)
    roomy = bench.on_gpu and torch.cuda.get_device_properties(0).total_memory > 60e9
    batch = bench.pick(32 if roomy else 8, 32 if roomy else 8, 1)
    text = torch.randint(config.vocab_size, (batch, T + 1), device=bench.device)
    operations = operations_a_token(config, T) * batch * T
    makers = losses(bench, config)
    peak = peak_of(torch.cuda.get_device_name()) if bench.on_gpu else None

    def ready(entry: Entry) -> Contestant:
        model, loss = makers[entry.backend]()
        step = Step(bench, model, loss, text)
        first = float(step())
        if not abs(first - math.log(config.vocab_size)) < 1:
            raise WrongResult(f"the loss of random weights is {first:.3g}, not about {math.log(config.vocab_size):.3g}")
        turn = bench.turn(step)
        step()
        if peak is None:
            return Contestant(turn)
        seconds = min(turn() for _ in range(5))
        return Contestant(turn, note=f"{operations / seconds / peak / 1e12:.1%} of the GPU's {peak} TFLOP/s (MFU)")

    def comparison(*backends: str) -> Comparison:
        return Comparison(
            group="training",
            name="training step",
            device=bench.device,
            entries=tuple(Entry(backend, bench.precision) for backend in backends),
            start=lambda: ready,
            work=lambda entry: Work(tokens=batch * T, operations=operations, arithmetic=bench.precision),
            sizes={"batch": batch, "tokens": T},
            model="gpt2" if bench.on_gpu else None,
            baselines=(COMPILED, EAGER, "triton"),
        )

    # What compiles comes last: nothing can stop it in time, and what was measured before is kept.
    effort, needs = (EFFORT, COMPILING) if bench.on_gpu else (None, 0)
    bench.compare(comparison(EAGER, "triton"), effort)
    bench.compare(comparison("triton", COMPILED), effort, needs)
    if bench.on_gpu:
        bench.compare(comparison("triton", BOTH), effort, needs)


def losses(bench: Bench, config: GPTConfig) -> dict[str, Callable[[], tuple[nn.Module, Loss]]]:
    """Who competes: what makes a model, and its loss of (ids, targets)."""

    def plain(compiled: bool) -> tuple[nn.Module, Loss]:
        with torch.device(bench.device):
            model = PlainGPT(config)
        return model, bench.compiled(model.loss) if compiled else model.loss

    def ours(compiled: bool) -> tuple[nn.Module, Loss]:
        with torch.device(bench.device):
            model = GPT(config)
        function = bench.compiled(model.loss) if compiled else model.loss

        def loss(ids: Tensor, targets: Tensor) -> Tensor:
            with use_backend("triton"):
                return function(ids, targets)

        return model, loss

    return {
        EAGER: lambda: plain(False),
        COMPILED: lambda: plain(True),
        "triton": lambda: ours(False),
        BOTH: lambda: ours(True),
    }


class Step:
    """Forward, backward and AdamW; calling it gives the loss."""

    def __init__(self, bench: Bench, model: nn.Module, loss: Loss, text: Tensor):
        self.loss, self.autocast = loss, bench.on_gpu
        self.ids, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.on_gpu)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.ids, self.targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def without_dropout(config: GPTConfig) -> GPTConfig:
    return dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def operations_a_token(config: GPTConfig, T: int) -> float:
    parameters = config.num_parameters - config.n_positions * config.n_embd
    return 6 * parameters + 12 * config.n_layer * config.n_embd * T


def peak_of(name: str) -> int | None:
    return next((peak for gpu, peak in PEAKS.items() if gpu in name), None)
