"""`manifest.json`: what a directory of prepared tokens holds, and how to tell that it still does.

data/
  manifest.json       the last file to be written: without it the directory is not a data set
  train-00000.npy     token ids, (tokens,) uint16 or uint32
  train-00000.mask.npy  (tokens,) bool, False where a token is no target; only where documents have prompts
  validation-00000.npy
  vocab.json, …       the tokenizer's own files
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.files import file_sha256, write_atomic

MANIFEST = "manifest.json"
VERSION = 1
SPLITS = ("train", "validation")
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Shard:
    """A file of token ids and, where the documents have prompts, one that says which of them are targets."""

    file: str
    tokens: int
    sha256: str
    mask_file: str | None = None
    mask_sha256: str | None = None

    def files(self) -> dict[str, str]:
        """The SHA-256 of each file by its name."""
        files = {self.file: self.sha256}
        if self.mask_file is not None and self.mask_sha256 is not None:
            files[self.mask_file] = self.mask_sha256
        return files


@dataclass(frozen=True)
class Split:
    """The documents on one side: how many they are, their UTF-8 bytes, and their tokens, end-of-text included."""

    documents: int
    bytes: int
    tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus: `splits` holds "train" and, unless none was asked for, "validation"."""

    dtype: str
    tokenizer: str  # its kind
    vocab_size: int
    end_of_text: int | None
    splits: Mapping[str, Split]
    split_by: str  # how documents were divided, in words
    settings: Mapping[str, Any] = field(default_factory=dict)  # what `prepare` was asked for
    version: int = VERSION

    def write(self, directory: str | Path) -> None:
        document = json.dumps(dataclasses.asdict(self), indent=2)
        write_atomic(Path(directory) / MANIFEST, f"{document}\n".encode())

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """`FileNotFoundError` where the directory holds no (whole) data set, `ValueError` for a damaged manifest."""
        path = Path(directory) / MANIFEST
        if not path.exists():
            raise FileNotFoundError(
                f"no {MANIFEST} in {directory}: it holds no prepared data, or its preparation was not finished; "
                f"run `llmfast data prepare FILES -o {directory}`"
            )
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["version"] != VERSION:
                raise ValueError(f"its version is {document['version']}; this llmfast reads {VERSION}")
            splits = {}
            for name, split in document["splits"].items():
                shards = tuple(Shard(**shard) for shard in split.pop("shards"))
                splits[name] = Split(**split, shards=shards)
                if splits[name].tokens != sum(shard.tokens for shard in shards):
                    raise ValueError(f"the shards of {name} do not add up to its tokens")
            manifest = cls(**document | {"splits": splits})
            if manifest.dtype not in DTYPES or "train" not in splits:
                raise ValueError(f"it should have a dtype of {' or '.join(DTYPES)}, and a train split")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a manifest of prepared data: {error}") from None
        return manifest

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise ValueError(f"the data has no {name!r} split, only {', '.join(self.splits)}")
        return self.splits[name]

    def verify(
        self,
        directory: str | Path,
        splits: tuple[str, ...] | None = None,
        progress: Callable[[int], None] = lambda read: None,
    ) -> int:
        """Reads every shard and compares its SHA-256; the number of files. `ValueError` names those that differ.

        `progress` is told how many bytes were read since it was last called.
        """
        wrong, count = [], 0
        for name in self.splits if splits is None else splits:
            for shard in self.split(name).shards:
                for file, expected in shard.files().items():
                    count += 1
                    path = Path(directory) / file
                    if not path.exists():
                        wrong.append(f"{file} is missing")
                    elif file_sha256(path, progress) != expected:
                        wrong.append(f"{file} is corrupt (its SHA-256 is not the manifest's)")
        if wrong:
            raise ValueError(f"{directory}: {'; '.join(wrong)}: prepare the data again")
        return count


def map_array(path: Path, tokens: int, dtype: str) -> np.ndarray:
    """The array (tokens,) of a `.npy` file, mapped and not read. `ValueError` names a file of another size or type."""
    try:
        array = np.load(path, mmap_mode="r")
        if array.shape != (tokens,) or array.dtype != np.dtype(dtype):
            raise ValueError(f"it holds {array.dtype} {array.shape}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, which the manifest lists: prepare the data again") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is damaged: it should hold {tokens:,} values of type {dtype}, but {error}; prepare the data again"
        ) from None
    return array
