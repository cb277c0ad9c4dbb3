"""Documents to token ids, in several processes, in the order in which they came."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from llmfast.documents import Part
from llmfast.tokenizers import Tokenizer

BATCH = 1 << 20  # characters that a process is given at once
AHEAD = 3  # batches for each process that wait or are done, at most: what bounds the memory
Batch = list[tuple[str, Part]]  # parts with their sides


@dataclass(frozen=True)
class Encoded:
    """Tokens of one side: ids (n,), and which of them are targets (n,) bool where that was asked for."""

    side: str
    tokens: np.ndarray
    mask: np.ndarray | None
    bytes: int  # UTF-8, of the text that is to be learned
    prompt_bytes: int


@dataclass(frozen=True)
class Encoder:
    tokenizer: Tokenizer
    dtype: str
    masked: bool

    def __call__(self, batch: Batch) -> list[Encoded]:
        """The tokens of a batch, a piece for each side in it; an end-of-text after every document."""
        pieces = []
        for side in dict.fromkeys(side for side, _ in batch):
            ids: list[int] = []
            prompts: list[slice] = []
            learned = seen = 0
            for part in [part for of, part in batch if of == side]:
                if part.prompt:
                    start = len(ids)
                    ids += self.tokenizer.encode(part.prompt)
                    prompts.append(slice(start, len(ids)))
                ids += self.tokenizer.encode(part.text)
                if part.ends and self.tokenizer.end_of_text is not None:
                    ids.append(self.tokenizer.end_of_text)
                learned += len(part.text.encode())
                seen += len(part.prompt.encode())
            mask = np.ones(len(ids), dtype=bool) if self.masked else None
            if mask is not None:
                for prompt in prompts:
                    mask[prompt] = False
            pieces.append(Encoded(side, np.array(ids, dtype=self.dtype), mask, learned, seen))
        return pieces


def encode_all(parts: Iterable[tuple[str, Part]], encoder: Encoder, workers: int) -> Iterator[Encoded]:
    """The tokens of all parts, in order: they do not depend on `workers`, the number of processes.

    A text that fills one batch only is encoded here.
    """
    batches = _batches(parts)
    begun = list(itertools.islice(batches, 2))
    batches = itertools.chain(begun, batches)
    if workers == 1 or len(begun) < 2:
        for batch in batches:
            yield from encoder(batch)
        return
    # A forked process has the encoder at once, and does not import the caller's main module again. It runs no torch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(encoder,))
    try:
        futures: deque[Future[list[Encoded]]] = deque()
        for batch in batches:
            futures.append(pool.submit(_encode, batch))
            if len(futures) >= AHEAD * workers:
                yield from futures.popleft().result()
        while futures:
            yield from futures.popleft().result()
    except BrokenProcessPool:
        raise MemoryError("an encoding process was killed, perhaps for want of memory: try fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(parts: Iterable[tuple[str, Part]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for side, part in parts:
        batch.append((side, part))
        size += len(part.prompt) + len(part.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encoder: Encoder  # of a process that encodes


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed does not end its processes; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(batch: Batch) -> list[Encoded]:
    return _encoder(batch)
