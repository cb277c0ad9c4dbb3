"""A run from beginning to end: steps, and between them measurements, evaluations, samples and checkpoints."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.training import checkpoints, directory
from llmfast.training.interruption import Interruption
from llmfast.training.report import Report
from llmfast.training.settings import Configuration
from llmfast.training.trainer import Diverged, Trainer

SMALLEST_SCALE = 1e-3  # below it fp16's gradients overflow for another reason than their scale
FAR_OFF = 1.5, 2.0  # a loss above 1.5 times the first one, and two nats, is not coming back


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    out: str
    step: int
    loss: float  # of the last batch
    validation: dict[str, float] | None  # of the model in `out`: step, loss, perplexity, bits a byte
    seconds: float  # of training, since it was started or resumed
    tokens_per_second: float
    interrupted: int | None = None  # the signal that stopped it before its last step


class Loop(ABC):
    """One start of a run, whatever it trains. Only the first process writes and speaks.

    A subclass says how well the model does (`figures`), writes it down (`export`), shows it (`sample`), and what is to
    be said before the first step (`begin`).
    """

    def __init__(
        self,
        config: Configuration,
        trainer: Trainer,
        report: Report,
        out: Path,
        interruption: Interruption,
        command: str,
    ):
        self.config, self.settings = config, trainer.config.run
        self.trainer, self.report, self.out, self.group = trainer, report, out, trainer.group
        self.interruption, self.command = interruption, command
        self.best: dict[str, float] | None = None
        self._waited = 0  # evaluations since then
        self.last_loss = math.nan
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._mark = time.perf_counter()

    @abstractmethod
    def begin(self) -> None:
        """Says what will be trained on what."""

    @property
    @abstractmethod
    def evaluating(self) -> bool:
        """Whether there is anything held out to be measured by."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """How well the model does by what is held out, "loss" first; the least loss is the best."""

    @abstractmethod
    def export(self) -> None:
        """Makes the weights as they are now the model of the directory; `best` says how well it does, if known."""

    @abstractmethod
    def sample(self) -> None:
        """Says what the model says."""

    def stepped(self) -> None:  # noqa: B027, most have nothing to do
        """After every step."""

    def state(self) -> dict[str, Any]:
        """What a subclass keeps in a checkpoint, as JSON."""
        return {}

    def put_back(self, state: dict[str, Any]) -> None:  # noqa: B027, most have nothing to put back
        """The reverse of it."""

    def restore(self, before: Configuration) -> None:
        """Goes on from the newest checkpoint, or from the start where there is none yet."""
        say = self.report.say
        for name, (old, new) in before.differences(self.config).items():
            say(f"note: {name} is now {new!r}, was {old!r}")
        if self.group.first:
            checkpoints.remove_unfinished(self.out / directory.CHECKPOINTS)
        state = self._load_newest()
        if state is None:
            say(f"{self.out} has no checkpoint yet: starting at the first step")
            return
        self.best, self._waited = state["best"], state.get("waited", 0)
        self.put_back(state)
        if (threads := torch.get_num_threads()) != state["threads"] and self.group.device.type == "cpu":
            say(f"note: with {threads} threads instead of {state['threads']} the last bits will differ")
        say(f"resuming after step {self.trainer.steps_done:,}")

    def _load_newest(self) -> dict[str, Any] | None:
        """The JSON of the newest checkpoint, which is loaded; damaged ones are put aside. None where there is none.

        `ValueError` where all are damaged: what one of them has already put back is no start.
        """
        found = checkpoints.found(self.out / directory.CHECKPOINTS)
        for path in reversed(found):
            try:
                checkpoints.verify(path, self.group)
                state = checkpoints.read_state(path)
                self.trainer.load(path, state)
                return state
            except (ValueError, FileNotFoundError) as error:
                aside = path.with_name(f"damaged-{path.name}")
                self.report.say(f"note: {error}; it is now {aside.name}")
                if self.group.first:
                    shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
                    path.rename(aside)
        if found:
            raise ValueError(
                f"no checkpoint in {found[0].parent} can be read: the run can only begin again, the same way"
            )
        return None

    def finish(self) -> Outcome:
        """Trains up to the last step, or a signal."""
        trainer, report = self.trainer, self.report
        self.begin()
        stopped: int | None = None
        with report.display:
            self._mark = time.perf_counter()
            while trainer.steps_done < self.settings.steps and stopped is None and not self._waited_enough:
                try:
                    self._pending.append(trainer.step())
                    self.stepped()
                except Diverged as error:
                    raise Diverged(f"{error}; {self._save_last_good()}") from None
                stopped = self._between_steps()
            with self.writing("the curves"):
                report.draw(at_once=True)
        report.end()
        rate = report.tokens_per_second
        return Outcome(str(self.out), trainer.steps_done, self.last_loss, self.best, report.seconds, rate, stopped)

    @property
    def _waited_enough(self) -> bool:
        return 0 < self.settings.patience <= self._waited

    def _between_steps(self) -> int | None:
        """Whatever is due after a step; the signal to stop for, if one came."""
        step, settings = self.trainer.steps_done, self.settings
        last = step == settings.steps
        evaluating = self.evaluating and _due(step, settings.evaluate_every, last)
        sampling = _due(step, settings.sample_every, last and settings.sample_every > 0)
        saving = _due(step, settings.checkpoint_every, last)
        logging = step % settings.log_every == 0 or last
        stopped = self.interruption.signal
        if self.group.world_size > 1:  # all stop after the same step, or the others would wait for ever
            stopped = (stopped or 15) if logging and self.group.agree(stopped is not None) else None
        if not (logging or evaluating or sampling or saving or stopped):
            return None
        self._log()
        if evaluating:
            self.judge(self.figures())
        if sampling:
            self.sample()
        if saving or stopped or self._waited_enough:
            self._checkpoint()
            with self.writing("the curves"):
                self.report.draw()
        self._mark = time.perf_counter()
        if stopped and not last:
            self.report.say(f"stopped after step {step:,}, which is saved; go on with: {self.command}")
            return stopped
        if self._waited_enough and not last:
            self.report.say(f"stopped after step {step:,}: {self._waited} evaluations without a better one (patience)")
        return None

    def _log(self) -> None:
        """Looks at the losses that have gathered, all at once, and stops a run that has nothing to gain any more."""
        losses = self.group.add_up(torch.stack([loss for loss, _ in self._pending])).tolist()
        norms = torch.stack([norm for _, norm in self._pending]).tolist()
        self._pending = []
        self.last_loss = losses[-1]
        with self.writing("the measurements"):
            self.report.steps(losses, norms, time.perf_counter() - self._mark)
        factor, slack = FAR_OFF
        mean = sum(losses) / len(losses)
        bad = not math.isfinite(mean) or mean > factor * self.report.first_loss() + slack
        if not self.trainer.scaler.is_enabled():  # which leaves such gradients out
            bad = bad or not all(map(math.isfinite, norms))
        if self.group.agree(bad):
            words = f"the loss is {mean:.4g}, the gradient's norm {norms[-1]:.4g} at step {self.trainer.steps_done:,}"
            raise Diverged(f"{words}; {self._newest()}")
        if self.trainer.scaler.is_enabled() and self.trainer.scaler.get_scale() < SMALLEST_SCALE:
            raise Diverged(f"fp16 overflows at step {self.trainer.steps_done:,} however it is scaled; {self._newest()}")

    def judge(self, figures: dict[str, float]) -> None:
        """Keeps the weights as they are now where these figures are the best so far."""
        better = self.best is None or figures["loss"] < self.best["loss"]
        with self.writing("the measurements"):
            self.report.evaluation(figures, better)
        if better and math.isfinite(figures["loss"]):
            self.best, self._waited = {"step": self.trainer.steps_done} | figures, 0
            self.export()
        else:
            self._waited += 1

    def _checkpoint(self) -> None:
        if self.best is None:  # not evaluated yet, or never: the latest is the model
            self.export()
        extra = {
            "version": checkpoints.VERSION,
            "best": self.best,
            "waited": self._waited,
            "threads": torch.get_num_threads(),
            "world_size": self.group.world_size,
            "config": self.config.to_document(),
            **self.state(),
        }
        with self.writing(f"step {self.trainer.steps_done:,}"):
            self.trainer.checkpoint(self.out / directory.CHECKPOINTS, self.settings.keep_checkpoints, extra)

    def _save_last_good(self) -> str:
        """After a gradient that was not finite, before it touched the weights."""
        if self._pending:
            with contextlib.suppress(Diverged):
                self._log()
        if self.trainer.steps_done == 0:
            return self._newest()
        self._checkpoint()
        return f"the weights before it are saved. {self._newest()}"

    def _newest(self) -> str:
        """Where to go on from, and how."""
        found = checkpoints.found(self.out / directory.CHECKPOINTS)
        if not found:
            return "there is no checkpoint yet: start again with a smaller lr, a longer warmup, or precision fp32"
        lr = self.trainer.config.optimization.lr / 2
        return f"the last good checkpoint is {found[-1]}; go on from it with: {self.command} --set lr={lr:g}"

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Says which step a failure to write left on the disk."""
        try:
            yield
        except OSError as error:
            found = checkpoints.found(self.out / directory.CHECKPOINTS)
            kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
            raise OSError(
                f"{what} can't be written: {error}; {kept}; make room and go on with: {self.command}"
            ) from None


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
