"""A run from beginning to end: steps, and between them measurements, evaluations, samples and checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.files import write_atomic
from llmfast.inference.execution import chosen_backend
from llmfast.inference.llm import LLM
from llmfast.models import FLOATS
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.training import checkpoints, directory, memory
from llmfast.training.configuration import TrainingConfig
from llmfast.training.dataset import TokenDataset
from llmfast.training.interruption import Interruption
from llmfast.training.processes import Processes, processes
from llmfast.training.report import Report
from llmfast.training.trainer import Diverged, Trainer, best_precision, model_config
from llmfast.weights.quantizing import TRAINING
from llmfast.weights.saving import save

SAMPLE_TOKENS = 120
SMALLEST_SCALE = 1e-3  # below it fp16's gradients overflow for another reason than their scale
FAR_OFF = 1.5, 1.0  # a loss above 1.5 times the first one, and one nat, is not coming back


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


def train(
    files: Sequence[str | Path],
    out: str | Path,
    config: TrainingConfig | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    resume: bool = False,
    parallel: str = "none",
    quiet: bool = False,
    preparing: Callable[[], contextlib.AbstractContextManager[directory.Progress]] = directory.no_progress,
    resume_command: str | None = None,
) -> Outcome:
    """Trains a model on `files` (text, or one directory of prepared data) and writes it into the directory `out`.

    `config` defaults to `TrainingConfig()`, or to what the run had when it is resumed; `changes` are single settings
    on top of it. Progress goes to stderr unless `quiet`; `preparing` gives the display of the data's preparation.
    `parallel` is "none", or for the processes of `torchrun` "ddp" (each has all weights) or "fsdp" (each has a part).
    `ValueError`, `OSError` or `Diverged` in one line.
    """
    out, changes = Path(out), changes or {}
    command = resume_command or f"llmfast train --out {out} --resume"
    if resume:
        before = directory.RunRecord.read(out).config
        record = directory.resumed(out, config, changes, files)
        config = record.config
    else:
        config = (config or TrainingConfig()).replace(changes)
    with processes(parallel, config.run.device) as group, contextlib.ExitStack() as stack:
        if not resume:
            if config.run.precision == "auto":
                config = config.replace({"precision": best_precision(group.device)})
            shards = group.world_size if group.sharded else 1
            asked = model_config(config, config.data.vocab_size, None)  # before its data takes minutes
            dtype = FLOATS[config.run.precision]
            memory.check_room(asked, config.optimization.optimizer, dtype, group.device, shards)
        if group.first:
            stack.enter_context(directory.only_process(out))
        if not resume:
            if group.first:
                directory.check_free(out)
                with preparing() as progress:
                    directory.prepare_data(files, out, config, progress)
            group.wait()
            record = directory.new_record(files, out, config)
        with chosen_backend(_backend(config.run.backend)), Interruption() as interruption:
            run = Run(record, out, group, interruption, command, quiet)
            if group.first:
                record.write(out)
            if resume:
                run.restore(before)
            return run.finish()


class Run:
    """One start of a run. Only the first process writes and speaks."""

    def __init__(
        self,
        record: directory.RunRecord,
        out: Path,
        group: Processes,
        interruption: Interruption,
        command: str,
        quiet: bool,
    ):
        self.record, self.config, self.out, self.group = record, record.config, out, group
        self.interruption, self.command = interruption, command
        self.data = TokenDataset.open(record.data, "train")
        manifest = self.data.manifest
        assert manifest is not None
        split = manifest.splits.get("validation")
        validating = split is not None and split.tokens > 1
        self.validation = TokenDataset.open(record.data, "validation") if validating else None
        self.validation_bytes = split.bytes if split is not None else 0
        self.tokenizer = self._tokenizer()
        peak_memory = memory.Peak(group.device)
        self.trainer = Trainer(self.config, self.data, manifest.vocab_size, manifest.end_of_text, group)
        self.report = Report(self.trainer, out, peak_memory, quiet)
        self.best: dict[str, float] | None = None
        self.last_loss = math.nan
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._mark = time.perf_counter()

    def restore(self, before: TrainingConfig) -> None:
        """Goes on from the newest checkpoint, or from the start where there is none yet."""
        say = self.report.say
        for name, (old, new) in directory.differences(before, self.config).items():
            say(f"note: {name} is now {new!r}, was {old!r}")
        if self.group.first:
            checkpoints.remove_unfinished(self.out / directory.CHECKPOINTS)
        state = self._load_newest()
        if state is None:
            say(f"{self.out} has no checkpoint yet: starting at the first step")
            return
        self.best = state["best"]
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
        report.begin(self.data)
        stopped: int | None = None
        with report.display:
            self._mark = time.perf_counter()
            while trainer.steps_done < self.config.run.steps and stopped is None:
                try:
                    self._pending.append(trainer.step())
                except Diverged as error:
                    raise Diverged(f"{error}; {self._save_last_good()}") from None
                stopped = self._between_steps()
            with self._writing("the curves"):
                report.draw(at_once=True)
        report.end()
        rate = report.tokens_per_second
        return Outcome(str(self.out), trainer.steps_done, self.last_loss, self.best, report.seconds, rate, stopped)

    def _between_steps(self) -> int | None:
        """Whatever is due after a step; the signal to stop for, if one came."""
        step, settings = self.trainer.steps_done, self.config.run
        last = step == settings.steps
        evaluating = self.validation is not None and _due(step, settings.evaluate_every, last)
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
            self._evaluate()
        if sampling:
            self._sample()
        if saving or stopped:
            self._checkpoint()
            with self._writing("the curves"):
                self.report.draw()
        self._mark = time.perf_counter()
        if stopped and not last:
            self.report.say(f"stopped after step {step:,}, which is saved; go on with: {self.command}")
            return stopped
        return None

    def _log(self) -> None:
        """Looks at the losses that have gathered, all at once, and stops a run that has nothing to gain any more."""
        losses = self.group.add_up(torch.stack([loss for loss, _ in self._pending])).tolist()
        norms = torch.stack([norm for _, norm in self._pending]).tolist()
        self._pending = []
        self.last_loss = losses[-1]
        with self._writing("the measurements"):
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

    def _evaluate(self) -> None:
        assert self.validation is not None
        result = self.trainer.evaluate(self.validation)
        figures = {"loss": result.loss, "perplexity": math.exp(min(700, result.loss))}
        if self.validation_bytes and not self.validation.masked:
            figures["bits_per_byte"] = result.nats / math.log(2) / self.validation_bytes
        better = self.best is None or result.loss < self.best["loss"]
        with self._writing("the measurements"):
            self.report.evaluation(figures, better)
        if better and math.isfinite(result.loss):
            self.best = {"step": self.trainer.steps_done} | figures
            self._export()

    def _export(self) -> None:
        """Makes the weights as they are now the model of the directory."""
        trainer = self.trainer
        state = trainer.full_weights()
        if not self.group.first:
            return
        figures = {f"validation_{name}": value for name, value in (self.best or {}).items() if name != "step"}
        arguments = {name: value for s in self.config.to_document().values() for name, value in s.items()}
        record = {"step": trainer.steps_done, "data": ", ".join(Path(f).name for f in self.record.files)} | figures
        with self._writing("the model"):
            dtype = FLOATS[self.config.run.saved_precision]
            rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
            save(self.out, trainer.model.config, rounded, tokenizer_from=self.record.data)
            content = json.dumps(record | {"arguments": arguments}, indent=2)
            write_atomic(self.out / TRAINING, f"{content}\n".encode())

    def _checkpoint(self) -> None:
        if self.best is None:  # not evaluated yet, or never: the latest is the model
            self._export()
        extra = {
            "version": checkpoints.VERSION,
            "best": self.best,
            "threads": torch.get_num_threads(),
            "world_size": self.group.world_size,
            "config": self.config.to_document(),
        }
        with self._writing(f"step {self.trainer.steps_done:,}"):
            self.trainer.checkpoint(
                self.out / directory.CHECKPOINTS, self.config.run.keep_checkpoints, self.record.data, extra
            )

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
        lr = self.config.optimization.lr / 2
        return f"the last good checkpoint is {found[-1]}; go on from it with: {self.command} --set lr={lr:g}"

    def _sample(self) -> None:
        if self.tokenizer is None or not self.group.first or self.group.sharded:
            return
        prompt = self.config.run.sample_prompt
        tokens = min(SAMPLE_TOKENS, self.trainer.model.config.context)
        llm = LLM(self.trainer.model, self.tokenizer)
        text = llm.generate(prompt, max_new_tokens=tokens, seed=0, truncate=True)
        self.trainer.model.train()
        self.report.say(f"step {self.trainer.steps_done:,}: sample\n    " + text.strip("\n").replace("\n", "\n    "))

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Says which step a failure to write left on the disk."""
        try:
            yield
        except OSError as error:
            found = checkpoints.found(self.out / directory.CHECKPOINTS)
            kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
            raise OSError(
                f"{what} can't be written: {error}; {kept}; make room and go on with: {self.command}"
            ) from None

    def _tokenizer(self) -> Tokenizer | None:
        """The data's tokenizer, where samples are wanted; `ValueError` where it can't encode their prompt."""
        settings = self.config.run
        if not settings.sample_every:
            return None
        tokenizer = load_tokenizer(self.record.data)
        if tokenizer is not None and not tokenizer.encode(settings.sample_prompt):
            raise ValueError("sample_prompt is empty: give a text to continue")
        return tokenizer


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _backend(text: str) -> str | dict[str, str]:
    """A name, or OP=NAME,OP=NAME."""
    return dict(item.split("=", 1) for item in text.split(",")) if "=" in text else text
