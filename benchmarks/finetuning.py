"""How well fine-tuning does: the tasks of docs/fine-tuning.md on public data, over several seeds.

    python benchmarks/finetuning.py DATA                          # everything, five seeds: hours on two cores
    python benchmarks/finetuning.py DATA --only sms --seed 3      # one run of one task

A run's result takes the place of that of the same task and seed, where the settings are the same, and stands beside
those of other seeds; where they are not, the task begins anew.

Each run is `llmfast finetune` with the settings in `TASKS`, on files that this script makes of those in DATA. What is
held out to be tested (`test`) is measured before and after, and chooses nothing. Results go to
benchmarks/results/finetuning.json, for each task and seed what was measured, and how long training took; and from there
into the table and the curves of docs/fine-tuning.md.

Beside the classifiers stands one without any network: n-grams of words and characters with logistic regression, by
scikit-learn (pip install scikit-learn), on the same rows.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from llmfast.benchmarking import drawing
from llmfast.benchmarking.facts import facts
from llmfast.evaluation.overlap import rouge_l
from llmfast.evaluation.summaries import first_turns
from llmfast.finetuning.directory import EVALUATION
from llmfast.finetuning.preparing import sides_of
from llmfast.finetuning.records import read_records
from llmfast.finetuning.run import finetune
from llmfast.training import metrics

sys.path.insert(0, str(Path(__file__).parent))
import readme  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "finetuning.json"
PAGE = Path(__file__).parents[1] / "docs" / "fine-tuning.md"
CURVES = PAGE.parent / "pictures" / "fine-tuning-curves.png"


@dataclass(frozen=True)
class Task:
    """A model, a file made for each seed, and the settings that differ from `llmfast finetune`'s own."""

    model: str
    make: Callable[[Path, Path, int], Path]
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 5


def sms(data: Path, place: Path, seed: int) -> Path:
    """All 747 spam messages, and as many others."""
    with open(data / "sms_spam.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    spam, ham = ([row for row in rows if row[0] == label] for label in ("spam", "ham"))
    chosen = spam + random.Random(seed).sample(ham, len(spam))
    random.Random(seed).shuffle(chosen)
    path = place / "sms.tsv"
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in chosen), encoding="utf-8")
    return path


def instructions(data: Path, place: Path, seed: int) -> Path:
    return Path(shutil.copy(data / "instruction_data.json", place / "instructions.json"))


def dialogues(data: Path, place: Path, seed: int) -> Path:
    """A conversation a dialogue: what the system says is the assistant's part."""
    roles = {"USER": "user", "SYSTEM": "assistant"}
    rows = []
    for dialogue in (data / "sgd_dialogues.txt").read_text(encoding="utf-8").split("\n\n"):
        turns = [line.split(": ", 1) for line in dialogue.splitlines() if line.strip()]
        if turns:
            rows.append({"messages": [{"role": roles[who], "content": said} for who, said in turns]})
    return _jsonl(place / "dialogues.jsonl", rows)


