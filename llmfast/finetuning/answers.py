"""What a model answers to held-out chats, before it was tuned and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmfast.evaluation.overlap import exact_match, rouge_l
from llmfast.finetuning.examples import Example
from llmfast.inference.llm import LLM
from llmfast.inference.sampling import SamplingSettings
from llmfast.tokenizers import Tokenizer


@dataclass(frozen=True)
class Question:
    """A chat up to the last turn of the assistant, and what that turn was."""

    prompt: list[int]
    text: str  # of the prompt
    expected: str
    place: str


@dataclass(frozen=True)
class Answer:
    """To one question, greedily."""

    question: Question
    before: str
    after: str


def question_of(example: Example, tokenizer: Tokenizer) -> Question:
    """The last run of tokens that count is the answer; what ends its turn is no part of its text."""
    ids, counts = example.sequence()
    last = len(counts) - 1 - counts[::-1].index(True)
    first = last
    while counts[first - 1]:
        first -= 1
    answer = [token for token in ids[first : last + 1] if token not in tokenizer.end_tokens]
    return Question(ids[:first], tokenizer.decode(ids[:first]), tokenizer.decode(answer).strip(), example.place)


def questions(examples: Sequence[Example], tokenizer: Tokenizer, most: int) -> list[Question]:
    """Of the first `most` examples that have an answer."""
    return [question_of(example, tokenizer) for example in examples if example.counted][:most]


def answer(llm: LLM, question: Question, max_new_tokens: int) -> str:
    """Greedily, by the text of the prompt as it was trained on."""
    return "".join(llm.reply(question.prompt, max_new_tokens, SamplingSettings(temperature=0))).strip()


def overlap(answers: Sequence[str], asked: Sequence[Question]) -> dict[str, float]:
    """Exact match and ROUGE-L, the means over all answers."""
    pairs = list(zip(answers, asked, strict=True))
    return {
        "exact_match": sum(exact_match(given, question.expected) for given, question in pairs) / len(pairs),
        "rouge_l": sum(rouge_l(given, question.expected) for given, question in pairs) / len(pairs),
    }
