"""How near summaries are to those that people wrote: ROUGE (Lin, 2004), by the library `rouge-score`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmfast.documents import Source
from llmfast.evaluation.answers import sample_of
from llmfast.evaluation.intervals import Mean, mean_of
from llmfast.retrieval.summarizing import summarize

if TYPE_CHECKING:
    from llmfast.inference.llm import LLM

KINDS = ("rouge1", "rouge2", "rougeL")
TURNS = 3  # of a dialogue, or lines of a text: the baseline


@dataclass(frozen=True)
class Example:
    text: str
    summary: str


def read_examples(path: Path) -> list[Example]:
    """The lines of a .jsonl file: `{"dialogue" or "text": …, "summary": …}`. `ValueError` names a line without."""
    examples = []
    for number, record in Source(path, None, path.stat().st_size).records():
        text = record.get("dialogue", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(text, str) or not isinstance(record.get("summary"), str):
            raise ValueError(f'{path}, line {number}: needs a string "dialogue" or "text", and "summary"')
        examples.append(Example(text, record["summary"]))
    if not examples:
        raise ValueError(f"{path} holds no lines of {json.dumps({'text': '…', 'summary': '…'}, ensure_ascii=False)}")
    return examples


def rouge(texts: Sequence[str], right: Sequence[str]) -> dict[str, Mean]:
    """The F-measures of ROUGE-1, -2 and -L, stemmed. `ValueError` where the library is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError('ROUGE needs rouge-score: pip install -e ".[eval]"') from None
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    scores = [scorer.score(target, text) for text, target in zip(texts, right, strict=True)]
    return {kind: mean_of([score[kind].fmeasure for score in scores]) for kind in KINDS}


def first_turns(text: str) -> str:
    return "\n".join(text.strip().split("\n")[:TURNS])


def evaluate(
    llm: LLM,
    examples: Sequence[Example],
    sample: int | None = None,
    max_new_tokens: int = 60,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, dict[str, Mean]]:
    """ROUGE of the model's summaries, and of the baseline, the first three lines of each text."""
    chosen = sample_of(examples, sample)
    summaries = []
    for number, example in enumerate(chosen):
        progress("summaries", number, len(chosen))
        summaries.append(summarize(llm, example.text, max_new_tokens))
    right = [example.summary for example in chosen]
    return {"model": rouge(summaries, right), "baseline": rouge([first_turns(e.text) for e in chosen], right)}
