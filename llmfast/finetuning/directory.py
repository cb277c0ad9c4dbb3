"""The directory of a fine-tuning run, and what a run has to know of itself to be resumed.

OUT/
  adapter_model.safetensors, adapter_config.json     the adapter, in peft's files; or, where the model's own weights are
  model.safetensors, config.json                     trained, the whole model: the best by what is held out
  the tokenizer, with its chat template
  classifier.json                                    the labels, of a classifier
  evaluation.json, report.html                       what was measured before and after; the same as a page
  run.json, training.json, checkpoints/, metrics.jsonl, curves.png       as in `training.directory`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmfast.files import file_sha256, write_atomic
from llmfast.finetuning.classifier import CLASSIFIER
from llmfast.finetuning.configuration import FIXED, FinetuningConfig
from llmfast.finetuning.page import PAGE
from llmfast.training import directory
from llmfast.weights.adapter import CONFIG, WEIGHTS
from llmfast.weights.fetching import KNOWN
from llmfast.weights.locate import EMBEDDED

EVALUATION = "evaluation.json"
VERSION = 1
OURS = (*directory.OURS, CONFIG, WEIGHTS, CLASSIFIER, EVALUATION, PAGE)


@dataclass(frozen=True)
class Record:
    """`run.json`: what a run has to know of itself to be resumed."""

    config: FinetuningConfig
    model: str
    file: str
    sha256: str

    def write(self, out: Path) -> None:
        document = {"version": VERSION, "task": "finetune"} | asdict(self)
        write_atomic(out / directory.RUN, (json.dumps(document, indent=2) + "\n").encode())

    @classmethod
    def read(cls, out: Path) -> Record:
        """`FileNotFoundError` where `out` holds no such run, `ValueError` where its record is damaged."""
        path = out / directory.RUN
        if not path.exists():
            raise FileNotFoundError(f"{out} holds no run to resume: start one without --resume")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("task") != "finetune":
                raise ValueError("it is a run of `llmfast train`")
            if document["version"] != VERSION:
                raise ValueError(f"its version is {document['version']}, and this llmfast reads {VERSION}")
            config = FinetuningConfig.from_document(document["config"])
            return cls(config, *(str(document[name]) for name in ("model", "file", "sha256")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} can't be resumed: {error}") from None

    def resumed(self, out: Path, config: FinetuningConfig | None, changes: Mapping[str, Any]) -> Record:
        """The same run with other settings; `ValueError` where they, or its file, make it another."""
        wanted = (config or self.config).replace(changes)
        for name, (before, now) in self.config.differences(wanted).items():
            if name in FIXED:
                raise ValueError(f"a resumed run can't change {name} from {before!r} to {now!r}: start a new one")
        if not Path(self.file).is_file() or file_sha256(Path(self.file)) != self.sha256:
            raise ValueError(f"{self.file} is not what the run in {out} was started with: start a new one")
        return Record(wanted, self.model, self.file, self.sha256)


def lasting_name(model: str | Path) -> str:
    """A model's name, as a file is to give it: a path as one that is good from everywhere."""
    path = Path(model).expanduser()
    known = str(model) in (*EMBEDDED, *KNOWN)
    return str(path.resolve()) if not known and str(model) and path.exists() else str(model)


def check_free(out: Path) -> None:
    """`ValueError` where a new run would write over something."""
    if (out / directory.RUN).exists():
        raise ValueError(f"{out} holds a run already: go on with it by --resume, or name another directory")
    taken = [name for name in OURS if (out / name).exists()]
    if taken:
        raise ValueError(f"{out} holds {taken[0]} already: name another directory")
