"""Questions answered from an index: what is near is put before the model, and named as the answer's sources.

question -> pieces -> is any of them about it? -> as many as fit -> the model's own template -> answer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmfast.chat.conversation import Conversation, Reply
from llmfast.retrieval.index import Hit, Index

if TYPE_CHECKING:
    from llmfast.inference.llm import LLM

# The evidence (`Hit.evidence`) from which on a question is answered: on XQuAD 90 % of the questions whose paragraph is
# in the index have it, and of those whose paragraph was taken out 15 % (docs/retrieval.md).
THRESHOLD = 1.0
SOURCES = 3  # pieces before the model
REPLY_TOKENS = 200
NOT_THERE = "That is not in the documents."
SYSTEM = "Answer the question with a few words copied from the text."
# Turns that show a small model the form: without them SmolLM2 135M writes essays, and its F1 on XQuAD is half.
EXAMPLES = (
    (
        "The Eiffel Tower was completed in 1889 and is 330 metres tall. Gustave Eiffel's company built it for the "
        "World's Fair.",
        "When was the Eiffel Tower completed?",
        "1889",
    ),
    (
        "Bees gather nectar from flowers and turn it into honey, which they store in combs of wax for the winter.",
        "What do bees store in combs of wax?",
        "honey",
    ),
)


@dataclass
class Answer:
    """An iterator over the pieces of an answer, as they are made; `text` is what has come of it.

    `sources` are the numbered pieces that were in the prompt, the first has number 1, and `hits` all that was found.
    `answered` is False where nothing was near enough: the text then says so, and no model was asked.
    """

    question: str
    hits: list[Hit]
    sources: list[Hit]
    prompt: str | None = None  # the turn that the model got
    text: str = ""
    _reply: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    @property
    def answered(self) -> bool:
        return self.prompt is not None

    @property
    def evidence(self) -> float:
        """How much speaks for the documents being about the question, from 0 to 2."""
        return max((hit.evidence for hit in self.hits), default=0.0)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._reply)
        self.text += piece
        return piece

    def close(self) -> None:
        """No more pieces come."""
        if isinstance(self._reply, Reply):
            self._reply.close()


class Questions:
    """A conversation about the documents of an index, whose follow-up questions are understood by what came before.

    `sources` pieces are put before the model at most, fewer where its context is small; below the `threshold` of
    evidence the answer is that it is not in the documents. `where` is as in `Index.search`. `ValueError` for a model
    without a chat template.

    >>> about = Questions(llmfast.load("smollm2"), Index("manuals.index"))  # doctest: +SKIP
    >>> "".join(about.ask("How do I reset it?", temperature=0))  # doctest: +SKIP
    'Hold the button on the back for ten seconds.'
    """

    def __init__(
        self,
        llm: LLM,
        index: Index,
        sources: int = SOURCES,
        threshold: float = THRESHOLD,
        where: Mapping[str, str] | None = None,
    ):
        if sources < 1:
            raise ValueError(f"sources must be at least 1, got {sources}")
        self.llm, self.index, self.threshold, self.where = llm, index, threshold, where
        self.most_sources = sources
        self.conversation = Conversation(llm, SYSTEM, examples())
        self._asked: list[str] = []

    def ask(self, question: str, max_new_tokens: int = REPLY_TOKENS, **settings: Any) -> Answer:
        """The answer, piece by piece; `settings` are those of `LLM.chat`."""
        hits = self.index.search(question, max(5, self.most_sources), self.where)
        if self._asked and _evidence(hits) < self.threshold:
            # It may mean what was asked about before: "And in winter?"
            together = self.index.search(f"{self._asked[-1]} {question}", max(5, self.most_sources), self.where)
            hits = together if _evidence(together) > _evidence(hits) else hits
        if not hits or _evidence(hits) < self.threshold:
            return Answer(question, hits, [], None, "", iter([NOT_THERE]))
        sources = self._fitting(hits[: self.most_sources], question, max_new_tokens)
        prompt = turn([_shown(hit) for hit in sources], question)
        reply = self.conversation.say(prompt, max_new_tokens, **settings)
        self._asked.append(question)
        return Answer(question, hits, sources, prompt, "", reply)

    def _fitting(self, hits: list[Hit], question: str, reply: int) -> list[Hit]:
        """As many of the best as leave the model's context room for its answer, and for what was said before."""
        tokenizer, room = self.llm.need_tokenizer(), self.llm.config.context // 2 - reply
        while len(hits) > 1 and len(tokenizer.encode(turn([_shown(hit) for hit in hits], question))) > room:
            hits = hits[:-1]
        return hits


def ask(llm: LLM, index: Index, question: str, max_new_tokens: int = REPLY_TOKENS, **settings: Any) -> Answer:
    """The whole answer to one question: its `text`, and its `sources`. `temperature` is 0 unless given."""
    answer = Questions(llm, index).ask(question, max_new_tokens, **{"temperature": 0.0} | settings)
    for _ in answer:
        pass
    return answer


def examples() -> list[dict[str, str]]:
    """The turns that every conversation begins with."""
    pairs = [(turn([text], question), answer) for text, question, answer in EXAMPLES]
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def turn(texts: list[str], question: str) -> str:
    """What a user says: the sources, numbered where there are several, and the question."""
    numbered = texts if len(texts) == 1 else [f"[{number}] {text}" for number, text in enumerate(texts, start=1)]
    return "Text: " + "\n\n".join(numbered) + f"\n\nQuestion: {question}"


def _shown(hit: Hit) -> str:
    return f"{hit.found.heading}\n{hit.text}" if hit.found.heading else hit.text


def _evidence(hits: list[Hit]) -> float:
    return max((hit.evidence for hit in hits), default=0.0)
