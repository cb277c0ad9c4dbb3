"""A fine-tuning run: a model and a file in, a directory out.

OUT/
  adapter_model.safetensors, adapter_config.json     the adapter, in peft's files; or, where the model's own weights are
  model.safetensors, config.json                     trained, the whole model: the best by what is held out
  the tokenizer, with its chat template
  classifier.json                                    the labels, of a classifier
  evaluation.json                                    what was measured before and after
  run.json, training.json, checkpoints/, metrics.jsonl, curves.png       as in `training.directory`
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast import ops
from llmfast.chat.template import ChatTemplate
from llmfast.files import file_sha256, write_atomic
from llmfast.finetuning import classifier, preparing
from llmfast.finetuning.configuration import FIXED, LEARNING_RATES, FinetuningConfig
from llmfast.finetuning.confusion import Confusion
from llmfast.finetuning.conversations import PLAIN_TEMPLATE
from llmfast.finetuning.examples import Example, ExampleBatches, ExampleLoader
from llmfast.finetuning.methods import BY_NAME, Method
from llmfast.finetuning.preparing import Examples
from llmfast.inference.execution import chosen_backend
from llmfast.inference.llm import LLM, start_token_of
from llmfast.models import FLOATS, LanguageModel
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.tokenizers.protocol import TEMPLATE
from llmfast.training import directory, memory
from llmfast.training.dataset import IGNORED
from llmfast.training.interruption import Interruption
from llmfast.training.loop import Loop, Outcome
from llmfast.training.processes import Processes, processes
from llmfast.training.report import Report
from llmfast.training.run import backend_of
from llmfast.training.trainer import Trainer, best_precision
from llmfast.training.weights import kinds_of
from llmfast.weights.adapter import CONFIG, WEIGHTS
from llmfast.weights.checkpoint import stream
from llmfast.weights.fetching import KNOWN
from llmfast.weights.loading import module_of, quantized_module
from llmfast.weights.locate import EMBEDDED, locate_model
from llmfast.weights.quantizing import TRAINING
from llmfast.weights.saving import copy_tokenizer
from llmfast.weights.stream import Stream

EVALUATION = "evaluation.json"
VERSION = 1
OURS = (*directory.OURS, CONFIG, WEIGHTS, classifier.CLASSIFIER, EVALUATION)
SAMPLE_TOKENS = 80


@dataclass(frozen=True)
class Record:
    """`run.json`: what a run has to know of itself to be resumed."""

    config: FinetuningConfig
    model: str
    file: str
    sha256: str

    def write(self, out: Path) -> None:
        document = {"version": VERSION, "task": "finetune"} | asdict(self)
        write_atomic(out / directory.RUN, (json.dumps(document, indent=2) + "\n").encode())

    @classmethod
    def read(cls, out: Path) -> Record:
        """`FileNotFoundError` where `out` holds no such run, `ValueError` where its record is damaged."""
        path = out / directory.RUN
        if not path.exists():
            raise FileNotFoundError(f"{out} holds no run to resume: start one without --resume")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("task") != "finetune":
                raise ValueError("it is a run of `llmfast train`")
            if document["version"] != VERSION:
                raise ValueError(f"its version is {document['version']}, and this llmfast reads {VERSION}")
            config = FinetuningConfig.from_document(document["config"])
            return cls(config, *(str(document[name]) for name in ("model", "file", "sha256")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} can't be resumed: {error}") from None

    def resumed(self, out: Path, config: FinetuningConfig | None, changes: Mapping[str, Any]) -> Record:
        """The same run with other settings; `ValueError` where they, or its file, make it another."""
        wanted = (config or self.config).replace(changes)
        for name, (before, now) in self.config.differences(wanted).items():
            if name in FIXED:
                raise ValueError(f"a resumed run can't change {name} from {before!r} to {now!r}: start a new one")
        if not Path(self.file).is_file() or file_sha256(Path(self.file)) != self.sha256:
            raise ValueError(f"{self.file} is not what the run in {out} was started with: start a new one")
        return Record(wanted, self.model, self.file, self.sha256)


def finetune(
    model: str | Path | None,
    file: str | Path | None,
    out: str | Path,
    config: FinetuningConfig | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    resume: bool = False,
    parallel: str = "none",
    quiet: bool = False,
    resume_command: str | None = None,
) -> Outcome:
    """Tunes `model` (a name, a directory, a .gguf file) on `file`, and writes what it learned into the directory `out`.

    `config` defaults to `FinetuningConfig()`, or to what the run had when it is resumed; `changes` are single settings
    on top of it. Progress goes to stderr unless `quiet`. `parallel` is "none", or "ddp" for the processes of
    `torchrun`. `ValueError`, `OSError` or `Diverged` in one line.
    """
    out, changes = Path(out), changes or {}
    command = resume_command or f"llmfast finetune --out {out} --resume"
    if parallel == "fsdp":
        raise ValueError("fine-tuning shares its batches between processes, not its weights: --parallel ddp")
    if resume:
        before = Record.read(out)
        record = before.resumed(out, config, changes)
    elif model is None or file is None:
        raise ValueError("name a model and a file to tune it on: llmfast finetune MODEL FILE --out DIR")
    else:
        record = Record(
            (config or FinetuningConfig()).replace(changes), lasting_name(model), str(Path(file).resolve()), ""
        )
    with processes(parallel, record.config.run.device) as group, contextlib.ExitStack() as stack:
        task = Task.of(record)
        record = Record(resolved(record.config, task.examples, group), record.model, record.file, record.sha256)
        if group.first:
            stack.enter_context(directory.only_process(out))
            if not resume:
                check_free(out)
        if not record.sha256:
            record = Record(record.config, record.model, record.file, file_sha256(Path(record.file)))
        with chosen_backend(backend_of(record.config.run.backend)), Interruption() as interruption:
            run = Finetuning(record, task, out, group, interruption, command, quiet)
            if group.first:
                record.write(out)
                task.write_tokenizer(out)
            if resume:
                run.restore(before.config)
            return run.finish()


def lasting_name(model: str | Path) -> str:
    """A model's name, as a file is to give it: a path as one that is good from everywhere."""
    path = Path(model).expanduser()
    known = str(model) in (*EMBEDDED, *KNOWN)
    return str(path.resolve()) if not known and str(model) and path.exists() else str(model)


