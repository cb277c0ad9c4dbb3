"""What a run would do, before it does it: examples as the model sees them, and what memory and time it takes."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast.finetuning.configuration import FinetuningConfig
from llmfast.finetuning.directory import Record, lasting_name
from llmfast.finetuning.examples import Example
from llmfast.finetuning.run import Finetuning
from llmfast.finetuning.task import Task, resolved
from llmfast.inference.execution import chosen_backend
from llmfast.tokenizers import Tokenizer
from llmfast.training.interruption import Interruption
from llmfast.training.memory import MemoryEstimate
from llmfast.training.processes import processes
from llmfast.training.run import backend_of

SHOWN = 3
WARM_UP, TIMED = 1, 2  # steps


@dataclass(frozen=True)
class Preview:
    """`examples` are pieces of text, each with whether it counts in the loss; `padding` the share of what is computed
    that pads the rows of a batch."""

    config: FinetuningConfig  # with a figure wherever the method or the data decides it
    examples: list[list[tuple[str, bool]]]
    labels: list[str]  # the class of each, of a classifier
    lines: list[str]  # what is trained, on how much
    padding: float
    memory: MemoryEstimate
    seconds: float  # of all steps, by some that were taken


def preview(
    model: str | Path, file: str | Path, config: FinetuningConfig, changes: Mapping[str, Any] | None = None
) -> Preview:
    """Reads the file and the model, and takes a few steps that nothing remains of. Errors as in `run.finetune`."""
    record = Record(config.replace(changes or {}), lasting_name(model), str(Path(file).resolve()), "")
    with processes("none", record.config.run.device) as group:
        task = Task.of(record)
        record = Record(resolved(record.config, task.examples, group), record.model, record.file, "")
        with tempfile.TemporaryDirectory() as nowhere, chosen_backend(backend_of(record.config.run.backend)):
            run = Finetuning(record, task, Path(nowhere), group, Interruption(), "", quiet=True)
            seconds = _seconds(run)
    several = task.examples.train[:SHOWN]
    last = [int(example.targets[-1]) for example in several]
    return Preview(
        config=record.config,
        examples=[pieces(example, task.tokenizer, bool(task.examples.labels)) for example in several],
        labels=[task.examples.labels[number] for number in last] if task.examples.labels else [],
        lines=[*task.examples.notes, *run.description()],
        padding=run.loader.padding_share(),
        memory=run.expected_memory(),
        seconds=seconds,
    )


def _seconds(run: Finetuning) -> float:
    """Of all steps, from the tokens of a few and those of an epoch."""
    trainer = run.trainer
    for _ in range(WARM_UP):
        trainer.step()
    begun, tokens = time.perf_counter(), trainer.tokens_done
    for _ in range(TIMED):
        trainer.step()
    each = (time.perf_counter() - begun) / max(1, trainer.tokens_done - tokens)
    return each * run.loader.tokens_per_epoch() * run.config.run.steps / run.loader.steps_per_epoch


def pieces(example: Example, tokenizer: Tokenizer, labelled: bool = False) -> list[tuple[str, bool]]:
    """An example's text, cut where it begins or ceases to count."""
    if labelled:
        return [(tokenizer.decode(example.ids.tolist()), False)]
    runs = itertools.groupby(zip(*example.sequence(), strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in some]), counted) for counted, some in runs]
