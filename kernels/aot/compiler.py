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
) -> list[Resources]:
    """All of them, in their order. The processes are forks, so that nothing but an index has to be handed over."""
    global _work
    _work = compilations
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        found = []
        for resources in pool.imap(_compile_nth, range(len(compilations))):
            found.append(resources)
            progress()
    return found


_work: list[Compilation] = []


def _compile_nth(index: int) -> Resources:
    compilation = _work[index]
    try:
        return compile_one(compilation)
    except Exception as error:
        where = f"{compilation.name}, {compilation.dtype}, {compilation.case}, {compilation.chip.name}"
        # A worker's exception must survive pickling, which Triton's own do not all.
        raise RuntimeError(f"{where} does not compile: {type(error).__name__}: {error}") from None


def _from_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack, which is where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _from_metadata(assembly: str) -> tuple[int, int]:
    """Vector registers a lane (both kinds), and bytes of spilled ones. Scalars spill into vector registers."""
    spilled = _number(r"\.vgpr_spill_count:\s*(\d+)", assembly) + _number(r"\.sgpr_spill_count:\s*(\d+)", assembly)
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), 4 * spilled


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the assembler says")
    return int(found.group(1))
