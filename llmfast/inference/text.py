"""From tokens to text, as far as it is certain: pieces end at whole characters and before stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Generator
from types import TracebackType
from typing import Any

from torch import Tensor

from llmfast.tokenizers import Tokenizer


class TextStream:
    """An iterator over pieces of new text.

    `tokens` counts the tokens made so far; `how` says who makes them, in which precision, and where. `close`, or the
    end of a `with` block, ends the text early and gives the decoder's memory free.
    """

    def __init__(self, steps: Generator[Tensor, None, None], writer: TextWriter, how: str):
        self.tokens = 0
        self.how = how
        self._steps = steps
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

    def close(self) -> None:
        """No more pieces come; what was held back is not shown."""
        self._pieces.close()
        self._steps.close()

    def _run(self, writer: TextWriter) -> Generator[str, None, None]:
        for tokens in self._steps:
            self.tokens += 1
            if piece := writer.push(int(tokens[0])):
                yield piece
            if writer.finished:
                self._steps.close()
        if piece := writer.close():
            yield piece


class TextWriter:
    """Turns one row's tokens into text as far as it is certain, and notices where the text ends."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.tokenizer = tokenizer
        self.stop = stop
        self.finished = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that may turn out to begin a stop string

    def push(self, token: int) -> str:
        """The text that has become certain with `token`."""
        if self.finished:
            return ""
        if token == self.tokenizer.end_of_text:
            text = self.close()
            self.finished = True
            return text
        return self._release(self._utf8.decode(self.tokenizer.decode_bytes([token])), final=False)

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
