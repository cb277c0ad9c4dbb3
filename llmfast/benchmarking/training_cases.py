"""A step of training by sequence length: forward, loss, backward and AdamW, on random tokens.

A step takes 3 · B · T times the operations of a token's forward pass: once forward, and for each product of it one for
the gradient of its input and one for that of its weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llmfast.backends import use_backend
from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work, WrongResult
from llmfast.benchmarking.models import ARITHMETIC, competitors, config_of, ops_of
from llmfast.benchmarking.op_cases import COMPILED
from llmfast.benchmarking.peers import counting
from llmfast.benchmarking.timing import timed
from llmfast.models import ModelConfig, create

BATCH = 4
ALLOWED = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # of the loss and the gradient's length, relative to PyTorch's


def training(
    model: str,
    lengths: Sequence[int],
    precisions: Sequence[str],
    device: str = "cpu",
    chosen: Sequence[str] = (),
    compiled: bool = False,
) -> Iterator[Comparison]:
    """A step at each length: fp32, or matrix products in bf16 under autocast."""
    config = config_of(model)
    entries = [entry for entry in competitors(precisions, device, chosen) if entry.precision in ALLOWED]
    if compiled:
        entries += [Entry(COMPILED, precision) for precision in precisions if precision in ALLOWED]

    def work(entry: Entry, tokens: int) -> Work:
        operations = counting.training_operations(config, BATCH, tokens)
        return Work(tokens=BATCH * tokens, operations=operations, arithmetic=ARITHMETIC[entry.precision])

    for tokens in [length for length in lengths if length <= config.context] or [config.context]:
        yield Comparison(
            group="training",
            name="training step",
            device=device,
            entries=tuple(entries),
            start=functools.partial(_start, config, tokens, device),
            work=functools.partial(work, tokens=tokens),
            sizes={"batch": BATCH, "tokens": tokens},
            model=model,
        )


def _start(config: ModelConfig, tokens: int, device: str) -> Callable[[Entry], Contestant]:
    config = config.without_dropout()  # or every competitor would have gradients of its own
    torch.manual_seed(0)
    initial = create(config).state_dict()
    text = torch.randint(config.vocab_size, (BATCH, tokens + 1), device=device)
    expected = Step(config, initial, text, Entry("pytorch", "fp32"), device).first()

    def ready(entry: Entry) -> Contestant:
        step = Step(config, initial, text, entry, device)
        found = step.first()
        off = max(abs(a - b) / (ALLOWED[entry.precision] * abs(b)) for a, b in zip(found, expected, strict=True))
        if not off <= 1:
            raise WrongResult(
                f"wrong, so not timed: loss {found[0]:.5g} and gradient {found[1]:.5g}, where PyTorch in float32 has "
                f"{expected[0]:.5g} and {expected[1]:.5g}"
            )
        return Contestant(timed(step, lambda: None, device), round(off, 4))

    return ready


class Step:
    """A model with `initial` weights (None: random ones) and its optimizer; calling it trains one step."""

    def __init__(self, config: ModelConfig, initial: dict[str, Tensor] | None, text: Tensor, entry: Entry, device: str):
        self.inputs, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.model = create(config)
        if initial is not None:
            self.model.load_state_dict(initial)
        self.model.to(device).train()
        self.loss = torch.compile(self.model.loss) if entry.backend == COMPILED else self.model.loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.backend = ops_of("pytorch" if entry.backend == COMPILED else entry.backend, device)
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[entry.precision]
        self.device = device

    def first(self) -> tuple[float, float]:
        """The loss and the length of its gradient before any training."""
        loss = self.backward()
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        return float(loss), float(torch.stack(norms).norm())

    def backward(self) -> Tensor:
        with use_backend(self.backend):
            with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
                loss = self.loss(self.inputs, self.targets)
            loss.backward()
        return loss.detach()

    def __call__(self, _: None) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()
