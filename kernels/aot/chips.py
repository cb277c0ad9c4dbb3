"""The GPUs that the kernels are compiled for, and what a program may use of them."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """One architecture. Sources: NVIDIA's tuning guides (compute capability tables), AMD's CDNA 3 ISA guide."""

    name: str
    gpus: str
    family: str  # the file of configs/ that it reads
    target: GPUTarget
    multiprocessors: int
    shared_a_program: int  # bytes
    shared: int  # bytes of a multiprocessor
    warps: int  # that a multiprocessor holds at most
    programs: int  # that a multiprocessor holds at most

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Resident warps over those that a multiprocessor could hold, as registers, shared memory and its own limits
        allow:

            programs = min(programs max, warps max / warps, shared / (shared of the program + reserved), by registers)
            NVIDIA, by registers: 65536 / (warps * 32 * registers rounded up to 8); 1 KiB a program is reserved
            AMD, by registers:    4 SIMDs * min(8, 512 / registers rounded up to 8) wavefronts / warps
        """
        rounded = -(-max(registers, 1) // 8) * 8
        if self.target.backend == "hip":
            by_registers, reserved = 4 * min(8, 512 // rounded) // warps, 0
        else:
            by_registers, reserved = 65536 // (warps * 32 * rounded), KIB
        by_shared = self.shared // (shared + reserved) if shared + reserved else self.programs
        return min(self.programs, self.warps // warps, by_registers, by_shared) * warps / self.warps


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "A100", "ampere", GPUTarget("cuda", 80, 32), 108, 163 * KIB, 164 * KIB, 64, 32),
        Chip("sm_90", "H100, H200", "hopper", GPUTarget("cuda", 90, 32), 132, 227 * KIB, 228 * KIB, 64, 32),
        Chip("sm_100", "B200", "blackwell", GPUTarget("cuda", 100, 32), 148, 227 * KIB, 228 * KIB, 64, 32),
        Chip("gfx942", "MI300", "cdna", GPUTarget("hip", "gfx942", 64), 304, 64 * KIB, 64 * KIB, 32, 32),
        # The default serves every other GPU. It is compiled for sm_80, whose instructions consumer GPUs share, and
        # held to the 64 KiB of Turing and of AMD's RDNA.
        Chip("default", "all others", "default", GPUTarget("cuda", 80, 32), 84, 64 * KIB, 100 * KIB, 48, 16),
    )
}
