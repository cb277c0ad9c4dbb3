"""What people watch: a live line on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to write over


class Display:
    """Progress on stderr: the step, the loss, the speed, its share of the machine's peak, and the time left."""

    def __init__(self, steps: int, flops_per_token: float, peak: float, quiet: bool = False):
        self.steps, self.flops_per_token, self.peak = steps, flops_per_token, peak
        self.quiet = quiet
        self.tokens_per_second = 0.0
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._on_terminal = self._console.is_terminal and not quiet
        self._last_line = float("-inf")
        self._seconds_per_step: float | None = None

    def __enter__(self) -> Display:
        if self._on_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_terminal:
            self._live.stop()

    def update(self, step: int, loss: float, steps: int, tokens: int, seconds: float) -> None:
        """After `step`: the last loss, and how many steps and tokens took how long."""
        self.tokens_per_second = tokens / seconds
        each = seconds / steps
        before = self._seconds_per_step
        self._seconds_per_step = each if before is None else 0.8 * before + 0.2 * each
        line = (
            f"step {step:,} of {self.steps:,}  loss {loss:.4f}  {self.tokens_per_second:,.0f} tokens/s"
            f"  {self.share_of_peak:.0%} of peak  {duration((self.steps - step) * self._seconds_per_step)} left"
        )
        if self._on_terminal:
            self._live.update(Text(line), refresh=True)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step == self.steps:
            self._last_line = time.monotonic()
            self.say(line)

    @property
    def share_of_peak(self) -> float:
        return self.tokens_per_second * self.flops_per_token / self.peak if self.peak else 0.0

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)


def duration(seconds: float) -> str:
    """ "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
