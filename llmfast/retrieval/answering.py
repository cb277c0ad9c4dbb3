"""Questions answered from an index: what is near is put before the model, and named as the answer's sources.

question -> pieces -> their sentences -> is any about it? -> as many pieces as fit -> the model's own template -> answer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmfast.chat.conversation import Conversation, Reply
from llmfast.retrieval.index import Hit, Index

if TYPE_CHECKING:
    from llmfast.inference.llm import LLM

# The evidence (`Hit.evidence`, after `Index.look_closer`) from which on a question is answered: on XQuAD 94 % of the
# questions whose paragraph is in the index have it, of those whose paragraph was taken out 19 %, and 2 % of those whose
# article was (docs/retrieval.md).
THRESHOLD = 1.02
SOURCES = 3  # pieces before the model at most
RELEVANT = 0.6  # of the best one's evidence, which a piece needs to stand beside it: a small model answers from any
REPLY_TOKENS = 200
STOP = "\n\n"  # an answer is a paragraph: SmolLM2 135M says the same again in the next, to the last token
NOT_THERE = "That is not in the documents."


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
        self.conversation = Conversation(llm)
        self._asked: list[str] = []

    def ask(self, question: str, max_new_tokens: int = REPLY_TOKENS, **settings: Any) -> Answer:
        """The answer, piece by piece, a paragraph unless `stop` says otherwise; `settings` are those of `LLM.chat`."""
        hits = self._found(question)
        if self._asked and _evidence(hits) < self.threshold:
            # It may mean what was asked about before: "And in winter?"
            together = self._found(f"{self._asked[-1]} {question}")
            hits = together if _evidence(together) > _evidence(hits) else hits
        if not hits or _evidence(hits) < self.threshold:
            return Answer(question, hits, [], None, "", iter([NOT_THERE]))
        near = [hit for hit in hits if hit.evidence >= RELEVANT * _evidence(hits)]
        sources = self._fitting(near[: self.most_sources], question, max_new_tokens)
        prompt = turn([_shown(hit) for hit in sources], question)
        settings["stop"] = settings.get("stop") or STOP
        reply = self.conversation.say(prompt, max_new_tokens, **settings)
        self._asked.append(question)
        return Answer(question, hits, sources, prompt, "", reply)

    def _found(self, question: str) -> list[Hit]:
        return self.index.look_closer(question, self.index.search(question, max(5, self.most_sources), self.where))

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


def turn(texts: list[str], question: str) -> str:
    """What a user says: the sources, numbered where there are several, and the question.

    Nothing else: asked for a few words, or shown two examples of short answers, SmolLM2 135M answered with what the
    examples said.
    """
    numbered = texts if len(texts) == 1 else [f"[{number}] {text}" for number, text in enumerate(texts, start=1)]
    return "\n\n".join([*numbered, f"Question: {question}"])


def _shown(hit: Hit) -> str:
    return f"{hit.found.heading}\n{hit.text}" if hit.found.heading else hit.text


def _evidence(hits: list[Hit]) -> float:
    return max((hit.evidence for hit in hits), default=0.0)
