"""`llmfast eval retrieval`, `qa` and `summaries`: finding, answering and shortening texts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

import llmfast
from llmfast.cli.common import backend_option, common_options, running_options
from llmfast.cli.progress import progress_bars

file_argument = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
embedder_option = click.option("--embedder", default="minilm", show_default=True, help="Whose vectors are searched.")
sample_option = click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Only N, drawn by a seed.")
model_option = click.option("-m", "--model", default="smollm2", show_default=True, help="A model that chats.")


@click.command()
@file_argument
@embedder_option
@click.option("-p", "--precision", default="fp32", show_default=True, help="Of the embedder: fp32, bf16.")
@click.option("--by-sentence", is_flag=True, help="Find the sentence that holds the answer, not the paragraph.")
@sample_option
@json_option
@common_options
def retrieval(file: Path, embedder: str, precision: str, by_sentence: bool, sample: int | None, as_json: bool) -> None:
    """How often the right paragraph of FILE (SQuAD's format) is found for a question: by words, by vectors, by both."""
    facts = retrieval_facts(file, embedder, precision, by_sentence, sample)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table("ranked by", *(Column(name, justify="right") for name in MEASURES))
    for name, measures in facts["rankings"].items():
        table.add_row(name, *(shown(measures[measure]) for measure in MEASURES))
    Console().print(table)
    for name, absent in facts["absent"].items():
        click.echo(
            f"{name} not in the index: said so {shown(absent['said_so'])}, where 90% of the others are answered "
            f"(threshold {absent['threshold']:.2f})"
        )


MEASURES = ("R@1", "R@5", "R@10", "MRR@10")


def retrieval_facts(file: Path, embedder: str, precision: str, by_sentence: bool, sample: int | None) -> dict[str, Any]:
    from llmfast.evaluation.answers import sample_of
    from llmfast.evaluation.retrieval import evaluate, passages_of
    from llmfast.evaluation.squad import read_squad

    squad = read_squad(file)
    passages, articles, right = passages_of(squad, by_sentence)
    chosen = sample_of(list(zip([q.text for q in squad.questions], right, strict=True)), sample)
    model = llmfast.Embedder(embedder, precision=precision)
    with progress_bars() as show:
        found = evaluate(model, [text for text, _ in chosen], passages, [r for _, r in chosen], articles, show)
    rankings = {
        name: {f"R@{k}": asdict(ranked.recall(k)) for k in (1, 5, 10)} | {"MRR@10": asdict(ranked.reciprocal())}
        for name, ranked in found.rankings.items()
    }
    absent = {}
    for name, evidence in (("passage", found.without_passage), ("article", found.without_article)):
        threshold, said = found.said_absent(evidence)
        absent[name] = {"threshold": threshold, "said_so": asdict(said)}
    facts = {"file": file.name, "embedder": embedder, "precision": precision, "questions": len(chosen)}
    return facts | {"passages": len(passages), "by_sentence": by_sentence, "rankings": rankings, "absent": absent}


@click.command()
@file_argument
@model_option
@embedder_option
@click.option("-k", "--sources", type=click.IntRange(1, 50), default=3, show_default=True, help="At most.")
@sample_option
@running_options
@json_option
@common_options
def qa(
    file: Path,
    model: str,
    embedder: str,
    sources: int,
    sample: int | None,
    backend: str,
    precision: str,
    device: str,
    as_json: bool,
) -> None:
    """How well a model answers the questions of FILE (SQuAD's format): from memory, by retrieval, and from the right
    paragraph."""
    from llmfast.evaluation.answers import evaluate
    from llmfast.evaluation.squad import read_squad

    squad = read_squad(file)
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device)
    with progress_bars() as show:
        found = evaluate(llm, llmfast.Embedder(embedder), squad, sample, sources, show)
    facts: dict[str, Any] = {"file": file.name, "model": model, "precision": llm.precision, "embedder": embedder}
    facts |= {"sources": sources, "questions": len(found["retrieval"].questions)}
    facts["ways"] = {way: {"exact": asdict(a.exact), "f1": asdict(a.f1)} for way, a in found.items()}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table("answered from", Column("exact match", justify="right"), Column("F1", justify="right"))
    for way, measures in facts["ways"].items():
        table.add_row(way, shown(measures["exact"]), shown(measures["f1"]))
    Console().print(table)


@click.command()
@file_argument
@model_option
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True, help="Of a summary.")
@sample_option
@running_options
@json_option
@common_options
def summaries(
    file: Path,
    model: str,
    max_new_tokens: int,
    sample: int | None,
    backend: str,
    precision: str,
    device: str,
    as_json: bool,
) -> None:
    """How near a model's summaries of the texts in FILE (.jsonl: dialogue or text, summary) are to those given, beside
    the first three lines of each text."""
    from llmfast.evaluation.summaries import KINDS, evaluate, read_examples

    examples = read_examples(file)
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device)
    with progress_bars() as show:
        found = evaluate(llm, examples, sample, max_new_tokens, show)
    facts: dict[str, Any] = {"file": file.name, "model": model, "precision": llm.precision}
    facts |= {"texts": found["model"]["rouge1"].count}
    facts |= {who: {kind: asdict(mean) for kind, mean in scores.items()} for who, scores in found.items()}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table("", *(Column(kind.replace("rouge", "ROUGE-"), justify="right") for kind in KINDS))
    for who in ("model", "baseline"):
        table.add_row(who, *(shown(facts[who][kind]) for kind in KINDS))
    Console().print(table)


def shown(mean: dict[str, float]) -> str:
    return f"{mean['value']:.4f} ({mean['low']:.3f}–{mean['high']:.3f})"
