"""The directory of a run: what is in it, and what a run has to know of itself to be resumed.

OUT/
  model.safetensors, config.json, tokenizer   the model: the best by validation so far, or the latest without validation
  training.json                               which step that is, and how well it does
  run.json                                    the configuration and the data
  data/                                       the prepared tokens, where the files were text
  checkpoints/                                the newest states (see `checkpoints`)
  metrics.jsonl, curves.png                   what was measured
  .lock                                       held by the process that trains, whose number is in it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfast.files import Locked, locked, write_atomic
from llmfast.tokenizers import TRAINABLE
from llmfast.training.configuration import ModelSettings, TrainingConfig
from llmfast.training.manifest import MANIFEST
from llmfast.training.metrics import METRICS
from llmfast.training.prepare import prepare
from llmfast.weights.files import WEIGHT_FILES
from llmfast.weights.quantizing import TRAINING

RUN, DATA, CHECKPOINTS, LOCK = "run.json", "data", "checkpoints", ".lock"
OURS = (RUN, CHECKPOINTS, METRICS, TRAINING, "config.json", *WEIGHT_FILES)
VERSION = 1
# What a run can't change on the way: with another of these it would be another run.
FIXED = {each.name for each in dataclasses.fields(ModelSettings)} - {"dropout", "attention_dropout"}
FIXED |= {"tokenizer", "vocab_size", "validation", "validation_documents", "encoding", "rows", "batch_size", "seed"}
FIXED |= {"optimizer"}

Progress = Callable[[str, int, int], None]


@contextmanager
def no_progress() -> Iterator[Progress]:
    yield lambda stage, done, total: None


@dataclass(frozen=True)
class RunRecord:
    """`run.json`. `data` is a directory of prepared tokens, and `fingerprint` the SHA-256 of its manifest."""

    config: TrainingConfig
    data: Path
    files: tuple[str, ...]
    fingerprint: str

    def write(self, out: Path) -> None:
        inside = self.data == out / DATA
        document = {
            "version": VERSION,
            "config": self.config.to_document(),
            "data": DATA if inside else str(self.data.resolve()),
            "files": self.files,
            "fingerprint": self.fingerprint,
        }
        write_atomic(out / RUN, (json.dumps(document, indent=2) + "\n").encode())

    @classmethod
    def read(cls, out: Path) -> RunRecord:
        """`FileNotFoundError` where `out` holds no run, `ValueError` where its record is damaged."""
        path = out / RUN
        if not path.exists():
            raise FileNotFoundError(f"{out} holds no run to resume: start one without --resume")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["version"] != VERSION:
                raise ValueError(f"its version is {document['version']}, and this llmfast reads {VERSION}")
            settings = document["config"]
            # Earlier runs had one setting for both.
            settings["model"].setdefault("attention_dropout", settings["model"]["dropout"])
            config = TrainingConfig.from_document(settings)
            return cls(config, out / document["data"], tuple(document["files"]), document["fingerprint"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


@contextmanager
def only_process(out: Path) -> Iterator[None]:
    """Holds the run in `out` for this process, until it ends in whatever way. `ValueError` where another one has it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a directory for the run")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / LOCK):
            yield
    except Locked as error:
        raise ValueError(f"the run in {out} is in use by {error}") from None


def check_free(out: Path) -> None:
    """`ValueError` where a new run would write over something; prepared data alone is made anew."""
    if (out / RUN).exists():
        raise ValueError(f"{out} holds a run already: go on with it by --resume, or name another directory")
    taken = [name for name in OURS if (out / name).exists()]
    if taken:
        raise ValueError(f"{out} holds {taken[0]} already: name another directory")


def prepare_data(files: Sequence[str | Path], out: Path, config: TrainingConfig, progress: Progress) -> None:
    """Makes the data of a new run in `out`, unless `files` is one directory with prepared data."""
    if not files:
        raise ValueError("no files to train on: name text files, or a directory of prepared data")
    if _prepared(files):
        return
    settings = config.data
    trained = settings.tokenizer in TRAINABLE and settings.tokenizer != "char"
    vocab_size = settings.vocab_size if trained else None
    prepare(
        files,
        out / DATA,
        settings.tokenizer,
        vocab_size,
        settings.validation,
        settings.validation_documents,
        encoding=settings.encoding,
        overwrite=True,
        progress=progress,
    )


def new_record(files: Sequence[str | Path], out: Path, config: TrainingConfig) -> RunRecord:
    """The record of a new run whose data is there; it is written when the run can begin."""
    data = Path(files[0]) if _prepared(files) else out / DATA
    return RunRecord(config, data, tuple(str(Path(file)) for file in files), fingerprint(data))


def _prepared(files: Sequence[str | Path]) -> bool:
    return len(files) == 1 and (Path(files[0]) / MANIFEST).exists()


def resumed(
    out: Path, config: TrainingConfig | None, changes: Mapping[str, Any], files: Sequence[str | Path]
) -> RunRecord:
    """The recorded run with other settings: all of `config`, or the recorded ones where it is None, and `changes`.

    `ValueError` where they would make it another run, or where its data has changed.
    """
    record = RunRecord.read(out)
    if files and tuple(str(Path(file)) for file in files) != record.files:
        raise ValueError(f"the run in {out} was started with {', '.join(record.files)}: leave the files out to resume")
    wanted = (config or record.config).replace(changes)
    if wanted.run.precision == "auto":
        wanted = wanted.replace({"precision": record.config.run.precision})
    for name, (before, now) in record.config.differences(wanted).items():
        if name in FIXED:
            raise ValueError(f"a resumed run can't change {name} from {before!r} to {now!r}: start a new one")
    if fingerprint(record.data) != record.fingerprint:
        raise ValueError(f"the data in {record.data} is not what the run was started with: start a new one")
    return RunRecord(wanted, record.data, record.files, record.fingerprint)


def fingerprint(data: Path) -> str:
    """The SHA-256 of the manifest, which holds those of the shards. `OSError` where there is none."""
    return hashlib.sha256((data / MANIFEST).read_bytes()).hexdigest()
