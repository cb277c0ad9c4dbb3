"""Compiling the kernels for GPUs that are not here: what they take of a chip, and that none spills a register.

    python -m llmfast.kernels.aot                  compile what changed, then write docs/kernels.csv and the table
    python -m llmfast.kernels.aot --check          say what the files and the kernels disagree on; writes nothing
    python -m llmfast.kernels.aot --triton 3.6.0   compile everything with another Triton; writes nothing

    chips.py      the GPUs, and what a program may use of them
    cases.py      calls of every op that reach every kernel under every shipped configuration
    recorder.py   a stand-in for a GPU's driver: notes what each launch would compile
    compiler.py   compiles one of these and reads registers, spills, shared memory and matrix instructions off it
    report.py     the results as a file for programs and as a table for people
    command.py    the command
    versions.py   the same under another Triton

Triton compiles for any GPU anywhere and carries NVIDIA's assembler and disassembler, so all of it runs on a CPU, and
only the time that a kernel takes is left to a GPU to tell. It needs Triton without TRITON_INTERPRET.
"""
