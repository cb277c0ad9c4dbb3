"""Runs of several processes on one machine: forks of one that has imported everything, and has not computed yet.

python tests/training_processes.py '[{"processes": 2, "parallel": "fsdp", "files": […], "out": …, "changes": {…}}]'
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from typing import Any


def run(scenario: dict[str, Any]) -> None:
    """One run, resumed if "resume" says so; `SystemExit` where one of its processes failed."""
    from llmfast.training.configuration import configure
    from llmfast.training.run import train

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(scenario["processes"]):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": scenario["processes"], "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            resume = scenario.get("resume", False)
            config = None if resume else configure(changes=scenario["changes"])
            changes = scenario["changes"] if resume else {}
            try:
                train(
                    scenario["files"],
                    scenario["out"],
                    config,
                    changes=changes,
                    resume=resume,
                    parallel=scenario["parallel"],
                    quiet=True,
                )
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise SystemExit(f"{scenario} failed")


if __name__ == "__main__":
    import torch
    import torch._dynamo  # once is enough for all processes

    torch.set_num_threads(1)
    for each in json.loads(sys.argv[1]):
        run(each)
