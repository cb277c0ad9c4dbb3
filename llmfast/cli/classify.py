"""`llmfast classify`: which class a text is of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from llmfast.cli.common import backend_option, common_options
from llmfast.finetuning import labels
from llmfast.finetuning.classifier import Classifier
from llmfast.finetuning.confusion import Confusion
from llmfast.finetuning.records import SUFFIXES, read_records
from llmfast.models import FLOATS


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--text-field", default="", help="The field of the text, where its name does not say so.")
@click.option("--label-field", default="", help="The field of the right class, to be compared with.")
@click.option("--encoding", default="utf-8", show_default=True, help="Of the file.")
@click.option("--backend", default="auto", show_default=True, help="auto, pytorch, cpp, triton, a .py file, OP=NAME,…")
@click.option("--precision", type=click.Choice(["auto", *FLOATS]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a text.")
@common_options
def classify(
    model: Path,
    file: Path,
    text_field: str,
    label_field: str,
    encoding: str,
    backend: str,
    precision: str,
    device: str,
    as_json: bool,
) -> None:
    """Say which class each text of FILE is of, with the classifier in the directory MODEL.

    FILE is a table (.csv, .tsv), records (.jsonl, .json), or else text with one text a line; - is stdin. Where the
    right classes are there too, a table on stderr says how often each was found.
    """
    texts, right = _read(file, text_field, label_field, encoding)
    classifier = Classifier.load(model, backend_option(backend), precision, device)
    verdicts = classifier.classify(texts)
    for text, verdict in zip(texts, verdicts, strict=True):
        if as_json:
            record = {"text": text, "label": verdict.label, "probabilities": verdict.probabilities}
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            click.echo(f"{verdict.label}\t{verdict.confidence:.4f}\t{' '.join(text.split())}")
    if right:
        if unknown := sorted(set(right) - set(classifier.labels)):
            raise ValueError(f"{file} has labels that the classifier does not know: {', '.join(unknown[:5])}")
        number = {label: index for index, label in enumerate(classifier.labels)}
        confusion = Confusion.of(
            classifier.labels, [number[label] for label in right], [number[verdict.label] for verdict in verdicts]
        )
        click.echo(f"{confusion.accuracy:.2%} of {len(right):,} are right\n{confusion.table()}", err=True)


def _read(file: Path, text_field: str, label_field: str, encoding: str) -> tuple[list[str], list[str]]:
    """The texts, and the right classes where the file has them."""
    if file.suffix not in SUFFIXES:
        content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding=encoding)
        texts = [line for line in content.splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"{file} is empty")
        return texts, []
    records = read_records(file, encoding)
    names = list(records[0].fields)
    if not text_field and not label_field and not labels.looks_labelled(records[0].fields):
        text_field = next(
            (n for n in names if str(n).lower() in labels.TEXT_NAMES), names[0] if len(names) == 1 else ""
        )
        if text_field:
            return [labels.text_of(record, labels.Fields(text_field, "")) for record in records], []
    fields = labels.fields_of(file, records, text_field, label_field)
    return [labels.text_of(r, fields) for r in records], [labels.label_of(r, fields) for r in records]
