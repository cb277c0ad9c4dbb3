"""How well a model predicts a text: nats a token, perplexity, and bits a byte.

A file is one running text (`text_perplexity`), or a collection of documents that each begin anew
(`document_perplexity`). Either way every token is predicted once, from what stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmfast.inference.decoders import Reader
from llmfast.inference.llm import LLM
from llmfast.inference.scoring import TOKENS_AT_ONCE, Prediction, Progress, Window, predictions, windows
from llmfast.tokenizers import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """The total surprise of a text, and the counts to state it by."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as nats a token is not."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.inf


def text_perplexity(llm: LLM, text: str, stride: int | None = None, progress: Progress | None = None) -> Perplexity:
    """One running text, in windows of the model's context that begin `stride` tokens apart (see `scoring.windows`; by
    default blocks that share no context).

    The first token is predicted from end-of-text where the tokenizer has one. Otherwise it is context only: neither it
    nor its bytes count. `ValueError` where that leaves nothing to predict.
    """
    tokenizer = llm.need_tokenizer()
    ids, size = tokenizer.encode(text), len(text.encode())
    if (start := llm.start_token) is None:
        size -= len(tokenizer.decode_bytes(ids[:1]))
    pieces = windows(ids if start is None else [start, *ids], llm.config.context, stride)
    return _perplexity(llm.predictions(pieces, progress=progress), size)


def documents_perplexity(
    llm: LLM, documents: Sequence[str], stride: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """`document_perplexity` of texts, by an `LLM`."""
    tokenizer = llm.need_tokenizer()
    encoded = [(tokenizer.encode(document), len(document.encode())) for document in documents]
    if (end := llm.start_token) is None:
        encoded = [(ids, size - len(tokenizer.decode_bytes(ids[:1]))) for ids, size in encoded]
    pieces = document_windows(encoded, end, llm.config.context, stride)
    return _perplexity(llm.predictions(pieces, progress=progress), sum(size for _, size in encoded))


def document_perplexity(
    reader: Reader,
    documents: Sequence[tuple[Sequence[int], int]],
    end_of_text: int | None,
    tokens_per_batch: int = TOKENS_AT_ONCE,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Scores each document alone: a list of (token ids, length in bytes). Runs under the backends chosen around it.

    A document is predicted from its start, after one end-of-text token, and its own end-of-text is predicted too (its
    nats count, its bytes do not). With None for `end_of_text` a document's first token is context only, and nothing is
    predicted after its last. A document longer than the context is scored in windows `stride` tokens apart, by default
    in blocks that share no context.
    """
    pieces = document_windows(documents, end_of_text, reader.config.context, stride)
    return _perplexity(predictions(reader, pieces, tokens_per_batch, progress), sum(size for _, size in documents))


def document_windows(
    documents: Sequence[tuple[Sequence[int], int]], end_of_text: int | None, context: int, stride: int | None
) -> list[Window]:
    """The windows of every document, from an end-of-text to its own."""
    sequences = (ids if end_of_text is None else [end_of_text, *ids, end_of_text] for ids, _ in documents)
    return [window for sequence in sequences for window in windows(sequence, context, stride)]


def loses_text(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer can't give `text` back: bits a byte then do not pay for all of it, which flatters."""
    return tokenizer.decode_bytes(tokenizer.encode(text)) != text.encode()


def _perplexity(predicted: Iterable[tuple[int, Prediction]], size: int) -> Perplexity:
    """Of a text of `size` bytes, from all its predictions."""
    nats, tokens = 0.0, 0
    for _, prediction in predicted:
        nats -= float(prediction.log_probabilities.double().sum())
        tokens += len(prediction.log_probabilities)
    if tokens == 0:
        raise ValueError("the text is too short: it has no token to predict")
    return Perplexity(nats, tokens, size)
