"""A fine-tuning run: a model and a file in, a directory out (`directory`)."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast import ops
from llmfast.files import file_sha256, write_atomic
from llmfast.finetuning import classifier, head, preferences
from llmfast.finetuning.answers import Answer, answer, overlap, questions
from llmfast.finetuning.configuration import FinetuningConfig
from llmfast.finetuning.confusion import Confusion
from llmfast.finetuning.directory import EVALUATION, Record, check_free, lasting_name
from llmfast.finetuning.examples import ExampleBatches, ExampleLoader
from llmfast.finetuning.methods import BY_NAME, Method
from llmfast.finetuning.page import PAGE, write_page
from llmfast.finetuning.preferences import PairLoader
from llmfast.finetuning.task import Task, resolved
from llmfast.inference.execution import chosen_backend
from llmfast.inference.llm import LLM
from llmfast.inference.loading import load
from llmfast.models import FLOATS, LanguageModel
from llmfast.training import directory, memory
from llmfast.training.dataset import IGNORED
from llmfast.training.hardware import flops_per_token
from llmfast.training.interruption import Interruption
from llmfast.training.loop import Loop, Outcome
from llmfast.training.metrics import CURVES
from llmfast.training.processes import Processes, processes
from llmfast.training.report import Report
from llmfast.training.run import backend_of
from llmfast.training.trainer import Trainer
from llmfast.training.weights import kinds_of
from llmfast.weights.adapter import SCORE
from llmfast.weights.loading import module_of, quantized_module
from llmfast.weights.quantizing import TRAINING

SAMPLE_TOKENS = 80
# What a name of something added ends with, and what `MasterWeights` calls it.
KINDS_OF_ADDED = {
    ".adapter.a": "adapter_a",
    ".adapter.b": "adapter_b",
    ".adapter.down.weight": "adapter_a",
    ".adapter.down.bias": "vector",
    ".adapter.up.weight": "adapter_b",
    ".adapter.up.bias": "vector",
    SCORE: "head",
}


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
    if not resume:
        check_free(out)  # before its data take minutes
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
        peak_memory, self.expected_bytes = memory.Peak(group.device), 0
        self.method: Method = BY_NAME[settings.method](settings, task.source, record.model, task.source.path)
        torch.manual_seed(config.run.seed)
        if settings.base != "floats":
            model = quantized_module(task.source, settings.base, self.dtype)
        else:
            model = module_of(task.source, torch.float32 if self.method.whole_weights else self.dtype)
        self.method.apply(model)
        if self.examples.labels:
            head.add_head(model, len(self.examples.labels), config.data.pooling)
        added = {
            n: kind for n, _ in model.named_parameters() for end, kind in KINDS_OF_ADDED.items() if n.endswith(end)
        }
        self.frozen_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        self.frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        floats = settings.base != "floats" and not self.examples.labels  # of the head, as long as the loss is computed
        self.head_bytes = floats * model.config.vocab_size * model.config.width * self.dtype.itemsize
        self.padding = task.tokenizer.end_of_text or 0
        place = config.data.batch_size, config.run.seed, group.rank, group.world_size, self.padding
        self.loader = ExampleLoader(self.examples.train, *place)
        if self.examples.pairs:
            self.loader = PairLoader(self.examples.pairs["train"], *place)
        dropout = settings.lora_dropout > 0 or model.config.without_dropout() != model.config
        trainer = Trainer(
            config,
            model,
            self.loader,
            added | kinds_of(model.config),
            self.method,
            group,
            self.loss_of(model),
            dropout,
        )
        self.before: dict[str, Any] = {}
        lengths = sum(len(example.ids) for example in self.examples.train) // len(self.examples.train)
        share = 1.0 if self.method.whole_weights else 2 / 3  # frozen weights get no gradient
        flops = share * flops_per_token(model.config, lengths)
        report = Report(trainer, out, peak_memory, quiet, flops)
        super().__init__(config, trainer, report, out, interruption, command)

    def loss_of(self, model: LanguageModel) -> Any:
        """The mean loss of the targets, for which alone the head is computed."""
        if self.examples.pairs:
            return functools.partial(preferences.loss, model, beta=self.record.config.method.dpo_beta)
        pooling = self.record.config.data.pooling

        def of_classes(ids: Tensor, targets: Tensor) -> Tensor:
            score: Any = model.score
            found, classes = head.features(model, ids, targets, pooling)
            return ops.linear_cross_entropy(found, score.weight, classes)

        def of_tokens(ids: Tensor, targets: Tensor) -> Tensor:
            chosen = (targets != IGNORED).flatten().nonzero().squeeze(1)
            hidden = model.hidden(ids).flatten(0, 1).index_select(0, chosen)
            return ops.linear_cross_entropy(hidden, model.lm_head.weight, targets.flatten()[chosen])

        return of_classes if self.examples.labels else of_tokens

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
            frozen_bytes=self.frozen_bytes + self.head_bytes,
            rank=config.method.rank if config.method.method == "lora" else 0,
            bottleneck=config.method.bottleneck if config.method.method == "adapter" else 0,
        )

    def stepped(self) -> None:
        if self.trainer.device.type == "cpu":
            memory.give_back(self.expected_bytes)

    def begin(self) -> None:
        expected = self.expected_memory()
        self.expected_bytes = expected.total
        self.report.begin([*self.examples.notes, *self.description()], expected)
        if self.trainer.steps_done == 0 and not self.before:
            if self.examples.labels:
                self.fit_head()
            self.before = self.measured()
            for part, figures in self.before.items():
                if part != "validation":
                    self.report.say(f"before: {part} {in_words(figures)}")
            if self.evaluating:
                self.judge(shown(self.before["validation"]))

    def fit_head(self) -> None:
        """Makes a classifier's head the best one for the model as it is; each process the same."""
        model, parts = self.trainer.model.eval(), [self.examples.train, self.examples.validation]
        train, *held_out = (
            head.features_of(model, ExampleBatches(head.some_of(part), self.padding), self.config.data.pooling)
            for part in parts
            if part
        )
        score = head.best_fitted(train, held_out[0] if held_out else None, len(self.examples.labels))
        self.trainer.weights.load(self.trainer.weights.state() | {SCORE: score})
        model.train()

    @property
    def evaluating(self) -> bool:
        return bool(self.examples.validation)

    def figures(self) -> dict[str, float]:
        return shown(self.figures_of("validation"))

    def figures_of(self, part: str) -> dict[str, Any]:
        """The loss of what counts, and what follows from it; of a classifier also which class was taken for which."""
        if part in self.examples.pairs:
            beta, model = self.config.method.dpo_beta, self.trainer.model
            return preferences.figures(model, self.examples.pairs[part], beta, self.padding)
        batches = ExampleBatches(self.examples.measured()[part], self.padding)
        if self.examples.labels:
            return self.classified(batches)
        result = self.trainer.evaluate(batches)
        return {"loss": result.loss, "perplexity": math.exp(min(700, result.loss)), "tokens": result.tokens}

    @torch.no_grad()
    def classified(self, batches: ExampleBatches) -> dict[str, Any]:
        """The loss, and which class was taken for which; each process computes all of it."""
        model = self.trainer.model.eval()
        nats = 0.0
        actual: list[int] = []
        said: list[int] = []
        for index in range(len(batches)):
            ids, targets = (t.to(model.device) for t in batches[index])
            logits, labels = head.logits(model, ids, targets, self.config.data.pooling)
            nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            actual += labels.tolist()
            said += logits.argmax(dim=-1).tolist()
        model.train()
        confusion = Confusion.of(self.examples.labels, actual, said)
        return {"loss": nats / len(actual)} | confusion.to_document()

    def measured(self) -> dict[str, Any]:
        """The figures of both parts that are held out, and of the other text."""
        return {part: self.figures_of(part) for part in self.examples.measured()}

    def export(self) -> None:
        if not self.group.first:
            return
        with self.writing("the model"):
            state = self.trainer.full_weights()
            self.method.export(self.out, state, FLOATS[self.config.run.saved_precision])
            if self.examples.labels:
                longest = min(self.config.data.max_tokens, self.trainer.model.config.context)
                classifier.write_labels(self.out, self.examples.labels, longest, self.config.data.pooling)
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
        if outcome.interrupted is not None:
            return outcome
        after: dict[str, Any] = {}
        if self.before:
            self.trainer.weights.load(self.method.read_export(self.out))
            after = self.measured()
            if self.group.first:
                answers = self.answered(after)
                with self.writing("the evaluation"):
                    document = {"before": self.before, "after": after}
                    write_atomic(self.out / EVALUATION, (json.dumps(document, indent=2) + "\n").encode())
                    lines, title = self.description(), f"{self.record.model}, tuned on {Path(self.record.file).name}"
                    page = self.out / PAGE, title, lines, self.before, after, self.out / CURVES, answers
                    write_page(*page)
        self.tell(after)
        return outcome

    def answered(self, after: dict[str, Any]) -> list[Answer]:
        """Answers to held-out chats by both models, whose overlap with what was expected goes among the figures."""
        held_out = self.examples.test or self.examples.validation
        most, longest = self.config.run.answers, self.config.run.answer_tokens
        asked = questions(held_out, self.task.tokenizer, most) if self.examples.task == "chat" else []
        if not asked:
            return []
        device = str(self.group.device)
        texts = []
        for figures, name in ((self.before, self.record.model), (after, str(self.out))):
            llm = load(name, device=device)
            texts.append([answer(llm, question, longest) for question in asked])
            figures["answers"] = overlap(texts[-1], asked) | {"count": len(asked)}
        return [Answer(question, *pair) for question, *pair in zip(asked, *texts, strict=True)]

    def tell(self, after: Mapping[str, Any]) -> None:
        """What changed, and where the result is."""
        for part, figures in after.items():
            self.report.say(f"{part}: before {in_words(self.before[part])}; after {in_words(figures)}")
            if self.examples.labels:
                confusion = Confusion(self.examples.labels, torch.tensor(figures["confusion"]).numpy())
                self.report.say(confusion.table())
        verbs = {"classify": f"classify {self.out} FILE", "text": f"generate PROMPT --model {self.out}"}
        verb = verbs.get(self.examples.task, f"chat --model {self.out}")
        self.report.say(f"the best is in {self.out}: llmfast {verb}")


SHOWN = ("loss", "perplexity", "accuracy", "macro_f1", "margin", "exact_match", "rouge_l")


def shown(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in SHOWN if name in figures}


def in_words(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown(figures).items())
