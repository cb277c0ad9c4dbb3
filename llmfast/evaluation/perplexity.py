"""How well a model predicts a text: nats a token, perplexity, and bits a byte.

A file is one running text (`text_perplexity`), or a collection of documents that each begin anew
(`document_perplexity`). Either way every token is predicted once, from what stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmfast.inference.decoders import NativeModel
from llmfast.inference.generation import LLM
from llmfast.inference.scoring import TOKENS_AT_ONCE, Window, predictions, windows
from llmfast.models import LanguageModel
from llmfast.tokenizers import Tokenizer

Progress = Callable[[int, int], object]  # tokens done, tokens in all


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
    with llm.using_backend():
        nats, tokens = _total(llm.native() or llm.model, pieces, TOKENS_AT_ONCE, progress)
    return _checked(nats, tokens, size)


def documents_perplexity(
    llm: LLM, documents: Sequence[str], stride: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """`document_perplexity` of texts, by whoever runs the model."""
    tokenizer = llm.need_tokenizer()
    encoded = [(tokenizer.encode(document), len(document.encode())) for document in documents]
    if (end := llm.start_token) is None:
        encoded = [(ids, size - len(tokenizer.decode_bytes(ids[:1]))) for ids, size in encoded]
    with llm.using_backend():
        return document_perplexity(llm.native() or llm.model, encoded, end, stride=stride, progress=progress)


def document_perplexity(
    model: LanguageModel | NativeModel,
    documents: Sequence[tuple[Sequence[int], int]],
    end_of_text: int | None,
    tokens_per_batch: int = TOKENS_AT_ONCE,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Scores each document alone: a list of (token ids, length in bytes).

    A document is predicted from its start, after one end-of-text token, and its own end-of-text is predicted too (its
    nats count, its bytes do not). With None for `end_of_text` a document's first token is context only, and nothing is
    predicted after its last. A document longer than the context is scored in windows `stride` tokens apart, by default
    in blocks that share no context.
    """
    pieces: list[Window] = []
    for ids, _ in documents:
        sequence = ids if end_of_text is None else [end_of_text, *ids, end_of_text]
        pieces += windows(sequence, model.config.context, stride)
    nats, tokens = _total(model, pieces, tokens_per_batch, progress)
    return _checked(nats, tokens, sum(length for _, length in documents))


def loses_text(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer can't give `text` back: bits a byte then do not pay for all of it, which flatters."""
    return tokenizer.decode_bytes(tokenizer.encode(text)) != text.encode()


def _total(
    model: LanguageModel | NativeModel, pieces: Sequence[Window], tokens_per_batch: int, progress: Progress | None
) -> tuple[float, int]:
    """The nats and the number of the tokens predicted."""
    nats, tokens = 0.0, 0
    for _, prediction in predictions(model, pieces, tokens_per_batch, progress):
        nats -= float(prediction.log_probabilities.double().sum())
        tokens += len(prediction.log_probabilities)
    return nats, tokens


def _checked(nats: float, tokens: int, size: int) -> Perplexity:
    if tokens == 0:
        raise ValueError("the text is too short: it has no token to predict")
    return Perplexity(nats, tokens, size)
