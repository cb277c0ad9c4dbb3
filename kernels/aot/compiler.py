"""Compiles what a launch would have compiled, and reads off the machine code what it takes of a chip."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.compiler import ASTSource

from .recorder import Compilation

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# In the order of generations: what stands in the assembly where a dot became a matrix instruction.
MATRIX_INSTRUCTIONS = {"tcgen05.mma": "tcgen05", "wgmma.mma": "wgmma", "mma.sync": "mma.sync", "v_mfma": "v_mfma"}


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, bytes of spilled registers, bytes of shared memory a program."""

    chip: str
    kernel: str
    dtype: str
    case: str
    fingerprint: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    occupancy: float
    instruction: str  # the matrix instruction, or "" where there is none

    def renamed(self, compilation: Compilation) -> Resources:
        """The same code under the name of the case that asks for it now."""
        return replace(self, kernel=compilation.name, dtype=compilation.dtype, case=compilation.case)


def compile_one(compilation: Compilation) -> Resources:
    chip, attributes = compilation.chip, compilation.attributes
    source = ASTSource(compilation.kernel, compilation.signature, compilation.constants, attributes)
    compiled = triton.compile(source, target=chip.target, options=compilation.options)
    if chip.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers, spilled = _from_metadata(assembly)
    else:
        assembly = compiled.asm["ptx"]
        registers, spilled = _from_cubin(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, compilation.options["num_warps"]
    return Resources(
        chip=chip.name,
        kernel=compilation.name,
        dtype=compilation.dtype,
        case=compilation.case,
        fingerprint=compilation.fingerprint,
        warps=warps,
        stages=compilation.options["num_stages"],
        registers=registers,
        spilled=spilled,
        shared=shared,
        occupancy=round(chip.occupancy(registers, shared, warps), 3),
        instruction=next((name for text, name in MATRIX_INSTRUCTIONS.items() if text in assembly), ""),
    )


def compile_all(
    compilations: list[Compilation], processes: int, progress: Callable[[], object] = lambda: None
) -> tuple[list[Resources], list[str]]:
    """All of them, in their order, and a line for each that does not compile.

    The processes are forks, so that nothing but an index has to be handed over.
    """
    global _work
    _work = compilations
    rows, failures = [], []
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for result in pool.imap(_compile_nth, range(len(compilations))):
            if isinstance(result, str):
                failures.append(result)
            else:
                rows.append(result)
            progress()
    return rows, failures


_work: list[Compilation] = []


def _compile_nth(index: int) -> Resources | str:
    compilation = _work[index]
    try:
        return compile_one(compilation)
    except Exception as error:
        where = f"{compilation.chip.name}: {compilation.name}, {compilation.dtype}, {compilation.case}"
        return f"{where} does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _from_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack, which is where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _from_metadata(assembly: str) -> tuple[int, int]:
    """Vector registers a lane (both kinds), and bytes of scratch memory a lane, which is where spilled ones go.

    The metadata's own spill counts also hold what never reaches memory: scalars that are kept in lanes of a vector
    register, and vector registers that are kept in accumulation registers.
    """
    scratch = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), scratch


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the assembler says")
    return int(found.group(1))
