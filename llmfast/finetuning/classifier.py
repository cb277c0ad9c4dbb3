"""A language model that tells classes apart: its last hidden state of a text, times a head (labels, C).

classifier = llmfast.finetuning.classifier.Classifier.load("spam")
classifier.classify(["You have won!", "See you at six"])     # [Verdict("spam", 0.99…), Verdict("ham", …)]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmfast.files import write_atomic
from llmfast.finetuning.examples import ExampleBatches
from llmfast.finetuning.labels import TEXT, Wording
from llmfast.inference.execution import chosen_backend, device_of
from llmfast.inference.llm import start_token_of
from llmfast.models import FLOATS, LanguageModel
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.training.checkpoints import load_tensors
from llmfast.training.dataset import IGNORED
from llmfast.training.trainer import best_precision
from llmfast.weights.adapter import SCORE, SCORE_FILE, is_adapter
from llmfast.weights.checkpoint import stream
from llmfast.weights.config_file import read_document
from llmfast.weights.folding import read_any
from llmfast.weights.loading import module_of
from llmfast.weights.locate import locate_model

CLASSIFIER = "classifier.json"  # its classes, and how long a text it was shown


def add_head(model: LanguageModel, labels: int) -> None:
    """Gives the model a head `score` (Hugging Face's name for it), drawn from torch's generator."""
    head = nn.Linear(model.config.width, labels, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    model.score = head.to(model.device)


def last_logits(model: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    """The classes' logits (rows, labels) float32 at the token of each row that has a target."""
    hidden = model.hidden(ids)[targets != IGNORED]
    score = model.score
    assert isinstance(score, nn.Linear)
    return (hidden @ score.weight.t()).float()


@dataclass(frozen=True)
class Verdict:
    """A text's class, and how likely each is."""

    label: str
    probabilities: dict[str, float]

    @property
    def confidence(self) -> float:
        return self.probabilities[self.label]


class Classifier:
    """A model with its head, and the classes in the order of its outputs."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        max_tokens: int,
        backend: Any = "auto",
        template: str = TEXT,
    ):
        self.model, self.tokenizer, self.labels = model.eval(), tokenizer, tuple(labels)
        self.max_tokens, self.backend = max_tokens, backend
        self.wording = Wording(tokenizer, start_token_of(model.config, tokenizer), template)

    @classmethod
    def load(
        cls,
        name: str | Path,
        backend: str | Mapping[str, str] = "auto",
        precision: str = "auto",
        device: str | torch.device = "auto",
    ) -> Classifier:
        """What `llmfast finetune … --task classify` wrote into a directory. `precision` is fp32, bf16, on a GPU also
        fp16, or "auto". `FileNotFoundError` or `ValueError` in one line."""
        path, place = Path(name), device_of(device)
        if not (path / CLASSIFIER).exists():
            raise FileNotFoundError(f"no classifier in {path}: it holds no {CLASSIFIER}")
        if precision == "auto":
            precision = best_precision(place)
        if precision not in FLOATS:
            raise ValueError(f"a classifier's precision must be auto, {', '.join(FLOATS)}, got {precision!r}")
        labels, max_tokens, template = read_labels(path)
        source = stream(locate_model(path))
        tokenizer = load_tokenizer(source.path)
        if tokenizer is None:
            raise ValueError(f"{path} has no tokenizer")
        score = read_any(path, source.config).score if is_adapter(path) else load_tensors(path / SCORE_FILE).get(SCORE)
        if score is None or tuple(score.shape) != (len(labels), source.config.width):
            raise ValueError(f"{path} has no head for its {len(labels)} labels")
        model = module_of(source, FLOATS[precision]).to(place)
        add_head(model, len(labels))
        model.score.weight.data = score.to(place, FLOATS[precision])  # type: ignore[union-attr]
        return cls(model, tokenizer, labels, max_tokens, backend, template)

    def classify(self, texts: str | Sequence[str]) -> Any:
        """A `Verdict` of a text, or a list of those of several. `ValueError` for an empty text."""
        if isinstance(texts, str):
            return self.classify([texts])[0]
        verdicts: list[Verdict | None] = [None] * len(texts)
        for index, verdict in self.verdicts(texts):
            verdicts[index] = verdict
        return verdicts

    @torch.inference_mode()
    def verdicts(self, texts: Sequence[str]) -> Iterator[tuple[int, Verdict]]:
        """The number and the verdict of each text, those of like length together."""
        examples = []
        for number, text in enumerate(texts, start=1):
            try:
                example = self.wording.example(text)
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from None
            examples.append(self.wording.shortened(example, self.max_tokens))
        batches = ExampleBatches(examples)
        order = iter(batches.order)
        for index in range(len(batches)):
            ids, targets = (t.to(self.model.device) for t in batches[index])
            with chosen_backend(self.backend):
                chances = last_logits(self.model, ids, targets).softmax(dim=-1).cpu()
            for row in chances.tolist():
                label = self.labels[max(range(len(row)), key=row.__getitem__)]
                yield next(order), Verdict(label, dict(zip(self.labels, row, strict=True)))


def write_labels(directory: Path, labels: Sequence[str], max_tokens: int, template: str) -> None:
    document = {"labels": list(labels), "max_tokens": max_tokens, "template": template or TEXT}
    write_atomic(directory / CLASSIFIER, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def read_labels(directory: Path) -> tuple[list[str], int, str]:
    """The labels, the most tokens of a text, and what it is put into. `ValueError` where the file is damaged."""
    document = read_document(directory / CLASSIFIER)
    labels, most, template = document.get("labels"), document.get("max_tokens"), document.get("template", TEXT)
    right = isinstance(labels, list) and len(labels) > 1 and all(isinstance(label, str) for label in labels)
    if not right or type(most) is not int or most < 1 or not isinstance(template, str):
        raise ValueError(f"{directory / CLASSIFIER} should hold a list of labels, max_tokens, and a template")
    return labels, most, template  # type: ignore[return-value]
