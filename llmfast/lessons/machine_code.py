"""What a Triton kernel of a lesson becomes on GPUs that are not here, by way of `llmfast.kernels.aot`.

Lessons run in Triton's interpreter, and a process that interprets can't compile: this one starts another.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = "import triton\nimport triton.language as tl\n\n\n"


def machine_code(
    kernels: Any, signature: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4, stages: int = 3
) -> list[dict[str, Any]]:
    """For every GPU of `llmfast.kernels.aot.chips` what the last of `kernels` takes; the others are what it calls.

    `signature` has Triton's types of the arguments (`*bf16`, `i32`), `constants` the values of the `tl.constexpr`.
    Each row has chip, registers (a thread), spilled and shared (bytes), occupancy, instruction.
    """
    source = HEAD + "\n\n".join(inspect.getsource(kernel.fn) for kernel in kernels)
    asked = {"name": kernels[-1].fn.__name__, "signature": dict(signature), "constants": dict(constants)}
    options = {"num_warps": warps, "num_stages": stages}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernels_of_the_lesson.py").write_text(source, encoding="utf-8")
        ran = subprocess.run(
            [sys.executable, "-m", "llmfast.lessons.machine_code", folder, json.dumps(asked | {"options": options})],
            capture_output=True, text=True, env=environment | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        )  # fmt: skip
    if ran.returncode != 0:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    rows: list[dict[str, Any]] = json.loads(ran.stdout)
    return rows


def _compile(folder: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    import importlib

    import torch
    import triton
    from triton.compiler import ASTSource

    from llmfast.kernels.aot import compiler
    from llmfast.kernels.aot.chips import CHIPS

    sys.path.insert(0, folder)
    kernel = getattr(importlib.import_module("kernels_of_the_lesson"), asked["name"])
    del torch  # imported before Triton's driver is looked for
    rows = []
    for chip in CHIPS.values():
        if chip.name == "default":
            continue
        source = ASTSource(
            kernel, asked["signature"], {(n,): v for n, v in by_place(kernel, asked["constants"]).items()}
        )
        compiled = triton.compile(source, target=chip.target, options=asked["options"])
        amd = chip.target.backend == "hip"
        assembly = compiled.asm["amdgcn" if amd else "ptx"]
        registers, spilled = compiler._from_metadata(assembly) if amd else compiler._from_cubin(compiled.asm["cubin"])
        shared, warps = compiled.metadata.shared, asked["options"]["num_warps"]
        found = {"chip": f"{chip.name} ({chip.gpus})", "registers": registers, "spilled": spilled, "shared": shared}
        found["occupancy"] = round(chip.occupancy(registers, shared, warps), 3)
        names = compiler.MATRIX_INSTRUCTIONS
        rows.append(found | {"instruction": next((names[text] for text in names if text in assembly), "")})
    return rows


def by_place(kernel: Any, constants: Mapping[str, Any]) -> dict[int, Any]:
    return {kernel.arg_names.index(name): value for name, value in constants.items()}


if __name__ == "__main__":
    print(json.dumps(_compile(sys.argv[1], json.loads(sys.argv[2]))))
