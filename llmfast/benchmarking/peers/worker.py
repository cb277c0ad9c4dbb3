"""One engine in a process of its own, told what to do line by line, and asleep in between.

    worker.py LIBRARY PRECISION FOLDER THREADS

Each line of stdin is a JSON object, and gets one line of JSON on stdout:

    {"do": "decode", "prompt": 32, "new": 64}    {"seconds": 0.8}       of the new tokens alone
    {"do": "prefill", "prompt": 512}             {"seconds": 0.3}
    {"do": "logits", "prompt": 24, "new": 8}     {"logits": "…"}        float32 in base64
    {"do": "memory"}                             {"bytes": 6e8}         the most so far, above the bare imports

The first line it writes, {"ready": true}, says that the model is loaded. What goes wrong is {"error": "why"}.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, TextIO

from .engines import ENGINES, Engine
from .models import prompt_ids


def peak_memory() -> int:
    """The most bytes that this process has had in memory.

    `ru_maxrss` would begin with the size of the process that started this one, which Linux carries over.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer(engine: Engine, ids: list[int], request: dict[str, Any], imports: int) -> dict[str, Any]:
    what, prompt, new = request["do"], request.get("prompt", 0), request.get("new", 0)
    following = [ids[i % len(ids)] for i in range(prompt, prompt + new)]
    if what == "decode":
        return {"seconds": engine.time_decode(ids[:prompt], following)}
    if what == "prefill":
        return {"seconds": engine.time_prefill(ids[:prompt])}
    if what == "logits":
        engine.prefill(ids[:prompt])
        for token in following:
            engine.step(token)
        return {"logits": base64.b64encode(engine.logits().tobytes()).decode()}
    if what == "memory":
        return {"bytes": peak_memory() - imports}
    raise ValueError(f"don't know how to {what!r}")


def serve(
    library: str, precision: str, models: Path, capacity: int, threads: int, requests: TextIO, replies: TextIO
) -> None:
    def send(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        importlib.import_module(ENGINES[library].base)
        imports = peak_memory()
        engine = ENGINES[library](models, precision, capacity, threads)
        config = json.loads((models / "hf" / "config.json").read_text(encoding="utf-8"))
        ids = prompt_ids(capacity, config["vocab_size"])
        send({"ready": True})
        for line in iter(requests.readline, ""):
            send(answer(engine, ids, json.loads(line), imports))
    except Exception as error:  # whatever it is, the other end has to hear of it
        send({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not come between the replies
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.stdin, replies)