def summaries(data: Path, place: Path, seed: int) -> Path:
    lines = (data / "dialogsum_dev.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    asked = "Summarize the dialogue in one or two sentences."
    rows = [{"instruction": asked, "input": r["dialogue"], "output": r["summary"]} for r in records]
    return _jsonl(place / "summaries.jsonl", rows)


def book(data: Path, place: Path, seed: int) -> Path:
    """One book, another for each seed."""
    with zipfile.ZipFile(data / "gutenberg.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        text = archive.read(names[seed % len(names)]).decode("utf-8", "replace")
    path = place / "book.txt"
    path.write_text(text, encoding="utf-8")
    return path


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


SPLIT = {"test": 0.2, "validation": 0.1}
SMALL = {"lr": 1e-3}  # of the embedded model, which takes larger steps
TASKS: dict[str, Task] = {
    "sms": Task("smollm2", sms, SPLIT | {"epochs": 2.0}),
    "sms-evaluated-often": Task("smollm2", sms, SPLIT | {"epochs": 2.0, "evaluate_every": 16}),  # for its curves
    "sms-stories-last-layers": Task("stories", sms, SPLIT | SMALL | {"method": "last-layers"}),
    "sms-stories-lora": Task("stories", sms, SPLIT | SMALL),
    "instructions": Task(
        "smollm2", instructions, {"test": 0.1, "validation": 0.05, "answers": 110, "epochs": 2.0, "lr": 2e-4}
    ),
    "instructions-adapter": Task(
        "smollm2", instructions, {"test": 0.1, "validation": 0.05, "answers": 0, "epochs": 2.0, "method": "adapter"}
    ),
    "dialogue": Task("smollm2", dialogues, {"test": 0.1, "validation": 0.05, "answers": 0, "epochs": 1.0}),
    "dialogue-full": Task(
        "smollm2", dialogues, {"test": 0.1, "validation": 0.05, "answers": 0, "epochs": 1.0, "method": "full"}
    ),
    "summaries": Task("smollm2", summaries, {"test": 0.2, "validation": 0.05, "answers": 100, "epochs": 2.0}),
    "book": Task("smollm2", book, {"test": 0.1, "validation": 0.05, "epochs": 2.0, "also": "wikitext2_valid.raw"}),
    **{
        f"instructions-{base}": Task(
            "smollm2",
            instructions,
            {"test": 0.1, "validation": 0.05, "answers": 0, "epochs": 2.0, "lr": 2e-4, "base": base},
        )
        for base in ("q4_1", "int4")
    },
}


# What stands beside a task: what the table calls it, and where a run has it.
BASELINES = (
    ("test accuracy of n-grams", "n_grams", "accuracy"),
    ("rouge-l of the first three turns", "first_turns", "rouge_l"),
)


def run(task: Task, data: Path, seed: int, quiet: bool) -> dict[str, Any]:
    """What one run measured, and the same of the simplest baseline where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        file = task.make(data, place, seed)
        settings = task.settings | {"seed": seed}
        if "also" in settings:
            settings["also"] = str(data / settings["also"])
        begun = time.perf_counter()
        outcome = finetune(task.model, file, place / "out", changes=settings, quiet=quiet)
        if outcome.interrupted is not None:
            raise SystemExit(128 + outcome.interrupted)
        found = json.loads((place / "out" / EVALUATION).read_text(encoding="utf-8"))
        found |= {"seed": seed, "step": (outcome.validation or {}).get("step"), "training_seconds": outcome.seconds}
        found["curve"] = [row for row in metrics.read(place / "out" / metrics.METRICS) if "validation_loss" in row]
        found |= {"seconds": time.perf_counter() - begun, "tokens_per_second": outcome.tokens_per_second}
        if file.suffix == ".tsv":
            found["n_grams"] = n_grams(file, settings)
        if task.make is summaries:
            found["first_turns"] = first_turns_overlap(file, settings)
    return found


def first_turns_overlap(file: Path, settings: dict[str, Any]) -> dict[str, float]:
    """ROUGE-L of the first three turns of each dialogue of the test part, as its summary."""
    records = read_records(file)
    groups = [json.dumps(record.fields, sort_keys=True) for record in records]
    sides = sides_of(groups, settings["validation"], settings["test"], settings["seed"])
    tested = [record.fields for record, side in zip(records, sides, strict=True) if side == "test"]
    return {"rouge_l": statistics.mean(rouge_l(first_turns(row["input"]), row["output"]) for row in tested)}


def n_grams(file: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """The test accuracy of n-grams of words (1, 2) and characters (2 to 5) with logistic regression, on the rows that
    the network was trained on; None where scikit-learn is not installed."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union
    except ImportError:
        return None
    records = read_records(file)
    sides = sides_of([r.fields["text"] for r in records], settings["validation"], settings["test"], settings["seed"])
    parts = {side: [r.fields for r, s in zip(records, sides, strict=True) if s == side] for side in ("train", "test")}
    texts = {side: [fields["text"] for fields in rows] for side, rows in parts.items()}
    labels = {side: [fields["label"] for fields in rows] for side, rows in parts.items()}
    grams = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    model = make_pipeline(grams, LogisticRegression(C=30.0, max_iter=2000)).fit(texts["train"], labels["train"])
    return {"accuracy": float(model.score(texts["test"], labels["test"]))}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds of every figure of the test part, before and after."""
    made: dict[str, Any] = {}
    for when in ("before", "after"):
        for part in ("test", "also", "answers"):
            for name in ("loss", "perplexity", "accuracy", "macro_f1", "exact_match", "rouge_l"):
                values = [run[when][part][name] for run in runs if name in run[when].get(part, {})]
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else None
                    made[f"{when} {part} {name}"] = {"mean": statistics.mean(values), "spread": spread}
    for label, baseline, name in BASELINES:
        values = [run[baseline][name] for run in runs if run.get(baseline)]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            made[label] = {"mean": statistics.mean(values), "spread": spread}
    return made


def in_words(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name in ("accuracy", "macro_f1", "exact_match") else f"{value:.3f}"


def table(document: dict[str, Any]) -> str:
    """What all runs measured on the part that chose nothing, as Markdown: the mean over the seeds, ± the spread."""
    lines = ["| task | seeds | measured | before | after |", "|---|---|---|---|---|"]
    for task, entry in document["tasks"].items():
        figures, seeds = entry["summary"], len(entry["runs"])
        for name in ("test accuracy", "test loss", "test perplexity", "also perplexity", "answers rouge_l"):
            if f"after {name}" not in figures or (name == "test loss" and "after test accuracy" in figures):
                continue
            cells = []
            for when in ("before", "after"):
                mean, spread = figures[f"{when} {name}"]["mean"], figures[f"{when} {name}"]["spread"]
                of = name.split()[1]
                cells.append(in_words(of, mean) + ("" if spread is None else f" ± {in_words(of, spread)}"))
            lines.append(f"| {task} | {seeds} | {name.replace('_', '-')} | {cells[0]} | {cells[1]} |")
        for label, _, name in BASELINES:
            if label in figures:
                lines.append(f"| {task} | {seeds} | {label} | | {in_words(name, figures[label]['mean'])} |")
    return "\n".join(lines)


# A panel of the picture of curves: what was measured of the texts that choose the best weights, and of which tasks.
PANELS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("SMS Spam", "loss, nats", "validation_loss", ("sms-evaluated-often", "sms-stories-lora")),
    ("SMS Spam", "accuracy", "validation_accuracy", ("sms-evaluated-often", "sms-stories-lora")),
    ("Instructions", "loss, nats", "validation_loss", ("instructions", "instructions-q4_1", "instructions-int4")),
)


def draw_curves(document: dict[str, Any]) -> None:
    """What was held out to choose by, over the steps of each run: a line a seed, a colour a task."""
    figure, axes = drawing.subplots(1, len(PANELS), (10.5, 3.0), "What was held out, while training", drawing.LIGHT)
    for ax, (title, unit, name, tasks) in zip(axes, PANELS, strict=True):
        for number, task in enumerate(tasks):
            curves = [run["curve"] for run in document["tasks"].get(task, {"runs": []})["runs"] if "curve" in run]
            for i, curve in enumerate(curves):
                steps, values = zip(*((row["step"], row[name]) for row in curve), strict=True)
                color, label = drawing.LIGHT[f"series{number}"], task if i == 0 else None
                ax.plot(steps, values, "-o", color=color, markersize=2.5, linewidth=1, label=label)
        ax.set(xlabel="step", ylabel=unit)
        ax.set_title(title, **drawing.title_style(drawing.LIGHT))
        if ax.lines:
            ax.legend(fontsize=7.5, frameon=False)
    CURVES.parent.mkdir(exist_ok=True)
    figure.savefig(CURVES, dpi=140)


def write_page() -> None:
    """Puts the table and the curves into the page on fine-tuning."""
    text = PAGE.read_text(encoding="utf-8")
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(readme.with_table(text, "results", table(document)), encoding="utf-8")
    draw_curves(document)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", type=click.Choice(list(TASKS)), multiple=True, help="Only this task; may be repeated.")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="Only this seed; may be repeated.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads (default: what torch chooses).")
@click.option("-q", "--quiet", is_flag=True)
def main(data: Path, only: tuple[str, ...], seeds: tuple[int, ...], threads: int | None, quiet: bool) -> None:
    """Measures fine-tuning on the files in DATA."""
    if threads is not None:
        torch.set_num_threads(threads)
    for name in only or TASKS:
        task = TASKS[name]
        for seed in seeds or range(task.seeds):
            entry = keep(name, task, run(task, data, seed, quiet))
            write_page()
        for figure, values in entry["summary"].items():
            spread = "" if values["spread"] is None else f" ± {values['spread']:.4f}"
            click.echo(f"{name}: {figure} {values['mean']:.4f}{spread}")


def keep(name: str, task: Task, found: dict[str, Any]) -> dict[str, Any]:
    """Puts what a run measured among the results; the task's entry there."""
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"tasks": {}}
    settings = {"model": task.model} | task.settings
    before = document["tasks"].get(name, {})
    others = before["runs"] if before.get("settings") == settings else []
    runs = sorted([run for run in others if run["seed"] != found["seed"]] + [found], key=lambda run: run["seed"])
    entry = {"settings": settings, "facts": facts(), "runs": runs, "summary": summary(runs)}
    document["tasks"][name] = entry
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return entry


if __name__ == "__main__":
    main()
