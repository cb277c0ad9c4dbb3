"""From tokens to text, as far as it is certain: pieces end at whole characters and before stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Generator
from types import TracebackType
from typing import Any

from llmfast.inference.constraint import Constraint
from llmfast.inference.decoding import Decoding
from llmfast.inference.generation import Choice
from llmfast.tokenizers import Tokenizer


class TextStream:
    """An iterator over pieces of new text.

    `ids` are the tokens made so far, `tokens` counts them; `how` says who makes them, in which precision, and where.
    `prompt_tokens` is the length of the prompt, of which `reused` tokens were held from an earlier text. `choices` say
    how likely the tokens were, where that was asked for. `close`, or the end of a `with` block, ends the text early and
    gives the decoder's memory free.
    """

    def __init__(self, decoding: Decoding, writer: TextWriter):
        self.ids: list[int] = []
        self.how = decoding.how
        self.prompt_tokens = decoding.prompt_tokens
        self.reused = 0
        self._decoding = decoding
        self._steps = decoding.steps
        self.choices: list[Choice] = [] if decoding.observer is None else decoding.observer.choices[0]
        self._pieces = self._run(writer)

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def close(self) -> None:
        """No more pieces come; what was held back is not shown."""
        self._pieces.close()
        self._steps.close()

    def _run(self, writer: TextWriter) -> Generator[str, None, None]:
        for tokens in self._steps:
            if not self.ids:
                self.reused = self._decoding.decoder.kept  # before another text has the decoder
            self.ids.append(int(tokens[0]))
            if self._decoding.observer is not None:
                self._decoding.observer.note(0)
            if piece := writer.push(int(tokens[0])):
                yield piece
            if writer.finished:
                self._steps.close()
        if piece := writer.close():
            yield piece


class TextWriter:
    """Turns one row's tokens into text as far as it is certain, and notices where the text ends: at a token in `ends`,
    before a string in `stop`, or where its form is complete."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: list[str],
        ends: Collection[int] | None = None,
        constraint: Constraint | None = None,
    ):
        self.tokenizer, self.constraint = tokenizer, constraint
        self.stop = stop
        self.ends = tokenizer.end_tokens if ends is None else ends
        self.finished = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that may turn out to begin a stop string

    def push(self, token: int) -> str:
        """The text that has become certain with `token`."""
        if self.finished:
            return ""
        if token in self.ends:
            text = self.close()
            self.finished = True
            return text
        complete = self.constraint is not None and self.constraint.complete
        text = self._release(self._utf8.decode(self.tokenizer.decode_bytes([token])), final=complete)
        self.finished |= complete
        return text

    def close(self) -> str:
        """What was held back, when no more tokens come. A character of which only some bytes came is left out."""
        return "" if self.finished else self._release("", final=True)

    def _release(self, text: str, final: bool) -> str:
        text = self._held + text
        self._held = ""
        found = [position for stop in self.stop if (position := text.find(stop)) >= 0]
        if found:
            self.finished = True
            return text[: min(found)]
        if not final:
            keep = max((_overlap(text, stop) for stop in self.stop), default=0)
            if keep:
                text, self._held = text[:-keep], text[-keep:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stop_strings(stop: Any) -> list[str]:
    """None, a string or several as a list. `ValueError` for anything else, and for an empty string."""
    strings = [] if stop is None else list(stop) if isinstance(stop, (list, tuple, set)) else [stop]
    if any(not isinstance(text, str) or not text for text in strings):
        raise ValueError(f"stop must be non-empty strings, got {stop!r}")
    return strings