def check_free(out: Path) -> None:
    """`ValueError` where a new run would write over something."""
    if (out / directory.RUN).exists():
        raise ValueError(f"{out} holds a run already: go on with it by --resume, or name another directory")
    taken = [name for name in OURS if (out / name).exists()]
    if taken:
        raise ValueError(f"{out} holds {taken[0]} already: name another directory")


def resolved(config: FinetuningConfig, examples: Examples, group: Processes) -> FinetuningConfig:
    """The configuration with a figure wherever it leaves one to the method or the data."""
    changes: dict[str, Any] = {}
    if config.data.task == "auto":
        changes["task"] = examples.task
    if config.method.method == "head" and examples.task != "classify":
        raise ValueError("the method head trains a classifier's head: it needs --task classify")
    if config.method.base != "floats" and config.method.method not in ("lora", "head"):
        raise ValueError(f"the weights that {config.method.method} trains must be floats, not {config.method.base}")
    if config.run.precision == "auto":
        changes["precision"] = best_precision(group.device)
    if config.optimization.lr == 0:
        changes["lr"] = LEARNING_RATES[config.method.method]
    epoch = math.ceil(len(examples.train) / config.data.batch_size)
    if config.run.steps == 0:
        changes["steps"] = max(1, round(config.data.epochs * epoch))
    for name in ("evaluate_every", "checkpoint_every"):
        if getattr(config.run, name) == 0:
            changes[name] = epoch
    return config.replace(changes)


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
        return cls(source, tokenizer, examples, own)

    def write_tokenizer(self, out: Path) -> None:
        """The model's own; with the plain template where chats are written by that."""
        copy_tokenizer(self.source.path, out)
        if self.examples.task == "chat" and not self.own_template:
            write_atomic(out / TEMPLATE, PLAIN_TEMPLATE.encode())


