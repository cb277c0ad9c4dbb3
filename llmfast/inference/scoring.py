"""How likely a model finds tokens that are given: teacher-forced log-probabilities, by any decoder.

tokens -> windows -> batches -> logits -> the log-probability of every token

Everything that measures a model stands on this: `LLM.score`, perplexity, minimal pairs, other people's harnesses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast.inference.decoders import KeepingDecoder, Reader
from llmfast.inference.decoders.keeping import QUERIES_PER_TASK
from llmfast.inference.decoders.native import MOST_ROWS
from llmfast.inference.finite import NonFiniteLogits, are_finite
from llmfast.threads import fork_safe_torch

TOKENS_AT_ONCE = 8192  # of a batch, padding included
LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB of float32
Progress = Callable[[int, int], object]  # tokens done, tokens in all


@dataclass(frozen=True)
class Window:
    """Neighbouring tokens, at most a context and one. Those from index `first` on are predicted, each from all that
    stand before it; those before `first`, at least one, are context only."""

    ids: Sequence[int]
    first: int = 1


@dataclass(frozen=True)
class Prediction:
    """What a model says of a window's predicted tokens: (len(ids) - first,) each, on the CPU."""

    log_probabilities: Tensor  # float32, natural logarithms
    likeliest: Tensor  # bool: is no other token likelier?


def windows(sequence: Sequence[int], context: int, stride: int | None = None) -> list[Window]:
    """Windows that together predict every token of `sequence` but the first exactly once.

    A window begins `stride` tokens after the one before it, and predicts what that one did not. A token is so predicted
    from all tokens before it or, further in, from at least `context` - `stride` + 1 and at most `context` of them. By
    default the stride is the context: blocks that overlap only by the token that begins the next one.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"the stride must be from 1 to the context of {context} tokens, got {stride}")
    made = []
    start, predicted = 0, 1
    while predicted < len(sequence):
        ids = sequence[start : start + context + 1]
        made.append(Window(ids, predicted - start))
        start, predicted = start + stride, start + len(ids)
    return made


def half_overlapping(context: int) -> int:
    """The stride at which every token sees at least half a context, at twice the work of blocks."""
    return context - max(1, context // 2) + 1


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, about `tokens` tokens a batch, so that little is padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def predictions(
    reader: Reader,
    windows: Sequence[Window],
    tokens_per_batch: int = TOKENS_AT_ONCE,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Prediction]]:
    """(index, prediction) of every window, in the order that is best for batches.

    Runs under the backends chosen around it. `progress(done, total)` hears of tokens predicted. `NonFiniteLogits` where
    the model gives no probabilities.
    """
    lengths = [len(window.ids) - 1 for window in windows]
    total, done = sum(len(window.ids) - window.first for window in windows), 0
    for batch in batches(lengths, tokens_per_batch):
        chosen = [windows[index] for index in batch]
        targets = torch.tensor([token for window in chosen for token in window.ids[window.first :]])
        chances, likeliest = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
        start = 0
        for logits in batch_logits(reader, chosen):
            rows = slice(start, start + len(logits))
            target = targets[rows, None].to(logits.device)
            chances[rows] = log_probabilities(logits, target)
            likeliest[rows] = (logits.gather(1, target)[:, 0] >= logits.amax(dim=-1)).cpu()
            start = rows.stop
        sizes = [len(window.ids) - window.first for window in chosen]
        yield from zip(batch, map(Prediction, chances.split(sizes), likeliest.split(sizes)), strict=True)
        done += len(targets)
        if progress is not None:
            progress(done, total)


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Of the targets (n, 1) int64 by the logits (n, V) float32: (n,) on the CPU. `NonFiniteLogits` where they give
    none."""
    with fork_safe_torch():
        if not bool(are_finite(logits).all()):
            raise NonFiniteLogits("they give no probabilities")
        return torch.log_softmax(logits, dim=-1).gather(1, targets)[:, 0].cpu()


def rows_at_once(vocabulary: int) -> int:
    """Of logits."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def step_of(vocabulary: int) -> int:
    """How many tokens a text that is scored alone takes at once: whole tasks of queries (see `same_bits`)."""
    return max(1, min(MOST_ROWS, rows_at_once(vocabulary)) // QUERIES_PER_TASK) * QUERIES_PER_TASK


@torch.inference_mode()
def score_on(decoder: KeepingDecoder, sequence: list[int]) -> Tensor:
    """The log-probabilities of the tokens of `sequence` after the first, (len(sequence) - 1,) float32, of which the
    decoder remembers those that it has scored before, and computes the rest."""
    targets = torch.tensor(sequence[1:])
    remembered, rest = decoder.read_on(sequence[:-1], step_of(decoder.model.config.vocab_size))
    found, start = [remembered], len(remembered)
    for logits in rest:
        found.append(log_probabilities(logits, targets[start : start + len(logits), None]))
        start += len(logits)
    scored = torch.cat(found)
    decoder.log_probabilities = scored[:-1]
    return scored


def batch_logits(reader: Reader, batch: Sequence[Window]) -> Iterator[Tensor]:
    """The logits (n, V) float32 that predict the windows' tokens, one window after the other, some rows at a time."""
    rows = rows_at_once(reader.config.vocab_size)
    yield from reader.read([list(window.ids[:-1]) for window in batch], [window.first - 1 for window in batch], rows)
