"""Training from text to a model: the data, a new model, and a run in its directory."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmfast.files import write_atomic
from llmfast.inference.execution import chosen_backend
from llmfast.inference.llm import LLM
from llmfast.models import FLOATS
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.training import directory, memory
from llmfast.training.configuration import TrainingConfig
from llmfast.training.dataset import TokenDataset
from llmfast.training.interruption import Interruption
from llmfast.training.loop import Loop, Outcome
from llmfast.training.pretraining import model_config, new_trainer, scored_once
from llmfast.training.processes import Processes, processes
from llmfast.training.report import Report
from llmfast.training.trainer import best_precision
from llmfast.weights.quantizing import TRAINING
from llmfast.weights.saving import save

SAMPLE_TOKENS = 120


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
        with chosen_backend(backend_of(config.run.backend)), Interruption() as interruption:
            run = Run(record, out, group, interruption, command, quiet)
            if group.first:
                record.write(out)
            if resume:
                run.restore(before)
            return run.finish()


class Run(Loop):
    """One start of a run."""

    config: TrainingConfig

    def __init__(
        self,
        record: directory.RunRecord,
        out: Path,
        group: Processes,
        interruption: Interruption,
        command: str,
        quiet: bool,
    ):
        self.record, config = record, record.config
        self.data = TokenDataset.open(record.data, "train")
        manifest = self.data.manifest
        assert manifest is not None
        split = manifest.splits.get("validation")
        validating = split is not None and split.tokens > 1
        self.validation = TokenDataset.open(record.data, "validation") if validating else None
        self.validation_bytes = split.bytes if split is not None else 0
        self.tokenizer = self._tokenizer()
        peak_memory = memory.Peak(group.device)
        trainer = new_trainer(config, self.data, manifest.vocab_size, manifest.end_of_text, group, record.data)
        super().__init__(config, trainer, Report(trainer, out, peak_memory, quiet), out, interruption, command)

    def begin(self) -> None:
        config, data = self.config, self.data
        shape = self.trainer.model.config
        tokens = config.run.steps * config.data.batch_size * shape.context
        size = (
            f"{shape.num_parameters:,} parameters, {data.num_tokens:,} training tokens; {config.run.steps:,} steps of "
            f"{config.data.batch_size} × {shape.context} tokens: {tokens / data.num_tokens:.1f} epochs"
        )
        expected = memory.estimate(
            shape,
            config.data.batch_size // config.data.accumulation // self.group.world_size,
            shape.context,
            config.optimization.optimizer,
            FLOATS[config.run.precision],
            self.group.device,
            config.run.activation_checkpointing,
            config.model.dropout > 0,
            shards=self.group.world_size if self.group.sharded else 1,
        )
        self.report.begin([size], expected)

    @property
    def evaluating(self) -> bool:
        return self.validation is not None

    def figures(self) -> dict[str, float]:
        assert self.validation is not None
        result = self.trainer.evaluate(scored_once(self.trainer, self.validation))
        figures = {"loss": result.loss, "perplexity": math.exp(min(700, result.loss))}
        if self.validation_bytes and not self.validation.masked:
            figures["bits_per_byte"] = result.nats / math.log(2) / self.validation_bytes
        return figures

    def export(self) -> None:
        trainer = self.trainer
        state = trainer.full_weights()
        if not self.group.first:
            return
        figures = {f"validation_{name}": value for name, value in (self.best or {}).items() if name != "step"}
        arguments = {name: value for s in self.config.to_document().values() for name, value in s.items()}
        record = {"step": trainer.steps_done, "data": ", ".join(Path(f).name for f in self.record.files)} | figures
        with self.writing("the model"):
            dtype = FLOATS[self.config.run.saved_precision]
            rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
            save(self.out, trainer.model.config, rounded, tokenizer_from=self.record.data)
            content = json.dumps(record | {"arguments": arguments}, indent=2)
            write_atomic(self.out / TRAINING, f"{content}\n".encode())

    def sample(self) -> None:
        if self.tokenizer is None or not self.group.first or self.group.sharded:
            return
        prompt = self.config.run.sample_prompt
        tokens = min(SAMPLE_TOKENS, self.trainer.model.config.context)
        llm = LLM(self.trainer.model, self.tokenizer)
        text = llm.generate(prompt, max_new_tokens=tokens, seed=0, truncate=True)
        self.trainer.model.train()
        self.report.say(f"step {self.trainer.steps_done:,}: sample\n    " + text.strip("\n").replace("\n", "\n    "))

    def _tokenizer(self) -> Tokenizer | None:
        """The data's tokenizer, where samples are wanted; `ValueError` where it can't encode their prompt."""
        settings = self.record.config.run
        if not settings.sample_every:
            return None
        tokenizer = load_tokenizer(self.record.data)
        if tokenizer is not None and not tokenizer.encode(settings.sample_prompt):
            raise ValueError("sample_prompt is empty: give a text to continue")
        return tokenizer


def backend_of(text: str) -> str | dict[str, str]:
    """A name, or OP=NAME,OP=NAME."""
    return dict(item.split("=", 1) for item in text.split(",")) if "=" in text else text
