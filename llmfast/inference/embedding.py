"""`Embedder`: texts to vectors, near to one another where the texts mean the same.

texts -> tokenizer -> ids, sorted by length, in batches -> encoder -> a vector a token -> pooling -> a vector a text
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast.inference.execution import EncoderRunner, chosen_backend, device_of
from llmfast.inference.pooling import Pooling, read_pooling
from llmfast.tokenizers import Tokenizer, load_tokenizer
from llmfast.tokenizers.model_files import CONFIG
from llmfast.tokenizers.protocol import read_json
from llmfast.weights.checkpoint import stream
from llmfast.weights.locate import locate_model


class Embedder:
    """A model that gives each text a vector of `width` numbers: an encoder such as "minilm", or any language model,
    whose last hidden states are taken.

    `name` is one that `llmfast get` has brought, a directory, a file, or a name on the hub. `pooling` ("mean", "first"
    or "last" of the tokens) and `max_tokens` default to what the model's files say, else to the mean of as many as its
    context holds. `precision` is "fp32" or "bf16", on a GPU also "fp16", and for an encoder on a CPU, where it runs on
    packed weights in C++, also "int8"; `device` and `backend` as in `llmfast.load`. Vectors of length 1, which all are
    but where a model's files say otherwise, have their cosine as their product.

    >>> embed = llmfast.Embedder("minilm").embed  # doctest: +SKIP
    >>> round(float(embed("A dog barks.") @ embed("The hound is loud.")), 2)  # doctest: +SKIP
    0.54
    """

    def __init__(
        self,
        name: str | Path = "minilm",
        pooling: str | None = None,
        max_tokens: int | None = None,
        precision: str = "fp32",
        device: str | torch.device = "auto",
        backend: str | Mapping[str, str] = "auto",
    ):
        place = device_of(device)
        source = stream(locate_model(name))
        tokenizer = load_tokenizer(source.path)
        if tokenizer is None:
            raise ValueError(f"{name} has no tokenizer, which an embedder needs")
        if tokenizer.vocab_size > source.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {source.config.vocab_size}"
            )
        self.name, self.precision, self.backend = str(name), precision, backend
        self.tokenizer, self.config = tokenizer, source.config
        said = read_pooling(source.directory)
        context = min(said.max_tokens or source.config.context, source.config.context)
        self.max_tokens = context if max_tokens is None else max_tokens
        if not 3 <= self.max_tokens <= source.config.context:
            raise ValueError(f"max_tokens must be 3 to {source.config.context}, the model's context, got {max_tokens}")
        self.pooling = Pooling(said.kind if pooling is None else pooling, said.normalised)
        self._before, self._after = _around(tokenizer, source.directory, source.config.generates)
        with chosen_backend(backend):
            self._runner = EncoderRunner(source, precision, place)
        self.device = place

    def __repr__(self) -> str:
        return f"Embedder({self.name!r}, {self.width} numbers, {self.precision} on {self.device})"

    @property
    def width(self) -> int:
        """C, how many numbers a vector has."""
        return self.config.width

    def count(self, text: str) -> int:
        """How many tokens a text takes, of the `max_tokens` that are looked at."""
        return len(self._before) + len(self.tokenizer.encode(text)) + len(self._after)

    def embed(
        self, texts: str | Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Tensor:
        """The vectors of `texts`, (N, C) float32 on the CPU; of a single string (C,).

        Of a text longer than `max_tokens` only the beginning counts, with a warning. `progress(done, total)` counts
        texts. `ValueError` for what is no text, or an empty one to a model that puts no token before it.
        """
        if isinstance(texts, str):
            return self.embed([texts], progress)[0]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"texts must be strings, got {type(text).__name__}")
        rows = [self._encode(text) for text in texts]
        cut = sum(len(row) > self.max_tokens for row in rows)
        if cut:
            warnings.warn(
                f"{cut} of {len(rows)} texts are longer than {self.max_tokens} tokens: only their beginning counts",
                stacklevel=2,
            )
            rows = [row if len(row) <= self.max_tokens else self._shortened(row) for row in rows]
        vectors = torch.empty(len(rows), self.width)
        done = 0
        with torch.inference_mode(), chosen_backend(self.backend):
            encoder = self._runner.encoder()
            for batch in batches([len(row) for row in rows], encoder.tokens_at_once):
                vectors[batch] = encoder.encode([rows[i] for i in batch], self.pooling)
                done += len(batch)
                progress(done, len(rows))
        return vectors

    def _encode(self, text: str) -> list[int]:
        row = [*self._before, *self.tokenizer.encode(text), *self._after]
        if not row:
            raise ValueError(f"{self.name} puts no token before a text, so an empty one has no vector")
        return row

    def _shortened(self, row: list[int]) -> list[int]:
        return row[: self.max_tokens - len(self._after)] + self._after


def batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """The numbers of texts that go together, from the longest on: of nearly equal lengths, so that little is padding,
    and each batch of `tokens_at_once` tokens at most, or one text."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, tokens_at_once // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _around(tokenizer: Tokenizer, directory: Path, generates: bool) -> tuple[list[int], list[int]]:
    """The ids that the model expects before and after every text: BERT's [CLS] and [SEP], or what begins a text."""
    if generates:
        return ([] if tokenizer.start_of_text is None else [tokenizer.start_of_text]), []
    config = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    vocabulary: Any = tokenizer.special_tokens | getattr(tokenizer, "vocab", {})
    ids = []
    for role, usual in (("cls_token", "[CLS]"), ("sep_token", "[SEP]")):
        named = config.get(role, usual)
        token = named.get("content") if isinstance(named, dict) else named
        if token not in vocabulary:
            raise ValueError(f"the vocabulary in {directory} lacks {token}, which an encoder puts around a text")
        ids.append(vocabulary[token])
    return [ids[0]], [ids[1]]
