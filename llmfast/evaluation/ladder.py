"""A ladder of small models, trained on the same text for a scaling law: every shape with every number of tokens.

Each rung is a run of the trainer with a schedule of its own that ends at its number of tokens; the losses in the middle
of a longer run would be too high, because their learning rate has not come down (Hoffmann et al., 2022).

OUT/
  ladder.json      what is trained, so that the same command goes on where it was stopped
  data/            the prepared tokens
  runs/2x64-100000/ …    the runs, each with its model
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfast.evaluation.scaling import OPERATIONS, ScalingPoint
from llmfast.files import write_atomic
from llmfast.training import directory
from llmfast.training.configuration import TrainingConfig
from llmfast.training.manifest import MANIFEST, Manifest
from llmfast.training.prepare import prepare
from llmfast.training.pretraining import model_config
from llmfast.training.run import train

LADDER = "ladder.json"
HEAD = 32  # channels of a head, where they divide the width
LEARNING_RATE, WIDTH = 4e-3, 128  # of a model so wide; others get it times √(128 / width)


@dataclass(frozen=True)
class Rung:
    layers: int
    width: int
    tokens: int  # to train on; the run takes the next smaller number of whole steps

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}-{self.tokens}"


@dataclass(frozen=True)
class Ladder:
    """Shapes (layers, width) and numbers of tokens, and the settings of training that all rungs share."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def rungs(self) -> list[Rung]:
        """All of them, roughly the cheapest first."""
        rungs = [Rung(layers, width, tokens) for layers, width in self.shapes for tokens in self.tokens]
        return sorted(rungs, key=lambda rung: rung.layers * rung.width**2 * rung.tokens)

    def config(self, rung: Rung) -> TrainingConfig:
        """The run of a rung. `ValueError` where its tokens are not even one step."""
        heads = next(n for n in range(max(1, rung.width // HEAD), 0, -1) if rung.width % n == 0)
        changes: dict[str, Any] = {"n_layer": rung.layers, "n_embd": rung.width, "n_head": heads}
        changes |= {"lr": LEARNING_RATE * math.sqrt(WIDTH / rung.width)}
        changes |= {"evaluate_every": 0, "checkpoint_every": 0, "keep_checkpoints": 1} | dict(self.settings)
        config = TrainingConfig().replace(changes)
        steps = rung.tokens // (config.data.batch_size * config.model.n_positions)
        if steps < 1:
            size = f"{config.data.batch_size} × {config.model.n_positions}"
            raise ValueError(f"{rung.tokens:,} tokens are less than one step of {size}")
        return config.replace({"steps": steps, "warmup": min(config.optimization.warmup, max(1, steps // 10))})


# Two to three minutes on two cores for a text of a megabyte; and an hour or two.
QUICK = Ladder(
    ((2, 32), (2, 64), (4, 96)),
    (125_000, 250_000, 500_000, 1_000_000),
    {"tokenizer": "char", "n_positions": 64, "batch_size": 8},
)
FULL = Ladder(((2, 64), (3, 96), (4, 128), (6, 192)), (1_000_000, 2_000_000, 4_000_000, 8_000_000))


@dataclass(frozen=True)
class Trained:
    rung: Rung
    run: ScalingPoint
    seconds: float  # of training just now; 0 where it was there already


class Interrupted(Exception):
    """A signal, given as its number, stopped the ladder; what was trained is kept."""


def climb(
    files: Sequence[str | Path],
    out: str | Path,
    ladder: Ladder,
    preparing: Callable[[], contextlib.AbstractContextManager[directory.Progress]] = directory.no_progress,
) -> Iterator[Trained]:
    """Prepares the data, trains what of the ladder `out` does not hold yet, and yields every rung when it is trained.

    `ValueError` where `out` holds another ladder, or the text is too short to keep some of it out for validation.
    """
    out = Path(out)
    configs = {rung: ladder.config(rung) for rung in ladder.rungs()}
    _claim(files, out, ladder)
    data = out / "data"
    if not (data / MANIFEST).exists():
        some = next(iter(configs.values())).data
        vocab_size = some.vocab_size if some.tokenizer in ("bpe", "word", "wordpiece") else None
        with preparing() as progress:
            prepare(
                files, data, some.tokenizer, vocab_size, some.validation, some.validation_documents, progress=progress
            )
    manifest = Manifest.read(data)
    if "validation" not in manifest.splits or manifest.splits["validation"].tokens < 2:
        raise ValueError("a scaling law is about text that was not trained on: keep some out (--set validation=0.1)")
    for rung, config in configs.items():
        yield _train(rung, config, data, out / "runs" / rung.name, manifest)


def _train(rung: Rung, config: TrainingConfig, data: Path, out: Path, manifest: Manifest) -> Trained:
    """A rung from its start, from where it was stopped, or, where it is done, what it came to."""
    begun = (out / directory.RUN).exists()
    outcome = train([data], out, config, resume=begun, quiet=True)
    if outcome.interrupted is not None:
        raise Interrupted(outcome.interrupted)
    assert outcome.validation is not None
    parameters = model_config(config, manifest.vocab_size, manifest.end_of_text).num_parameters
    tokens = config.run.steps * config.data.batch_size * config.model.n_positions
    return Trained(rung, ScalingPoint(parameters, tokens, outcome.validation["loss"]), outcome.seconds)


def cost(rung: Rung) -> float:
    """About the operations of a rung: without its embedding, whose size the text decides."""
    return OPERATIONS * 12.0 * rung.layers * rung.width**2 * rung.tokens


def _claim(files: Sequence[str | Path], out: Path, ladder: Ladder) -> None:
    """Makes `out` the place of this ladder; `ValueError` where it is another one's."""
    document = dataclasses.asdict(ladder) | {"files": [str(Path(file).resolve()) for file in files]}
    content = json.dumps(document, indent=2) + "\n"
    path = out / LADDER
    if path.exists():
        if path.read_text(encoding="utf-8") != content:
            raise ValueError(f"{out} holds a ladder of other files or settings ({path}): name another directory")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.encode())
