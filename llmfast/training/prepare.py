"""Files to prepared data: documents, divided into training and validation, as shards of token ids.

Three passes over the files, each a stream: one counts the documents and takes their hashes, one trains the tokenizer
on the training documents (where it is not given), and one encodes, in several processes. What comes out depends on the
files and the arguments, not on the number of processes. It is made in a directory beside the one that was named, which
takes its place when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llmfast.documents import Source, find_sources
from llmfast.files import file_sha256, write_atomic
from llmfast.tokenizers import TRAINABLE, Tokenizer, gpt2_tokenizer, load_tokenizer, train_tokenizer
from llmfast.tokenizers.protocol import TOKENIZER_FILES
from llmfast.training.division import Division, scan
from llmfast.training.encoding import Encoder, encode_all
from llmfast.training.manifest import MANIFEST, Manifest, Shard, Split
from llmfast.weights.locate import EMBEDDED, locate_model

SHARD_TOKENS = 1 << 24
Progress = Callable[[str, int, int], None]  # what is being done, and how many of how many bytes of text are done


def prepare(
    files: Iterable[str | Path],
    out: str | Path,
    tokenizer: str | Path | Tokenizer = "bpe",
    vocab_size: int | None = None,
    validation: float = 0.1,
    validation_documents: int = 0,
    workers: int | None = None,
    seed: int = 0,
    encoding: str = "utf-8",
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Writes the documents of `files` into the directory `out` as tokens, with a manifest and the tokenizer.

    `tokenizer` is a kind to train on the training documents ("char", "word", "bpe", "wordpiece"), "gpt2", an embedded
    model's name, a directory that holds one, or the tokenizer itself. After each document comes an end-of-text, where
    the vocabulary has one.

    Documents with about the share `validation` of all bytes are kept out of training, at least one of them, chosen by
    a hash of their text and `seed`, so that a document that comes twice stays on one side. Of a corpus of one document
    it is the end, cut at a character; neither part has an end-of-text then. `validation=0` keeps none out.
    `validation_documents=n` keeps the last n documents out instead.

    `encoding` is that of text files. `workers` processes encode (default: one for each CPU). A directory with prepared
    data is replaced only with `overwrite`; one with anything else never is. `ValueError` or `OSError` in one line for
    what can't be read.
    """
    out, paths = Path(out), [Path(file) for file in files]
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be at least 0 and below 1, got {validation}")
    for name, value, least in (
        ("validation_documents", validation_documents, 0),
        ("workers", workers, 1),
        ("seed", seed, 0),
        ("shard_tokens", shard_tokens, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    _check_target(out, overwrite)
    sources = find_sources(paths, encoding)
    corpus = scan(sources, seed, _counter(progress, "reading", sum(source.size for source in sources)))
    division = Division(corpus, validation, validation_documents)
    learning = _counter(progress, "training the tokenizer", corpus.bytes)
    made = _tokenizer(tokenizer, vocab_size, division, sources, learning)
    dtype = "uint16" if made.vocab_size <= 1 << 16 else "uint32"

    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a preparation that was stopped
    unfinished.mkdir(parents=True)
    try:
        made.save(unfinished)
        encoded = _counter(progress, "encoding", corpus.bytes)
        writers = {side: _SplitWriter(unfinished, side, shard_tokens) for side in division.documents}
        encoder = Encoder(made, dtype, corpus.has_prompts)
        for piece in encode_all(division.parts(sources), encoder, workers or _cpus()):
            writers[piece.side].add(piece.tokens, piece.mask, piece.bytes)
            encoded(piece.bytes + piece.prompt_bytes)
        manifest = Manifest(
            dtype=dtype,
            tokenizer=made.kind,
            vocab_size=made.vocab_size,
            end_of_text=made.end_of_text,
            splits={side: writer.close(division.documents[side]) for side, writer in writers.items()},
            split_by=division.description,
            settings={
                "files": [path.name for path in paths],
                "validation": validation,
                "validation_documents": validation_documents,
                "seed": seed,
            },
        )
        manifest.write(unfinished)
        _put_in_place(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


class _SplitWriter:
    """Writes one side's tokens into shards of `shard_tokens`, the last of which may be shorter."""

    def __init__(self, directory: Path, side: str, shard_tokens: int):
        self.directory, self.side, self.shard_tokens = directory, side, shard_tokens
        self.shards: list[Shard] = []
        self.bytes = 0
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._waiting = 0

    def add(self, tokens: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        self.bytes += size
        while len(tokens):
            room = self.shard_tokens - self._waiting
            self._tokens.append(tokens[:room])
            self._waiting += len(tokens[:room])
            tokens = tokens[room:]
            if mask is not None:
                self._masks.append(mask[:room])
                mask = mask[room:]
            if self._waiting == self.shard_tokens:
                self._write()

    def close(self, documents: int) -> Split:
        if self._waiting:
            self._write()
        return Split(documents, self.bytes, sum(shard.tokens for shard in self.shards), tuple(self.shards))

    def _write(self) -> None:
        name = f"{self.side}-{len(self.shards):05d}"
        shard = Shard(f"{name}.npy", self._waiting, self._save(f"{name}.npy", self._tokens))
        if self._masks:
            file = f"{name}.mask.npy"
            shard = Shard(shard.file, shard.tokens, shard.sha256, file, self._save(file, self._masks))
        self.shards.append(shard)
        self._tokens, self._masks, self._waiting = [], [], 0

    def _save(self, name: str, arrays: list[np.ndarray]) -> str:
        def save(temporary: str) -> None:
            with open(temporary, "wb") as file:
                np.save(file, np.concatenate(arrays))

        write_atomic(self.directory / name, save)
        return file_sha256(self.directory / name)


def _tokenizer(
    wanted: str | Path | Tokenizer,
    vocab_size: int | None,
    division: Division,
    sources: Sequence[Source],
    progress: Callable[[int], None],
) -> Tokenizer:
    if isinstance(wanted, str) and wanted in TRAINABLE:

        def texts() -> Iterator[str]:
            for text in division.training_texts(sources):
                yield text
                progress(len(text.encode()))

        return train_tokenizer(wanted, texts(), vocab_size)
    if vocab_size is not None:
        raise ValueError(f"vocab_size is for a tokenizer that is trained here ({', '.join(TRAINABLE)})")
    if wanted == "gpt2":
        return gpt2_tokenizer()
    if not isinstance(wanted, (str, Path)):
        return wanted
    loaded = load_tokenizer(locate_model(wanted) if wanted in EMBEDDED else wanted)
    if loaded is None:
        names = ", ".join([*TRAINABLE, "gpt2", *EMBEDDED])
        raise FileNotFoundError(f"no tokenizer {wanted}: not {names}, or a directory that holds one")
    return loaded


def _check_target(out: Path, overwrite: bool) -> None:
    """Whatever is not prepared data stays untouched."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: name a directory for the prepared data")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if MANIFEST not in names:
        raise ValueError(f"{out} is not empty: name a new directory for the prepared data")
    if not overwrite:
        raise ValueError(f"{out} holds prepared data already: name another directory, or pass overwrite=True")
    shards = [shard for split in Manifest.read(out).splits.values() for shard in split.shards]
    ours = {MANIFEST, *TOKENIZER_FILES, *(file for shard in shards for file in shard.files())}
    if others := sorted(names - ours):
        raise ValueError(f"{out} holds {others[0]} besides prepared data: it is not replaced; name another directory")


def _put_in_place(unfinished: Path, out: Path) -> None:
    if not out.exists():
        os.replace(unfinished, out)
        return
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    os.replace(out, replaced)
    os.replace(unfinished, out)
    shutil.rmtree(replaced)


def _counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Adds up what it is told, and passes the sum on."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, done, total)

    return count


def _cpus() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