class Finetuning(Loop):
    """One start of a run."""

    config: FinetuningConfig

    def __init__(
        self,
        record: Record,
        task: Task,
        out: Path,
        group: Processes,
        interruption: Interruption,
        command: str,
        quiet: bool,
    ):
        config = record.config
        self.record, self.task, self.examples = record, task, task.examples
        settings, self.dtype = config.method, FLOATS[config.run.precision]
        peak_memory = memory.Peak(group.device)
        self.method: Method = BY_NAME[settings.method](settings, task.source, record.model, task.source.path)
        torch.manual_seed(config.run.seed)
        if settings.base != "floats":
            model = quantized_module(task.source, settings.base, self.dtype)
        else:
            model = module_of(task.source, torch.float32 if self.method.whole_weights else self.dtype)
        self.method.apply(model)
        if self.examples.labels:
            classifier.add_head(model, len(self.examples.labels))
        trained = {name: "matrix" for name, p in model.named_parameters() if p.requires_grad}
        self.frozen_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        self.frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        self.padding = task.tokenizer.end_of_text or 0
        self.loader = ExampleLoader(
            self.examples.train, config.data.batch_size, config.run.seed, group.rank, group.world_size, self.padding
        )
        dropout = settings.lora_dropout > 0 or model.config.without_dropout() != model.config
        trainer = Trainer(
            config,
            model,
            self.loader,
            trained | kinds_of(model.config),
            self.method,
            group,
            self.loss_of(model),
            dropout,
        )
        self.before: dict[str, Any] = {}
        super().__init__(config, trainer, Report(trainer, out, peak_memory, quiet), out, interruption, command)

    def loss_of(self, model: LanguageModel) -> Any:
        """The mean loss of the targets, for which alone the head is computed."""
        labelled = bool(self.examples.labels)

        def loss(ids: Tensor, targets: Tensor) -> Tensor:
            chosen = (targets != IGNORED).flatten().nonzero().squeeze(1)
            hidden = model.hidden(ids).flatten(0, 1).index_select(0, chosen)
            head: Any = model.score if labelled else model.lm_head
            return ops.linear_cross_entropy(hidden, head.weight, targets.flatten()[chosen])

        return loss

    # --- what the loop asks ---------------------------------------------------------------------------------------

    def description(self) -> list[str]:
        """What is trained, on how much, in words."""
        config, examples, model = self.config, self.examples, self.trainer.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return [
            f"{config.method.method}: {trained:,} parameters are trained, {self.frozen:,} are frozen "
            f"({trained / (trained + self.frozen):.2%} are trained)",
            examples.lengths(),
            f"{config.run.steps:,} steps of {config.data.batch_size} examples: "
            f"{config.run.steps * config.data.batch_size / len(examples.train):.1f} epochs",
        ]

    def expected_memory(self) -> memory.MemoryEstimate:
        """With the longest examples in one batch."""
        config, model = self.config, self.trainer.model
        return memory.estimate(
            model.config,
            -(-config.data.batch_size // config.data.accumulation // self.group.world_size),
            max(len(example.ids) for example in self.examples.train),
            config.optimization.optimizer,
            self.dtype,
            self.group.device,
            config.run.activation_checkpointing,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            frozen_bytes=self.frozen_bytes,
        )

    def begin(self) -> None:
        self.report.begin([*self.examples.notes, *self.description()], self.expected_memory())
        if self.trainer.steps_done == 0 and not self.before:
            self.before = self.measured()
            for part, figures in self.before.items():
                self.report.say(f"before: {part} {in_words(figures)}")

    @property
    def evaluating(self) -> bool:
        return bool(self.examples.validation)

    def figures(self) -> dict[str, float]:
        return {name: value for name, value in self.figures_of(self.examples.validation).items() if name in SHOWN}

    def figures_of(self, examples: list[Example]) -> dict[str, Any]:
        """The loss of what counts, and what follows from it; of a classifier also which class was taken for which."""
        batches = ExampleBatches(examples, self.padding)
        result = self.trainer.evaluate(batches)
        figures: dict[str, Any] = {"loss": result.loss}
        if not self.examples.labels:
            return figures | {"perplexity": math.exp(min(700, result.loss)), "tokens": result.tokens}
        confusion = self.confusion(batches)
        return figures | confusion.to_document()

    @torch.no_grad()
    def confusion(self, batches: ExampleBatches) -> Confusion:
        model = self.trainer.model.eval()
        actual: list[int] = []
        said: list[int] = []
        for index in range(len(batches)):
            ids, targets = batches[index]
            logits = classifier.last_logits(model, ids.to(model.device), targets.to(model.device))
            actual += targets[targets != IGNORED].tolist()
            said += logits.argmax(dim=-1).tolist()
        model.train()
        return Confusion.of(self.examples.labels, actual, said)

    def measured(self) -> dict[str, Any]:
        """The figures of both parts that are held out."""
        parts = {"validation": self.examples.validation, "test": self.examples.test}
        return {name: self.figures_of(examples) for name, examples in parts.items() if examples}

    def export(self) -> None:
        if not self.group.first:
            return
        with self.writing("the model"):
            state = self.trainer.full_weights()
            self.method.export(self.out, state, FLOATS[self.config.run.saved_precision])
            if self.examples.labels:
                longest = min(self.config.data.max_tokens, self.trainer.model.config.context)
                classifier.write_labels(self.out, self.examples.labels, longest)
            figures = {f"validation_{name}": value for name, value in (self.best or {}).items() if name != "step"}
            document = {
                "step": self.trainer.steps_done,
                "model": self.record.model,
                "data": Path(self.record.file).name,
            }
            document |= figures | {
                "arguments": {n: v for s in self.config.to_document().values() for n, v in s.items()}
            }
            write_atomic(self.out / TRAINING, (json.dumps(document, indent=2) + "\n").encode())

    def sample(self) -> None:
        if not self.group.first or self.examples.labels:
            return
        llm = LLM(self.trainer.model, self.task.tokenizer)
        prompt = self.config.run.sample_prompt
        if self.examples.task == "chat":
            text = llm.chat([{"role": "user", "content": prompt}], max_new_tokens=SAMPLE_TOKENS, seed=0)
        else:
            text = llm.generate(prompt, max_new_tokens=SAMPLE_TOKENS, seed=0, truncate=True)
        self.trainer.model.train()
        self.report.say(f"step {self.trainer.steps_done:,}: sample\n    " + text.strip("\n").replace("\n", "\n    "))

    def state(self) -> dict[str, Any]:
        return {"before": self.before}

    def put_back(self, state: dict[str, Any]) -> None:
        self.before = state["before"]

    def finish(self) -> Outcome:
        outcome = super().finish()
        if outcome.interrupted is None and self.before:
            self.trainer.weights.load(self.method.read_export(self.out))
            after = self.measured()
            self.tell(after)
            if self.group.first:
                with self.writing("the evaluation"):
                    document = {"before": self.before, "after": after}
                    write_atomic(self.out / EVALUATION, (json.dumps(document, indent=2) + "\n").encode())
        return outcome

    def tell(self, after: Mapping[str, Any]) -> None:
        """What changed, and where the result is."""
        for part, figures in after.items():
            self.report.say(f"{part}: before {in_words(self.before[part])}; after {in_words(figures)}")
            if self.examples.labels:
                confusion = Confusion(self.examples.labels, torch.tensor(figures["confusion"]).numpy())
                self.report.say(confusion.table())
        use = (
            f"llmfast classify {self.out} FILE"
            if self.examples.labels
            else f"llmfast generate PROMPT --model {self.out}"
        )
        if self.examples.task == "chat":
            use = f"llmfast chat --model {self.out}"
        self.report.say(f"the best is in {self.out}: {use}")


SHOWN = ("loss", "perplexity", "accuracy", "macro_f1")


def in_words(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {figures[name]:.4f}" for name in SHOWN if name in figures)
