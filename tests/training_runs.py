"""What the tests of training share: a small text, a small configuration, and a run that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

TEXT = "".join(
    f"{i}: the {a} {v} a {b}.\n" for i in range(40) for a, v, b in [("cat", "sees", "dog"), ("dog", "hears", "bird")]
)

SMALL: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 16,
    "dropout": 0.1,
    "tokenizer": "char",
    "batch_size": 8,
    "accumulation": 2,
    "lr": 1e-2,
    "warmup": 3,
    "steps": 30,
    "evaluate_every": 10,
    "checkpoint_every": 4,
    "log_every": 5,
    "device": "cpu",
}


def losses(out: Path) -> list[float]:
    """The loss of every step, which must be there once each."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["loss"] for row in steps]


def validations(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "validation_loss" in row]


LIVES = 8  # the last of which ends by itself


def killed_again_and_again(out: Path, text: Path, changes: dict[str, Any], seed: int) -> list[str]:
    """Starts a run and resumes it until it is through, killed (-9) at random moments and in the middle of saving.

    Each life is a fork of this process, which must not have computed anything yet. What ended each is returned.
    """
    import torch
    import torch._dynamo  # optimizers import it: once is enough for all lives

    from llmfast.training.configuration import configure
    from llmfast.training.run import train

    torch.set_num_threads(1)
    config = configure(changes=changes)
    rng = random.Random(seed)
    ends = []
    for life in range(LIVES):
        resume = (out / "run.json").exists()
        steps, seconds, files = rng.randrange(1, 8), rng.random() * 0.005, rng.randrange(1, 20)
        child = os.fork()
        if child == 0:
            if life < LIVES - 1:
                die_while_saving(files) if life % 2 else die_after(steps, seconds)
            try:
                train([] if resume else [text], out, None if resume else config, resume=resume, quiet=True)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ends.append(f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}")
    return ends


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(steps: int, seconds: float) -> None:
    """Has this process killed so long after so many steps: somewhere within a step, or in what is between two."""
    from llmfast.training.trainer import Trainer

    step = Trainer.step

    def deadly(self: Trainer) -> Any:
        nonlocal steps
        steps -= 1
        if steps == 0:
            threading.Timer(seconds, die).start()
        return step(self)

    Trainer.step = deadly  # type: ignore[method-assign]


def die_while_saving(countdown: int) -> None:
    """Has this process killed when so many files of checkpoints are written: some are there, the name is not."""
    from llmfast.training import checkpoints

    sync = checkpoints.sync

    def deadly(path: Path) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            die()
        sync(path)

    checkpoints.sync = deadly


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    ended = killed_again_and_again(
        Path(arguments["out"]), Path(arguments["text"]), arguments["changes"], arguments["seed"]
    )
    print(json.dumps(ended))
