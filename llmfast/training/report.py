"""What people are told of a run, and what is written down of it: the only place that turns figures into words."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llmfast.backends import explain
from llmfast.models import FLOATS
from llmfast.training import memory
from llmfast.training.display import Display, duration
from llmfast.training.hardware import flops_per_token, peak_flops
from llmfast.training.metrics import Metrics
from llmfast.training.trainer import Trainer

SECONDS_BETWEEN_CURVES = 60.0


class Report:
    """The display and the measurements of a run in `out`; those of its first process alone. `flops` are those of a
    token, if they are not what training all weights on whole contexts takes."""

    def __init__(self, trainer: Trainer, out: Path, peak_memory: memory.Peak, quiet: bool, flops: float | None = None):
        self.trainer, self.out, self.group = trainer, out, trainer.group
        self.settings = trainer.config.run
        self._peak_memory = peak_memory
        peak, self._peak_source = peak_flops(self.group.device, self.settings.precision)
        if flops is None:
            flops = flops_per_token(trainer.model.config, trainer.model.config.context)
        self.display = Display(self.settings.steps, flops, peak * self.group.world_size, quiet or not self.group.first)
        self.say = self.display.say
        self.metrics: Metrics | None = None
        self.seconds, self.tokens = 0.0, 0
        self._drawn = time.monotonic()
        self._expected = 0  # bytes

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def begin(self, lines: Sequence[str], expected: memory.MemoryEstimate) -> None:
        """What will be trained on what, in words, and whether there is room for it."""
        if self.group.first:
            self.metrics = Metrics(self.out, self.trainer.steps_done, self.settings.tensorboard)
        for line in lines:
            self.say(line)
        device = self.group.device
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        backend = explain("linear", *(torch.empty(1, 1, dtype=self.dtype, device=device) for _ in range(2)))
        self.say(
            f"{self.settings.precision} on {self.group.world_size} × {device.type}{threads}, "
            f"{backend.backend} kernels; peak {self.display.peak / 1e12:.3g} TFLOP/s ({self._peak_source})"
        )
        self._expected = expected.total
        self.say(f"memory: about {expected}")
        free = memory.available(device)
        if free is not None and expected.total > free:
            self.say(
                f"note: only {memory.megabytes(free)} are free: a larger accumulation, activation_checkpointing = true "
                "or a smaller model needs less"
            )

    @property
    def dtype(self) -> torch.dtype:
        return FLOATS[self.settings.precision]

    def steps(self, losses: list[float], norms: list[float], seconds: float) -> None:
        """The losses and the gradients' norms of the latest steps, which took `seconds`."""
        end = self.trainer.steps_done
        tokens = self.trainer.tokens_done - self.tokens
        if self.tokens == 0 and (measured := self._peak_memory.measured()) is not None:
            libraries = " (with what libraries take)" if self.group.device.type == "cpu" else ""
            words = memory.megabytes(measured), memory.megabytes(self._expected)
            self.say(f"memory: {words[0]} measured{libraries}, {words[1]} estimated")
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        if self.metrics is not None:
            self.metrics.add(
                {"step": step + 1, "loss": loss, "lr": self.trainer.learning_rate(step), "gradient_norm": norm}
                for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=end - len(losses))
            )
        self.display.update(end, losses[-1], len(losses), tokens, seconds)

    def evaluation(self, figures: dict[str, float], better: bool) -> None:
        """The figures of an evaluation by name."""
        step = self.trainer.steps_done
        if self.metrics is not None:
            self.metrics.add([{"step": step, **{f"validation_{name}": value for name, value in figures.items()}}])
        words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        self.say(f"step {step:,}: validation {words}{'' if better else ' (not better)'}")

    def first_loss(self) -> float:
        """That of the run's first step; infinity where it is not known."""
        rows = [] if self.metrics is None else self.metrics.rows
        return next((row["loss"] for row in rows if "loss" in row), math.inf)

    def draw(self, at_once: bool = False) -> None:
        """The curves, unless they were drawn a moment ago."""
        if self.metrics is not None and (at_once or time.monotonic() - self._drawn > SECONDS_BETWEEN_CURVES):
            self.metrics.draw()
            self._drawn = time.monotonic()

    def end(self) -> None:
        self.say(
            f"{self.trainer.steps_done:,} steps done; {self.tokens:,} tokens in {duration(self.seconds)}, "
            f"{self.tokens_per_second:,.0f} a second"
        )
