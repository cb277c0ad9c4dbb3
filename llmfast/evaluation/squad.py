"""Questions about paragraphs, as SQuAD has them (Rajpurkar et al., 2016), and how near an answer is to a right one."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Question:
    """`answers` are the right ones, the first of which begins at character `start` of paragraph number `paragraph`."""

    text: str
    paragraph: int
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class Squad:
    paragraphs: list[str]
    articles: list[int]  # of each paragraph, the number of its article
    questions: list[Question]


def read_squad(path: Path) -> Squad:
    """Reads `{"data": [{"paragraphs": [{"context": …, "qas": […]}]}]}`; questions without an answer are left out.

    `ValueError` names a file that is no such thing.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES >> 20} MB")
    paragraphs: list[str] = []
    articles: list[int] = []
    questions: list[Question] = []
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        for number, article in enumerate(document["data"]):
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    found = [(str(answer["text"]), int(answer["answer_start"])) for answer in asked["answers"]]
                    if found:
                        right = tuple(text for text, _ in found)
                        questions.append(Question(str(asked["question"]), len(paragraphs), right, found[0][1]))
                paragraphs.append(str(paragraph["context"]))
                articles.append(number)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not in SQuAD's format: {error!r}") from None
    if not questions:
        raise ValueError(f"{path} holds no questions with answers")
    return Squad(paragraphs, articles, questions)


def exact(answer: str, right: tuple[str, ...]) -> float:
    """1 where the answer is one of the right ones, but for case, punctuation and articles; else 0."""
    return float(any(_words(answer) == _words(one) for one in right))


def f1(answer: str, right: tuple[str, ...]) -> float:
    """The harmonic mean of precision and recall of the answer's words, beside the nearest of the right ones."""
    return max(_f1(_words(answer), _words(one)) for one in right)


def _f1(found: list[str], right: list[str]) -> float:
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else float(found == right)


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
