"""From a file to the examples of a run: which task it is, what each row becomes, and what is held out.

Rows of one group (by default: rows that are the same) are all trained on or all held out, so that nothing is measured
by what was learned. A row that can't be used is named by its line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.chat.template import ChatTemplate
from llmfast.documents import read_text, split_documents
from llmfast.finetuning import labels, preferences
from llmfast.finetuning.configuration import DataSettings
from llmfast.finetuning.conversations import FORMS, encode_chat, encode_completion, form_of, messages_of
from llmfast.finetuning.examples import Example, following
from llmfast.finetuning.records import SUFFIXES, Record, read_records
from llmfast.tokenizers import Tokenizer
from llmfast.tokenizers.protocol import encodable

FEW_TOKENS = 2000  # some pages of a text
MOST_NAMED = 3  # bad rows in one message


@dataclass(frozen=True)
class Examples:
    """What a run is trained on, chosen by and measured by. `labels` are a classifier's, in the order of its outputs."""

    task: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...] = ()
    pairs: dict[str, list[tuple[Example, Example]]] = field(default_factory=dict)  # of preferences, by their part
    also: list[Example] = field(default_factory=list)  # another text, which shows what was forgotten
    notes: list[str] = field(default_factory=list)  # what people should know of them

    def parts(self) -> dict[str, list[Example]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def measured(self) -> dict[str, list[Example]]:
        """What is measured before and after."""
        parts = {"validation": self.validation, "test": self.test, "also": self.also}
        return {part: examples for part, examples in parts.items() if examples}

    def lengths(self) -> str:
        """Of the training examples, in words."""
        sizes = sorted(len(example.ids) for example in self.train)
        counted = sum(example.counted for example in self.train)
        middle, most = sizes[len(sizes) // 2], sizes[-1]
        return (
            f"{len(sizes):,} examples to train on, {len(self.validation):,} and {len(self.test):,} held out; "
            f"{middle:,} tokens in the middle, {most:,} at most; {counted:,} of {sum(sizes):,} tokens count"
        )


def prepare(
    path: str | Path,
    settings: DataSettings,
    seed: int,
    context: int,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    start_token: int | None = None,
) -> Examples:
    """The examples of a file, as the model of this tokenizer and `context` sees them.

    `template` writes chats; without it they are a `ValueError`, as is, in one line, whatever else can't be used.
    """
    path, longest = Path(path), min(settings.max_tokens, context)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name one file")
    if path.suffix not in SUFFIXES:
        if settings.task not in ("auto", "text"):
            raise ValueError(f"{path} is text: to {settings.task} takes {', '.join(SUFFIXES)}")
        text = read_text(path, settings.encoding)
        if not text.strip():
            raise ValueError(f"{path} is empty")
        return _running_text(split_documents(text), settings, seed, longest, tokenizer, start_token)
    records = read_records(path, settings.encoding)
    task = settings.task if settings.task != "auto" else _task(path, records[0], settings)
    if task == "text":
        texts = _each(path, records, lambda record: _document(record.fields))
        return _running_text([text for _, text in texts], settings, seed, longest, tokenizer, start_token)
    if task == "classify":
        fields = labels.fields_of(path, records, settings.text_field, settings.label_field)
        names = labels.classes(path, records, fields)
        rows = _each(path, records, lambda record: labels.encode(tokenizer, record, fields, names, start_token))
        groups = [_group(record, settings.group) or labels.text_of(record, fields) for record, _ in rows]
        return _divided(path, task, rows, groups, settings, seed, longest, names)
    if task == "preference":
        pairs = _each(
            path, records, lambda r: preferences.encode(r.fields, tokenizer, template, settings.system, r.place)
        )
        return _preferences(path, pairs, settings, seed, longest)
    if template is None:
        raise ValueError("this model has no chat template, and a chat can't be written without one")
    encode = _chat_encoder(tokenizer, template, settings.system)
    rows = _each(path, records, encode)
    groups = [_group(record, settings.group) or json.dumps(record.fields, sort_keys=True) for record, _ in rows]
    return _divided(path, task, rows, groups, settings, seed, longest)


def _task(path: Path, record: Record, settings: DataSettings) -> str:
    """What a file is for, by the names of the fields of its first row."""
    form = form_of(record.fields)
    if form is not None and not settings.label_field:
        table = path.suffix in (".csv", ".tsv") and len(record.fields) == 2
        if form == "text" and (table or labels.looks_labelled(record.fields)):
            return "classify"
        return form if form in ("text", "preference") else "chat"
    if path.suffix in (".csv", ".tsv") or settings.label_field or labels.looks_labelled(record.fields):
        return "classify"
    raise ValueError(
        f"{path}, {record.place}: it has the fields {', '.join(map(str, record.fields))}; a record needs {FORMS}, or a "
        "label and a text"
    )


def _each(path: Path, records: Sequence[Record], make: Callable[[Record], Any]) -> list[tuple[Record, Any]]:
    """What `make` makes of every record; `ValueError` naming the first of those that it refuses."""
    made: list[tuple[Record, Any]] = []
    wrong: list[str] = []
    for record in records:
        try:
            made.append((record, make(record)))
        except ValueError as error:
            wrong.append(f"{record.place}: {error}")
    if wrong:
        more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise ValueError(f"{path}, {'; '.join(wrong[:MOST_NAMED])}{more}")
    return made


def _chat_encoder(tokenizer: Tokenizer, template: ChatTemplate, system: str) -> Callable[[Record], Example]:
    def encode(record: Record) -> Example:
        form = form_of(record.fields)
        if form == "chat":
            turns = encode_chat(template, messages_of(record.fields, system))
        elif form == "completion":
            turns = encode_completion(tokenizer, record.fields)
        else:
            raise ValueError(f"a record needs {FORMS}, got {', '.join(map(str, record.fields)) or 'nothing'}")
        return following(turns.ids, turns.counts, record.place)

    return encode


def _document(fields: Mapping[str, Any]) -> str:
    if not isinstance(fields.get("text"), str) or not fields["text"].strip():
        raise ValueError(f'its "text" must be text, got {fields.get("text")!r:.80}')
    return str(fields["text"])


def _group(record: Record, name: str) -> str:
    if not name:
        return ""
    if name not in record.fields:
        raise ValueError(f"{record.place} has no field {name!r} to group by; it has {', '.join(record.fields)}")
    return f"={record.fields[name]}"


def _divided(
    path: Path,
    task: str,
    rows: Sequence[tuple[Record, Example]],
    groups: Sequence[str],
    settings: DataSettings,
    seed: int,
    longest: int,
    names: tuple[str, ...] = (),
) -> Examples:
    """The three parts, without what is too long."""
    fitting: list[tuple[Example, str]] = []
    cut: list[str] = []
    for (_, example), group in zip(rows, groups, strict=True):
        if len(example.ids) > longest:
            cut.append(example.place)
            if settings.too_long == "error":
                raise ValueError(
                    f"{path}, {example.place}: it has {len(example.ids):,} tokens, and max_tokens is {longest:,}"
                )
            if settings.too_long == "drop":
                continue
            example = labels.shortened(example, longest) if task == "classify" else _shortened(example, longest)
            if not example.counted:
                continue
        fitting.append((example, group))
    sides = sides_of([group for _, group in fitting], settings.validation, settings.test, seed)
    parts = {side: [e for (e, _), s in zip(fitting, sides, strict=True) if s == side] for side in SIDES}
    if not parts["train"]:
        raise ValueError(f"{path} has {len(rows)} usable rows: too few to train on any and hold out what was asked for")
    notes = []
    if cut:
        dropped = len(rows) - len(fitting)
        notes.append(
            f"note: {len(cut):,} examples are longer than {longest:,} tokens ({', '.join(cut[:MOST_NAMED])}…): "
            f"{len(cut) - dropped:,} are cut, {dropped:,} left out; max_tokens says how long they may be"
        )
    return Examples(task, parts["train"], parts["validation"], parts["test"], names, notes=notes)


def _preferences(
    path: Path,
    rows: Sequence[tuple[Record, tuple[Example, Example]]],
    settings: DataSettings,
    seed: int,
    longest: int,
) -> Examples:
    """Pairs, without those of which an answer would be cut: a preference between halves is another."""
    fitting = [(record, pair) for record, pair in rows if max(len(example.ids) for example in pair) <= longest]
    if len(fitting) < len(rows) and settings.too_long == "error":
        raise ValueError(f"{path}: {len(rows) - len(fitting):,} pairs are longer than {longest:,} tokens (max_tokens)")
    groups = [_group(r, settings.group) or json.dumps(r.fields.get("prompt", r.place)) for r, _ in fitting]
    sides = sides_of(groups, settings.validation, settings.test, seed)
    pairs = {side: [pair for (_, pair), s in zip(fitting, sides, strict=True) if s == side] for side in SIDES}
    if not pairs["train"]:
        raise ValueError(f"{path} has {len(fitting)} usable pairs: too few to train on any and hold some out")
    left_out = len(rows) - len(fitting)
    notes = [f"note: {left_out:,} pairs are longer than {longest:,} tokens (max_tokens), and left out"] * (left_out > 0)
    train, validation, test = ([preferences.longer(pair) for pair in pairs[side]] for side in SIDES)
    return Examples("preference", train, validation, test, pairs=pairs, notes=notes)


def _shortened(example: Example, longest: int) -> Example:
    return Example(example.ids[:longest], example.targets[:longest], example.place)


SIDES = ("train", "validation", "test")


def sides_of(groups: Sequence[str], validation: float, test: float, seed: int) -> list[str]:
    """The side of each row. Whole groups are held out, in an order that `seed` decides, until the share of rows is
    reached; with a share there is at least one row, where there are others to train on."""
    order = sorted(set(groups))
    np.random.default_rng([seed, 7]).shuffle(order)
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    side_of: dict[str, str] = {}
    for side, share in (("test", test), ("validation", validation)):
        wanted, held = round(share * len(groups)) or int(share > 0), 0
        for group in [group for group in order if group not in side_of][:-1]:
            if held >= wanted:
                break
            if held + sizes[group] <= wanted or held == 0:
                side_of[group] = side
                held += sizes[group]
    return [side_of.get(group, "train") for group in groups]


ALSO_TOKENS = 16384  # of another text, at most: enough for a perplexity, and seconds to measure


def windows_of(
    path: str | Path, encoding: str, longest: int, tokenizer: Tokenizer, start_token: int | None
) -> list[Example]:
    """The beginning of a text in windows, to be measured alone."""
    text = read_text(path, encoding)[: 8 * ALSO_TOKENS]
    ids = [*([] if start_token is None else [start_token]), *tokenizer.encode(encodable(text))][:ALSO_TOKENS]
    if len(ids) < 2:
        raise ValueError(f"{path} is too short: there is nothing to predict")
    return _windows(ids, longest)


def _windows(ids: Sequence[int], longest: int) -> list[Example]:
    """Blocks that predict every token but the first once."""
    blocks = [ids[i : i + longest + 1] for i in range(0, len(ids) - 1, longest)]
    return [following(block, [True] * len(block)) for block in blocks]


def _running_text(
    documents: Sequence[str],
    settings: DataSettings,
    seed: int,
    longest: int,
    tokenizer: Tokenizer,
    start_token: int | None,
) -> Examples:
    """Windows of text. Of one document the end is held out, of several whole documents."""
    encoded = []
    for document in documents:
        ids = tokenizer.encode(encodable(document))
        end = [tokenizer.end_of_text] if tokenizer.end_of_text is not None and len(documents) > 1 else []
        encoded.append([*([] if start_token is None else [start_token]), *ids, *end])
    parts: dict[str, list[list[int]]] = {side: [] for side in SIDES}
    if len(encoded) == 1:
        ids = encoded[0]
        test = len(ids) - int(settings.test * len(ids))
        validation = test - int(settings.validation * len(ids))
        parts = {"train": [ids[:validation]], "validation": [ids[validation:test]], "test": [ids[test:]]}
    else:
        sides = sides_of([f"{i}" for i in range(len(encoded))], settings.validation, settings.test, seed)
        for side, ids in zip(sides, encoded, strict=True):
            parts[side].append(ids)
    windows = {
        side: [window for ids in several for window in _windows(ids, longest)] for side, several in parts.items()
    }
    if not windows["train"]:
        raise ValueError("the text is too short: there is nothing to train on")
    tokens = sum(example.counted for example in windows["train"])
    notes = []
    if tokens < FEW_TOKENS:
        notes.append(f"note: only {tokens:,} tokens to train on: the model will learn them by heart, and little else")
    return Examples("text", windows["train"], windows["validation"], windows["test"], notes=notes)
