"""What the tests of training share: a small text, a small configuration, and a run that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
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


def killed_again_and_again(out: Path, text: Path, changes: dict[str, Any], seed: int) -> list[str]:
    """Starts a run and resumes it until it is through, killed (-9) at random moments and in the middle of saving.

    Each life is a fork of this process, which must not have computed anything yet. What ended each is returned.
    """
    import torch

    from llmfast.training.configuration import configure
    from llmfast.training.run import train

    torch.set_num_threads(1)
    config = configure(changes=changes)
    rng = random.Random(seed)
    ends = []
    for life in range(60):
        resume = (out / "run.json").exists()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            if life % 3 == 2:
                die_while_saving(rng.randrange(1, 12))
            os.write(write, b"!")
            try:
                train([] if resume else [text], out, None if resume else config, resume=resume, quiet=True)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        os.read(read, 1)
        time.sleep(rng.random())
        if life % 3 != 2 and life < 40:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        ends.append(f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}")
        if ends[-1] == "code 0":
            return ends
        assert ends[-1] == f"signal {signal.SIGKILL}", ends
    raise AssertionError(f"the run never came to its end: {ends}")


def die_while_saving(countdown: int) -> None:
    """Has this process killed when so many files of checkpoints are written: some are there, the name is not."""
    from llmfast.training import checkpoints

    sync = checkpoints.sync

    def deadly(path: Path) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    checkpoints.sync = deadly


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    ended = killed_again_and_again(
        Path(arguments["out"]), Path(arguments["text"]), arguments["changes"], arguments["seed"]
    )
    print(json.dumps(ended))
