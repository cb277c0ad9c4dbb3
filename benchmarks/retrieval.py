"""Finding, answering and shortening, measured on public data, as `llmfast eval retrieval`, `qa` and `summaries` do.

    python benchmarks/retrieval.py --squad xquad_en.json --dialogues dialogsum_dev.jsonl --out retrieval.json
    python benchmarks/retrieval.py --squad xquad_en.json --only sentences --out retrieval.json    # adds to the file

XQuAD's English part has 240 paragraphs and 1,190 questions in SQuAD's format, DialogSum's validation split 500 texts.
The part "tuned" teaches the model, with low-rank adapters, the questions about half of the paragraphs, and asks both it
and the model as it was those about the other half. Every part is written when it is done; parts that the file has and
that were not asked for again stay.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llmfast
from llmfast.benchmarking.facts import facts
from llmfast.cli.eval_documents import retrieval_facts
from llmfast.evaluation import answers, summaries
from llmfast.evaluation.squad import Squad, read_squad
from llmfast.files import write_atomic
from llmfast.finetuning.run import finetune
from llmfast.retrieval.answering import turn

PARTS = ("paragraphs", "sentences", "bf16", "int8", "qa", "tuned", "summaries")


TUNING = {
    "epochs": 2.0,
    "lr": 5e-4,
    "validation": 0.1,
    "group": "paragraph",
    "answers": 0,
}  # what differs from `llmfast finetune`'s own


def qa_facts(squad: Path, model: str, sample: int | None, sources: int) -> dict[str, Any]:
    return {"model": model, "sources": sources, "ways": ways(llmfast.load(model), read_squad(squad), sample, sources)}


def ways(llm: llmfast.LLM, squad: Squad, sample: int | None, sources: int) -> dict[str, Any]:
    found = answers.evaluate(llm, llmfast.Embedder("minilm"), squad, sample, sources)
    return {way: {"exact": asdict(made.exact), "f1": asdict(made.f1)} for way, made in found.items()}


def tuned_facts(squad: Path, model: str, sample: int | None, sources: int, seed: int = 0) -> dict[str, Any]:
    whole = read_squad(squad)
    count = len(whole.paragraphs)
    taught = set(random.Random(seed).sample(range(count), count // 2))
    asked = Squad(whole.paragraphs, whole.articles, [q for q in whole.questions if q.paragraph not in taught])
    with tempfile.TemporaryDirectory() as place:
        file, adapter = Path(place, "questions.jsonl"), Path(place, "adapter")
        with open(file, "w", encoding="utf-8") as lines:
            for question in (q for q in whole.questions if q.paragraph in taught):
                asks = {"role": "user", "content": turn([whole.paragraphs[question.paragraph]], question.text)}
                messages = [asks, {"role": "assistant", "content": question.answers[0]}]
                lines.write(json.dumps({"messages": messages, "paragraph": question.paragraph}) + "\n")
        finetune(model, file, adapter, changes=TUNING | {"seed": seed})
        return {
            "model": model,
            "sources": sources,
            "settings": TUNING | {"seed": seed},
            "taught": len(whole.questions) - len(asked.questions),
            "before": ways(llmfast.load(model), asked, sample, sources),
            "after": ways(llmfast.load(model, adapter=adapter), asked, sample, sources),
        }


def summary_facts(dialogues: Path, model: str, sample: int | None) -> dict[str, Any]:
    found = summaries.evaluate(llmfast.load(model), summaries.read_examples(dialogues), sample)
    scores = {who: {kind: asdict(mean) for kind, mean in measured.items()} for who, measured in found.items()}
    return {"model": model, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--dialogues", type=Path)
    parser.add_argument("--model", default="smollm2", help="that answers and summarises")
    parser.add_argument("--sample", type=int, help="questions and dialogues for the model; all where it is not given")
    parser.add_argument("--sources", type=int, default=3, help="pieces before the model")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "paragraphs": lambda: retrieval_facts(options.squad, "minilm", "fp32", False, None),
        "sentences": lambda: retrieval_facts(options.squad, "minilm", "fp32", True, None),
        "bf16": lambda: retrieval_facts(options.squad, "minilm", "bf16", False, None),
        "int8": lambda: retrieval_facts(options.squad, "minilm", "int8", False, None),
        "qa": lambda: qa_facts(options.squad, options.model, options.sample, options.sources),
        "tuned": lambda: tuned_facts(options.squad, options.model, options.sample, options.sources),
    }
    if options.dialogues is not None:
        parts["summaries"] = lambda: summary_facts(options.dialogues, options.model, options.sample)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"parts": {}}
    for name, measure in parts.items():
        if options.only is None or name in options.only:
            record["parts"][name] = measure()
            record["machine"] = facts()
            write_atomic(options.out, json.dumps(record, indent=1).encode())
            print(name, "done", flush=True)


if __name__ == "__main__":
    main()
