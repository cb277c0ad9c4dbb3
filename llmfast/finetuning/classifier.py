"""A language model that tells classes apart: what its last hidden states say of a text, times a head.

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

from llmfast.files import write_atomic
from llmfast.finetuning import head
from llmfast.finetuning.examples import ExampleBatches
from llmfast.finetuning.labels import shortened, unlabelled
from llmfast.inference.execution import chosen_backend, device_of
from llmfast.inference.llm import start_token_of
from llmfast.models import FLOATS, LanguageModel
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.training.checkpoints import load_tensors
from llmfast.training.trainer import best_precision
from llmfast.weights.adapter import SCORE, SCORE_FILE, is_adapter
from llmfast.weights.checkpoint import stream
from llmfast.weights.config_file import read_document
from llmfast.weights.folding import read_any
from llmfast.weights.loading import module_of
from llmfast.weights.locate import locate_model

CLASSIFIER = "classifier.json"  # its classes, and how long a text it was shown


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
        pooling: str = "last",
    ):
        self.model, self.tokenizer, self.labels = model.eval(), tokenizer, tuple(labels)
        self.max_tokens, self.backend, self.pooling = max_tokens, backend, pooling

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
        labels, max_tokens, pooling = read_labels(path)
        source = stream(locate_model(path))
        tokenizer = load_tokenizer(source.path)
        if tokenizer is None:
            raise ValueError(f"{path} has no tokenizer")
        score = read_any(path, source.config).score if is_adapter(path) else load_tensors(path / SCORE_FILE).get(SCORE)
        if score is None or tuple(score.shape) != (len(labels), head.width(source.config, pooling)):
            raise ValueError(f"{path} has no head for its {len(labels)} labels")
        model = module_of(source, FLOATS[precision]).to(place)
        head.add_head(model, len(labels), pooling)
        model.score.weight.data = score.to(place, FLOATS[precision])  # type: ignore[union-attr]
        return cls(model, tokenizer, labels, max_tokens, backend, pooling)

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
        start = start_token_of(self.model.config, self.tokenizer)
        examples = []
        for number, text in enumerate(texts, start=1):
            try:
                example = unlabelled(self.tokenizer, text, start)
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from None
            examples.append(shortened(example, self.max_tokens))
        batches = ExampleBatches(examples)
        order = iter(batches.order)
        for index in range(len(batches)):
            ids, targets = (t.to(self.model.device) for t in batches[index])
            with chosen_backend(self.backend):
                logits, _ = head.logits(self.model, ids, targets, self.pooling)
            chances = logits.softmax(dim=-1).cpu()
            for row in chances.tolist():
                label = self.labels[max(range(len(row)), key=row.__getitem__)]
                yield next(order), Verdict(label, dict(zip(self.labels, row, strict=True)))


def write_labels(directory: Path, labels: Sequence[str], max_tokens: int, pooling: str) -> None:
    document = {"labels": list(labels), "max_tokens": max_tokens, "pooling": pooling}
    write_atomic(directory / CLASSIFIER, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def read_labels(directory: Path) -> tuple[list[str], int, str]:
    """The labels, the most tokens of a text, and what is read of it. `ValueError` where the file is damaged."""
    document = read_document(directory / CLASSIFIER)
    labels, most, pooling = document.get("labels"), document.get("max_tokens"), document.get("pooling", "last")
    right = isinstance(labels, list) and len(labels) > 1 and all(isinstance(label, str) for label in labels)
    if not right or type(most) is not int or most < 1 or pooling not in head.POOLINGS:
        raise ValueError(f"{directory / CLASSIFIER} should hold a list of labels, max_tokens, and a pooling")
    return labels, most, pooling  # type: ignore[return-value]
