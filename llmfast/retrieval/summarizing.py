"""Texts of any length made short: at once where they fit, else piece by piece, and then the summaries together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llmfast.inference.arguments import whole_number
from llmfast.retrieval.blocks import Block
from llmfast.retrieval.pieces import pieces_of

if TYPE_CHECKING:
    from llmfast.inference.llm import LLM

SUMMARY_TOKENS = 120
PART_TOKENS = 1500  # of a text that is summarised at once: a small model loses the thread of longer ones
REQUEST = "Summarize the following text in one to three sentences.\n\n{text}"
ROUNDS = 8  # of summaries of summaries, each of which makes a text several times shorter


def summarize(
    llm: LLM,
    text: str,
    max_new_tokens: int = SUMMARY_TOKENS,
    part_tokens: int = PART_TOKENS,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    **settings: Any,
) -> str:
    """A short form of `text`, by a chat model.

    A text of more than `part_tokens` tokens (or than fit the context) is divided at its paragraphs, each part
    summarised, and so again with the summaries until they fit. `progress(stage, done, total)` counts parts. `settings`
    are those of `LLM.chat`; `temperature` is 0 unless given. `ValueError` for a text without words, or a context too
    small for any.
    """
    return "".join(summary_stream(llm, text, max_new_tokens, part_tokens, progress, **settings))


def summary_stream(
    llm: LLM,
    text: str,
    max_new_tokens: int = SUMMARY_TOKENS,
    part_tokens: int = PART_TOKENS,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    **settings: Any,
) -> Iterator[str]:
    """The same, the last summary piece by piece as it is made."""
    if not text.strip():
        raise ValueError("there is no text to summarize")
    tokenizer = llm.need_tokenizer()
    request = len(llm.chat_template.encode([{"role": "user", "content": REQUEST.format(text="")}]))
    room = llm.config.context - request - whole_number("max_new_tokens", max_new_tokens, least=1) - 8
    most = min(whole_number("part_tokens", part_tokens, least=16), room)
    if most < 2 * max_new_tokens and most < 16:
        raise ValueError(f"a context of {llm.config.context} tokens has no room for a text and its summary")
    settings = {"temperature": 0.0} | settings

    def count(part: str) -> int:
        return len(tokenizer.encode(part))

    def reply(part: str) -> Iterator[str]:
        message = {"role": "user", "content": REQUEST.format(text=part)}
        stream: Iterator[str] = llm.chat([message], max_new_tokens, stream=True, **settings)
        return stream

    for round in range(ROUNDS):
        # Pieces are counted by their units: what joins them takes a token more here and there.
        parts = [text] if count(text) <= most else _parts(text, count, most * 9 // 10)
        if len(parts) == 1:
            break
        summaries = []
        for number, part in enumerate(parts):
            progress(f"parts of {'the text' if round == 0 else 'the summaries'}", number, len(parts))
            summaries.append("".join(reply(part)).strip())
        shorter = "\n\n".join(summaries)
        if count(shorter) >= count(text):
            raise ValueError("the model's summaries are no shorter than the text")
        text = shorter
    yield from reply(text)


def _parts(text: str, count: Callable[[str], int], most: int) -> list[str]:
    blocks = [Block(paragraph.strip()) for paragraph in text.split("\n\n") if paragraph.strip()]
    return [piece.text for piece in pieces_of(blocks, count, most, 0)]
