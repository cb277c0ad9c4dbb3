"""A conversation: the messages so far, and the model that answers the last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.chat.template import Message, check_messages
from llmfast.chat.turns import fits, warn_of_dropped, without_oldest
from llmfast.files import write_atomic
from llmfast.inference.arguments import whole_number
from llmfast.inference.sampling import SamplingSettings

if TYPE_CHECKING:
    from llmfast.inference.llm import LLM
    from llmfast.inference.text import TextStream

MOST_BYTES = 64 << 20  # of a file with a conversation


class Conversation:
    """Turns with a model, which sees what was said as it was said: a reply stays the very tokens that the model chose.

    `system` is what the model is told beforehand; `messages` may begin with a conversation that took place elsewhere.
    Each turn begins with all before it, whose keys and values the model still has: only what is new is computed. Where
    the context is full, the oldest turns go, with one warning; `messages` keeps them.

    >>> talk = Conversation(llmfast.load("smollm2"), system="Answer in one word.")  # doctest: +SKIP
    >>> "".join(talk.say("What is the capital of France?", temperature=0))  # doctest: +SKIP
    'Paris'
    """

    def __init__(self, llm: LLM, system: str | None = None, messages: Sequence[Message] = ()):
        self.llm = llm
        self.template = llm.chat_template
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        if messages:
            check_messages(messages)
            self.messages += map(dict, messages)
        self.variables: dict[str, Any] = {}  # of the template's own
        self._dropped = 0  # messages after the system's that the model no longer sees
        self._warned = False
        self._text, self._ids = "", list[int]()  # the chat up to the last reply, as the model has it

    @property
    def system(self) -> str | None:
        """What the model is told beforehand. Setting it starts the conversation anew."""
        first = self.messages[0] if self.messages else {"role": None}
        return first["content"] if first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        self.messages = [] if text is None else [{"role": "system", "content": text}]
        self._dropped = 0

    def reset(self) -> None:
        """Forgets all turns, but not what the system says."""
        self.system = self.system

    def say(self, text: str, max_new_tokens: int = 512, **settings: Any) -> Reply:
        """A user's turn, and the pieces of the model's reply to it.

        `settings` are those of `LLM.chat`. The reply is one of `messages` when its pieces have come, or, as far as it
        came, when it is closed. `ValueError`, and no turn, where the text alone is too long for the context.
        """
        if not isinstance(text, str):
            raise ValueError(f"what a user says must be a string, got {type(text).__name__}")
        self.messages.append({"role": "user", "content": text})
        try:
            return self.answer(max_new_tokens, **settings)
        except ValueError:
            self.messages.pop()
            raise

    def retry(self, max_new_tokens: int = 512, **settings: Any) -> Reply:
        """Another reply to the user's last turn. `ValueError` where there was none."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ValueError("there is nothing to answer yet")
        del self.messages[last + 1 :]
        return self.answer(max_new_tokens, **settings)

    def answer(
        self,
        max_new_tokens: int = 512,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        speculate: int | None = None,
        logprobs: int | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        **settings: Any,
    ) -> Reply:
        """The pieces of the model's reply to `messages` as they are."""
        chosen = SamplingSettings(**settings)
        count = whole_number("max_new_tokens", max_new_tokens, least=0)
        prompt = self._prompt(count)
        stream = self.llm.reply(prompt, count, chosen, stop, seed, speculate, logprobs, json_schema, regex, grammar)
        return Reply(self, stream, prompt)

    def _prompt(self, reply: int) -> list[int]:
        seen, context = self._seen(), self.llm.config.context
        ids = self._encode(seen)
        if not fits(ids, reply, context):
            kept, ids = without_oldest(seen, self._encode, context)
            self._dropped += len(seen) - len(kept)
            if len(kept) < len(seen) and not self._warned:
                warn_of_dropped(context)
                self._warned = True
        return ids

    def _seen(self) -> list[dict[str, Any]]:
        start = 0 if self.system is None else 1
        return [*self.messages[:start], *self.messages[start + self._dropped :]]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a chat; what the model has already stays as it is, where a special token comes next."""
        text, special = self.template.render(messages, **self.variables)
        at = len(self._text)
        if self._text and text.startswith(self._text) and any(start == at for start, _ in special):
            later = [(start - at, end - at) for start, end in special if start >= at]
            return self._ids + self.template.tokenizer.encode(text[at:], later)
        return self.template.tokenizer.encode(text, special)

    def _said(self, prompt: list[int], ids: list[int], text: str) -> None:
        """Notes a reply: its text as a message, and its tokens as what the model has, without the one that ended it."""
        rendered = self.template.render(self._seen(), **self.variables).text
        self.messages.append({"role": "assistant", "content": text})
        ids = ids[:-1] if ids and ids[-1] in self.llm.end_tokens else ids
        tokenizer = self.template.tokenizer
        if tokenizer.decode_bytes(ids) == text.encode():  # not where a stop string or an interruption cut it
            self._text, self._ids = rendered + text, prompt + ids

    def save(self, path: str | Path) -> None:
        """Writes the messages as JSON."""
        write_atomic(path, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1).encode())

    def load(self, path: str | Path) -> None:
        """Takes the messages that `save` has written. `ValueError` names a file that holds none."""
        path = Path(path)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} is larger than a conversation may be ({MOST_BYTES >> 20} MB)")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            messages = document["messages"] if isinstance(document, Mapping) else document
            if messages != []:
                check_messages(messages)
        except (ValueError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} holds no conversation: {error}") from None
        self.messages, self._dropped = list(map(dict, messages)), 0


class Reply:
    """An iterator over the pieces of a reply, which becomes a message of its conversation when it ends, or is closed.

    `stream` is the `TextStream` behind it: its tokens, how many of the prompt's it found computed, and who computes.
    """

    def __init__(self, conversation: Conversation, stream: TextStream, prompt: list[int]):
        self.stream = stream
        self.text = ""
        self._conversation, self._prompt = conversation, prompt
        self._noted = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            piece = next(self.stream)
        except StopIteration:
            self.close()
            raise
        self.text += piece
        return piece

    def close(self) -> None:
        """No more pieces come."""
        self.stream.close()
        if not self._noted:
            self._noted = True
            self._conversation._said(self._prompt, self.stream.ids, self.text)
