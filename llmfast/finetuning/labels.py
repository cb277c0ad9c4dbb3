"""Labelled texts: which field is the label, which classes there are, and an example of each row.

A classifier looks at a whole text; its class stands at the last token, where the text ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmfast.finetuning.examples import Example
from llmfast.finetuning.records import Record
from llmfast.tokenizers import Tokenizer
from llmfast.tokenizers.protocol import encodable
from llmfast.training.dataset import IGNORED

LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "y")
TEXT_NAMES = (
    "text",
    "sms",
    "message",
    "sentence",
    "content",
    "review",
    "comment",
    "body",
    "document",
    "utterance",
    "x",
)
MOST_CLASSES = 1000


class Fields(NamedTuple):
    text: str
    label: str


def looks_labelled(fields: Mapping[str, Any]) -> bool:
    names = {str(name).lower() for name in fields}
    return bool(names & set(LABEL_NAMES)) and len(fields) > 1


def fields_of(path: Path, records: Sequence[Record], text: str = "", label: str = "") -> Fields:
    """The names of the two fields: those that are asked for, or that are called what such fields usually are. Of two
    columns the one that is left is the other. `ValueError` lists what there is."""
    names = list(records[0].fields)
    there = ", ".join(map(str, names))
    for wanted in (text, label):
        if wanted and wanted not in names:
            raise ValueError(f"{path} has no field {wanted!r}, but {there}")
    label = label or _called(names, LABEL_NAMES, text)
    text = text or _called(names, TEXT_NAMES, label)
    if len(names) == 2 and bool(text) != bool(label):
        other = next(name for name in names if name not in (text, label))
        text, label = text or other, label or other
    if not text or not label:
        raise ValueError(
            f"{path} has the fields {there}: say which is the text and which the label, "
            "--set text_field=NAME --set label_field=NAME"
        )
    return Fields(text, label)


def classes(path: Path, records: Sequence[Record], fields: Fields) -> tuple[str, ...]:
    """The classes, in the order of their names. `ValueError` where there is one only, or two that differ by case, or
    so many that the label is none."""
    first: dict[str, Record] = {}
    for record in records:
        if label := label_of(record, fields):
            first.setdefault(label, record)
    folded: dict[str, str] = {}
    for label in first:
        other = folded.setdefault(label.casefold(), label)
        if other != label:
            raise ValueError(
                f"{path}: the labels {other!r} ({first[other].place}) and {label!r} ({first[label].place}) differ only "
                "in how they are written: make them one"
            )
    if len(first) == 1:
        raise ValueError(f"{path}: every row has the label {next(iter(first))!r}: there is nothing to tell apart")
    if len(first) > min(MOST_CLASSES, max(2, len(records) // 2)):
        raise ValueError(
            f"{path}: the field {fields.label!r} has {len(first):,} different values in {len(records):,} rows: is it "
            "the label?"
        )
    return tuple(sorted(first))


def encode(
    tokenizer: Tokenizer, record: Record, fields: Fields, names: Sequence[str], start_token: int | None
) -> Example:
    """A row's text, whose last token is to say its class. `ValueError` says what is wrong with it."""
    if not (label := label_of(record, fields)):
        raise ValueError(f"its label ({fields.label}) is empty")
    return unlabelled(tokenizer, text_of(record, fields), start_token, names.index(label), record.place)


def unlabelled(tokenizer: Tokenizer, text: str, start_token: int | None, target: int = 0, place: str = "") -> Example:
    """A text as a classifier is given it."""
    if not text.strip():
        raise ValueError("its text is empty")
    start = [] if start_token is None else [start_token]
    ids = np.array([*start, *tokenizer.encode(encodable(text))], dtype=np.int32)
    if not len(ids):
        raise ValueError("its text has no token that the model knows")
    targets = np.full(len(ids), IGNORED, dtype=np.int32)
    targets[-1] = target
    return Example(ids, targets, place)


def shortened(example: Example, longest: int) -> Example:
    """The beginning of a text, which is then all that its class is told by."""
    return Example(example.ids[:longest], example.targets[-longest:], example.place)


def text_of(record: Record, fields: Fields) -> str:
    value = record.fields.get(fields.text)
    if not isinstance(value, str):
        raise ValueError(f"its text ({fields.text}) must be text, got {value!r:.80}")
    return value


def label_of(record: Record, fields: Fields) -> str:
    value = record.fields.get(fields.label)
    return "" if value is None else str(value).strip()


def _called(names: Sequence[str], known: Sequence[str], taken: str) -> str:
    by_name = {str(name).lower(): name for name in names if name != taken}
    return next((by_name[name] for name in known if name in by_name), "")
