"""What a fine-tuning run is about, before its model is read: the model's files and tokenizer, the examples, and every
setting with a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmfast.chat.template import ChatTemplate
from llmfast.files import write_atomic
from llmfast.finetuning import preparing
from llmfast.finetuning.configuration import (
    BESIDE,
    CLASSIFIER_LEARNING_RATE,
    LEARNING_RATES,
    PREFERENCE_LEARNING_RATE,
    FinetuningConfig,
)
from llmfast.finetuning.conversations import PLAIN_TEMPLATE
from llmfast.finetuning.directory import Record
from llmfast.finetuning.preparing import Examples
from llmfast.inference.llm import start_token_of
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.tokenizers.protocol import TEMPLATE
from llmfast.training.processes import Processes
from llmfast.training.trainer import best_precision
from llmfast.weights.checkpoint import stream
from llmfast.weights.locate import locate_model
from llmfast.weights.saving import copy_tokenizer
from llmfast.weights.stream import Stream


@dataclass(frozen=True)
class Task:
    """What is known of a run before its model is read: the model's files and tokenizer, and the examples."""

    source: Stream
    tokenizer: Tokenizer
    examples: Examples
    own_template: bool  # whether the chat template is the model's

    @classmethod
    def of(cls, record: Record) -> Task:
        source = stream(locate_model(record.model))
        if source.bottlenecks is not None:
            raise ValueError(f"{record.model} has bottleneck adapters: tune the model that they are for")
        tokenizer = load_tokenizer(source.path)
        if tokenizer is None:
            raise ValueError(f"{record.model} has no tokenizer, without which no text can be learned")
        own = tokenizer.chat_template is not None
        if not own and tokenizer.end_of_text is not None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        template = ChatTemplate(tokenizer.chat_template, tokenizer) if tokenizer.chat_template is not None else None
        config, start = record.config, start_token_of(source.config, tokenizer)
        examples = preparing.prepare(
            record.file, config.data, config.run.seed, source.config.context, tokenizer, template, start
        )
        if config.data.also:
            if examples.labels:
                raise ValueError("also measures how well a text is predicted, which a classifier is not made for")
            longest = min(config.data.max_tokens, source.config.context)
            also = preparing.windows_of(config.data.also, config.data.encoding, longest, tokenizer, start)
            examples = replace(examples, also=also)
        return cls(source, tokenizer, examples, own)

    def write_tokenizer(self, out: Path) -> None:
        """The model's own; with the plain template where chats are written by that."""
        copy_tokenizer(self.source.path, out)
        if self.examples.task in ("chat", "preference") and not self.own_template:
            write_atomic(out / TEMPLATE, PLAIN_TEMPLATE.encode())


def resolved(config: FinetuningConfig, examples: Examples, group: Processes) -> FinetuningConfig:
    """The configuration with a figure wherever it leaves one to the method or the data."""
    changes: dict[str, Any] = {}
    if config.data.task == "auto":
        changes["task"] = examples.task
    if config.method.method == "head" and examples.task != "classify":
        raise ValueError("the method head trains a classifier's head: it needs --task classify")
    if config.method.base != "floats" and config.method.method not in BESIDE:
        raise ValueError(f"the weights that {config.method.method} trains must be floats, not {config.method.base}")
    if config.method.base != "floats":  # weights of fewer bits save little beside what backward would keep
        changes["activation_checkpointing"] = True
    if config.run.compile:
        raise ValueError("fine-tuning is not compiled: leave compile = false")
    if config.run.precision == "auto":
        changes["precision"] = best_precision(group.device)
    if examples.pairs and (config.method.method not in ("lora", "adapter") or config.data.accumulation > 1):
        raise ValueError("preferences are learned by adapters (lora, adapter), a whole batch at once (accumulation 1)")
    if config.optimization.lr == 0:
        changes["lr"] = LEARNING_RATES[config.method.method]
        if examples.pairs:
            changes["lr"] = PREFERENCE_LEARNING_RATE
        elif examples.labels:
            changes["lr"] = min(changes["lr"], CLASSIFIER_LEARNING_RATE)
    epoch = math.ceil(len(examples.train) / config.data.batch_size)
    if config.run.steps == 0:
        changes["steps"] = max(1, round(config.data.epochs * epoch))
    for name in ("evaluate_every", "checkpoint_every"):
        if getattr(config.run, name) == 0:
            changes[name] = epoch
    return config.replace(changes)
