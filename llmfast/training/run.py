"""A run from beginning to end: steps, and between them measurements, evaluations, samples and checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast import checkpoint
from llmfast.backends import explain
from llmfast.files import write_atomic
from llmfast.generation import LLM, chosen_backend
from llmfast.model import FLOATS
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.training import checkpoints, directory, memory
from llmfast.training.configuration import TrainingConfig
from llmfast.training.dataset import TokenDataset
from llmfast.training.display import Display, duration
from llmfast.training.hardware import flops_per_token, peak_flops
from llmfast.training.interruption import Interruption
from llmfast.training.metrics import Metrics
from llmfast.training.processes import Processes, processes
from llmfast.training.trainer import Diverged, Trainer, best_precision

SAMPLE_TOKENS = 120
SECONDS_BETWEEN_CURVES = 60.0
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
    out = Path(out)
    command = resume_command or f"llmfast train --out {out} --resume"
    if resume:
        record = directory.resumed(out, config, changes or {}, files)
        before = directory.RunRecord.read(out).config
    else:
        config = (config or TrainingConfig()).replace(changes or {})
    device = (record.config if resume else config).run.device  # type: ignore[union-attr]
    with processes(parallel, device) as group:
        if not resume:
            if group.first:
                directory.check_free(out)
                precision = config.run.precision  # type: ignore[union-attr]
                resolved = best_precision(group.device) if precision == "auto" else precision
                with preparing() as progress:
                    directory.start(files, out, config.replace({"precision": resolved}), progress)  # type: ignore[union-attr]
            group.wait()
            record = directory.RunRecord.read(out)
            before = record.config
        with _backend(record.config), Interruption() as interruption:
            run = Run(record, out, group, interruption, command, quiet)
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
        settings = self.config.run
        self.data = TokenDataset.open(record.data, "train")
        manifest = self.data.manifest
        assert manifest is not None
        split = manifest.splits.get("validation")
        validating = split is not None and split.tokens > 1
        self.validation = TokenDataset.open(record.data, "validation") if validating else None
        self.validation_bytes = split.bytes if split is not None else 0
        self.tokenizer = self._tokenizer(manifest.vocab_size)
        self.memory = memory.Peak(group.device)
        self.trainer = Trainer(self.config, self.data, manifest.vocab_size, manifest.end_of_text, group)
        peak, self.peak_source = peak_flops(group.device, settings.precision)
        flops = flops_per_token(self.trainer.model.config, self.config.model.n_positions)
        self.display = Display(settings.steps, flops, peak * group.world_size, quiet or not group.first)
        self.metrics: Metrics | None = None
        self.best: dict[str, float] | None = None
        self.last_loss = math.nan
        self._expected = 0  # bytes
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._seconds, self._tokens = 0.0, 0
        self._mark, self._drawn = time.perf_counter(), time.monotonic()

    def restore(self, before: TrainingConfig) -> None:
        """Goes on from the newest checkpoint, or from the start where there is none yet."""
        say = self.display.say
        for name, (old, new) in directory.differences(before, self.config).items():
            say(f"note: {name} is now {new!r}, was {old!r}")
        if self.group.first:
            self.record.write(self.out)
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
        """The JSON of the newest checkpoint, which is loaded; damaged ones are put aside. None where there is none."""
        for path in reversed(checkpoints.found(self.out / directory.CHECKPOINTS)):
            try:
                state = checkpoints.read_state(path)
                self.trainer.load(path, state)
                return state
            except (ValueError, FileNotFoundError) as error:
                aside = path.with_name(f"damaged-{path.name}")
                self.display.say(f"note: {error}; it is now {aside.name}, and the one before is taken")
                if self.group.first:
                    path.rename(aside)
        return None

    def finish(self) -> Outcome:
        """Trains up to the last step, or a signal."""
        trainer, settings = self.trainer, self.config.run
        if self.group.first:
            self.metrics = Metrics(self.out, trainer.steps_done, settings.tensorboard)
        self._announce()
        stopped: int | None = None
        with self.display:
            self._mark = time.perf_counter()
            while trainer.steps_done < settings.steps and stopped is None:
                try:
                    self._pending.append(trainer.step())
                except Diverged as error:
                    raise Diverged(f"{error}; {self._save_last_good()}") from None
                stopped = self._between_steps()
            self._draw(at_once=True)
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self.display.say(
            f"{trainer.steps_done:,} steps done; {self._tokens:,} tokens in {duration(self._seconds)}, {rate:,.0f} a "
            f"second"
        )
        return Outcome(str(self.out), trainer.steps_done, self.last_loss, self.best, self._seconds, rate, stopped)

    def _announce(self) -> None:
        """What will be trained on what, and whether there is room for it."""
        trainer, settings, say = self.trainer, self.config.run, self.display.say
        config, data = trainer.model.config, self.config.data
        tokens = settings.steps * data.batch_size * config.n_positions
        say(
            f"{config.num_parameters:,} parameters, {self.data.num_tokens:,} training tokens; {settings.steps:,} steps "
            f"of {data.batch_size} × {config.n_positions} tokens are {tokens / self.data.num_tokens:.1f} epochs"
        )
        head = trainer.model.lm_head.weight
        backend = explain("linear", head, head)
        threads = f", {torch.get_num_threads()} threads" if head.device.type == "cpu" else ""
        say(
            f"{settings.precision} on {self.group.world_size} × {head.device.type}{threads}, {backend.backend} kernels;"
            f" peak {self.display.peak / 1e12:.3g} TFLOP/s ({self.peak_source})"
        )
        sequences = data.batch_size // data.accumulation // self.group.world_size
        dtype, optimizer = FLOATS[settings.precision], self.config.optimization.optimizer
        expected = memory.estimate(
            config,
            sequences,
            config.n_positions,
            optimizer,
            dtype,
            head.device,
            settings.activation_checkpointing,
            shards=self.group.world_size if self.group.sharded else 1,
        )
        say(f"memory: about {expected}")
        free = memory.available(head.device)
        if free is not None and expected.total > free:
            say(
                f"note: only {memory.megabytes(free)} are free: a larger accumulation, activation_checkpointing = true "
                "or a smaller model needs less"
            )
        self._expected = expected.total

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
            self._draw()
        self._mark = time.perf_counter()
        if stopped and not last:
            self.display.say(f"stopped after step {step:,}, which is saved; go on with: {self.command}")
            return stopped
        return None

    def _log(self) -> None:
        """Looks at the losses that have gathered, all at once."""
        losses = self.group.add_up(torch.stack([loss for loss, _ in self._pending])).tolist()
        norms = torch.stack([norm for _, norm in self._pending]).tolist()
        seconds = time.perf_counter() - self._mark
        steps, self._pending = len(losses), []
        tokens = steps * self.config.data.batch_size * self.config.model.n_positions
        self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        end = self.trainer.steps_done
        if self._tokens == tokens and (measured := self.memory.measured()) is not None:  # the first time
            words = memory.megabytes(measured), memory.megabytes(self._expected)
            libraries = " (with what libraries take)" if self.group.device.type == "cpu" else ""
            self.display.say(f"memory: {words[0]} measured{libraries}, {words[1]} estimated")
        rows = [
            {"step": step + 1, "loss": loss, "lr": self.trainer.learning_rate(step), "gradient_norm": norm}
            for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=end - steps)
        ]
        self._write_metrics(rows)
        self.last_loss = losses[-1]
        self.display.update(end, self.last_loss, steps, tokens, seconds)
        self._check(rows)

    def _check(self, rows: list[dict[str, float]]) -> None:
        """Stops a run that has nothing to gain any more."""
        factor, slack = FAR_OFF
        seen = [] if self.metrics is None else self.metrics.rows
        first = next((row["loss"] for row in seen if "loss" in row), math.inf)
        mean = sum(row["loss"] for row in rows) / len(rows)
        bad = not math.isfinite(mean) or mean > factor * first + slack
        if self.group.agree(bad):
            raise Diverged(f"the loss is {mean:.4g} at step {rows[-1]['step']:,}; {self._newest()}")

    def _evaluate(self) -> None:
        assert self.validation is not None
        result = self.trainer.evaluate(self.validation)
        step = self.trainer.steps_done
        found: dict[str, float] = {"step": step, "loss": result.loss, "perplexity": math.exp(min(700, result.loss))}
        if self.validation_bytes and not self.validation.masked:
            found["bits_per_byte"] = result.nats / math.log(2) / self.validation_bytes
        self._write_metrics([{"step": step, **{f"validation_{k}": v for k, v in found.items() if k != "step"}}])
        words = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in found.items() if k != "step")
        better = self.best is None or result.loss < self.best["loss"]
        self.display.say(f"step {step:,}: validation {words}{'' if better else ' (not better)'}")
        if better and math.isfinite(result.loss):
            self.best = found
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
            checkpoint.save(self.out, trainer.model.config, state, tokenizer_from=self.record.data)
            content = json.dumps(record | {"arguments": arguments}, indent=2)
            write_atomic(self.out / checkpoint.TRAINING, f"{content}\n".encode())

    def _checkpoint(self) -> None:
        if self.validation is None:
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
        tokens = min(SAMPLE_TOKENS, self.trainer.model.config.n_positions)
        llm = LLM(self.trainer.model, self.tokenizer)
        text = llm.generate(prompt, max_new_tokens=tokens, seed=0, truncate=True)
        self.trainer.model.train()
        self.display.say(f"step {self.trainer.steps_done:,}: sample\n    " + text.strip("\n").replace("\n", "\n    "))

    def _write_metrics(self, rows: list[dict[str, float]]) -> None:
        if self.metrics is not None:
            with self._writing("the measurements"):
                self.metrics.add(rows)

    def _draw(self, at_once: bool = False) -> None:
        if self.metrics is not None and (at_once or time.monotonic() - self._drawn > SECONDS_BETWEEN_CURVES):
            with self._writing("the curves"):
                self.metrics.draw()
            self._drawn = time.monotonic()

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

    def _tokenizer(self, vocab_size: int) -> Tokenizer | None:
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


def _backend(config: TrainingConfig) -> contextlib.AbstractContextManager[None]:
    """The backends of `run.backend`: a name, or OP=NAME,OP=NAME."""
    text = config.run.backend
    pairs = dict(item.split("=", 1) for item in text.split(",")) if "=" in text else text
    return chosen_backend(pairs)
