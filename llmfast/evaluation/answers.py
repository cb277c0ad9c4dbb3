"""How well a chat model answers: from memory, from what retrieval finds, and from the right paragraph."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.evaluation.intervals import Mean, mean_of
from llmfast.evaluation.retrieval import Remembering
from llmfast.evaluation.squad import Question, Squad, exact, f1
from llmfast.retrieval.answering import Questions, turn
from llmfast.retrieval.index import Index

if TYPE_CHECKING:
    from llmfast.inference.llm import LLM

WAYS = ("closed book", "retrieval", "right paragraph")
REPLY_TOKENS = 32


@dataclass(frozen=True)
class Answers:
    """What a model said to each question in one of the `WAYS`."""

    questions: Sequence[Question]
    texts: list[str]

    @property
    def exact(self) -> Mean:
        return mean_of([exact(text, q.answers) for text, q in zip(self.texts, self.questions, strict=True)])

    @property
    def f1(self) -> Mean:
        return mean_of([f1(text, q.answers) for text, q in zip(self.texts, self.questions, strict=True)])


def sample_of(questions: Sequence[Any], size: int | None, seed: int = 0) -> list[Any]:
    """All, or `size` of them drawn by the seed, in their order."""
    if size is None or size >= len(questions):
        return list(questions)
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), size))]


def evaluate(
    llm: LLM,
    embedder: Any,
    squad: Squad,
    sample: int | None = None,
    sources: int = 3,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Answers]:
    """The answers in each of the `WAYS`, greedily, to all questions or a sample of them."""
    asked = sample_of(squad.questions, sample)

    def said(question: Question, texts: list[str]) -> str:
        message = {"role": "user", "content": turn(texts, question.text)}
        reply: str = llm.chat([message], REPLY_TOKENS, temperature=0.0)
        return reply.strip()

    found: dict[str, list[str]] = {way: [] for way in WAYS}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        warnings.simplefilter("ignore")
        folder = Path(temporary) / "paragraphs"
        folder.mkdir()
        for number, paragraph in enumerate(squad.paragraphs):
            (folder / f"{number:06}.txt").write_text(paragraph, encoding="utf-8")
        remembering = Remembering(embedder, [question.text for question in asked])
        index = Index(Path(temporary) / "index", remembering)  # type: ignore[arg-type]
        index.add(folder, progress=progress)
        for number, question in enumerate(asked):
            progress("questions", number, len(asked))
            found["closed book"].append(said(question, []))
            made = Questions(llm, index, sources, threshold=0.0).ask(question.text, REPLY_TOKENS, temperature=0.0)
            found["retrieval"].append("".join(made).strip())
            found["right paragraph"].append(said(question, [squad.paragraphs[question.paragraph]]))
        index.close()
    return {way: Answers(asked, texts) for way, texts in found.items()}
