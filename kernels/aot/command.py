"""What `python -m llmfast.kernels.aot` does."""

from __future__ import annotations

import os
import re
import sys

import click
import triton
from rich.progress import Progress

from llmfast.files import write_atomic

from .cases import calls
from .chips import CHIPS
from .compiler import Resources, compile_all
from .recorder import Compilation, record
from .table import PAGE, RESULTS, Results, as_csv, problems, read, table, with_table
from .versions import run_with

AT_ONCE = 100  # kernels compiled before the table is written again
MANY_REGISTERS = 200  # of the 255 that a thread can have on NVIDIA, 512 on AMD


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; say what docs/ and the kernels disagree on.")
@click.option("--sample", is_flag=True, help="Write nothing; compile the kernels nearest to spilling, a minute or two.")
@click.option("--all", "everything", is_flag=True, help="Compile everything again, not only what has changed.")
@click.option("--only", metavar="REGEX", help="Compile only these, print what they take, and write nothing.")
@click.option("--triton", "version", help="Compile with this Triton, installed apart; write nothing.")
@click.option("--processes", default=os.cpu_count() or 1, show_default=True, help="Compilers side by side.")
def main(check: bool, sample: bool, everything: bool, only: str | None, version: str | None, processes: int) -> None:
    """Compiles every kernel under every shipped configuration for every GPU family; no GPU needed.

    Without options it compiles what is new or has changed, writes docs/kernels.csv and the table in docs/kernels.md,
    and exits with 1 if a kernel spills registers, takes too much shared memory or misses the matrix instructions.
    """
    if not PAGE.exists():
        raise click.UsageError(f"{PAGE} is not there: run this in a checkout of the repository")
    if version is not None:
        which = ["--only", only] if only is not None else ["--sample"] if sample else ["--check", "--all"]
        try:
            sys.exit(run_with(version, [*which, "--processes", str(processes)]))
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    wanted = compilations()
    try:
        known = read()
    except OSError:
        known = Results("", ())
    if only is not None:
        wanted = [one for one in wanted if re.search(only, f"{one.chip.name} {one.name} {one.dtype} {one.case}")]
        rows, failures = compiled(wanted, processes)
        print(as_csv(Results(triton.__version__, tuple(rows))), end="")
        found = failures + problems(rows)
    elif sample:
        wanted = nearest_to_spilling(wanted, known)
        found = recompiled(wanted, known, processes)
    elif check:
        found = disagreements(wanted, known)
        if everything:
            found += recompiled(wanted, known, processes)
    else:
        found = update(wanted, known, everything, processes)
    for line in found:
        print(line)
    print(f"{len(wanted)} kernels on {len(CHIPS)} chips, {len(found)} problems (Triton {triton.__version__})")
    sys.exit(1 if found else 0)


def compilations() -> list[Compilation]:
    """Everything there is to compile: every kernel, configuration, dtype and chip."""
    return [found for chip in CHIPS.values() for found in record(chip, calls(chip.family))]


def update(wanted: list[Compilation], known: Results, everything: bool, processes: int) -> list[str]:
    """Compiles what `known` lacks, writes the files, and says what is wrong with the kernels."""
    if known.triton != triton.__version__ or everything:
        known = Results(triton.__version__, ())
    have = {(row.chip, row.fingerprint): row for row in known.rows}
    missing = [one for one in wanted if (one.chip.name, one.fingerprint) not in have]
    keys = {(one.chip.name, one.fingerprint): one for one in reversed(wanted)}
    rows, failures = [], []
    for start in range(0, len(missing) or 1, AT_ONCE):  # written as they come: a run of half an hour may be cut short
        new, failed = compiled(missing[start : start + AT_ONCE], processes)
        failures += failed
        have |= {(row.chip, row.fingerprint): row for row in new}
        rows = [have[key].renamed(one) for key, one in reversed(keys.items()) if key in have]
        results = Results(triton.__version__, tuple(rows))
        write_atomic(RESULTS, as_csv(results).encode())
        write_atomic(PAGE, with_table(PAGE.read_text(), table(results)).encode())
    return failures + problems(rows)


def disagreements(wanted: list[Compilation], known: Results) -> list[str]:
    """What docs/kernels.csv, its table and the kernels disagree on, without compiling anything."""
    have = {(row.chip, row.fingerprint) for row in known.rows}
    changed = [one for one in wanted if (one.chip.name, one.fingerprint) not in have]
    found = [f"{one.chip.name}: {one.name}, {one.dtype}, {one.case} is not in docs/kernels.csv" for one in changed[:20]]
    gone = have - {(one.chip.name, one.fingerprint) for one in wanted}
    if gone:
        found.append(f"docs/kernels.csv has {len(gone)} kernels that are no more")
    if found:
        found.append("run: python -m llmfast.kernels.aot")
    if with_table(PAGE.read_text(), table(known)) != PAGE.read_text():
        found.append("docs/kernels.md is not the table of docs/kernels.csv: run python -m llmfast.kernels.aot")
    return found + problems(known.rows)


def recompiled(wanted: list[Compilation], known: Results, processes: int) -> list[str]:
    """What the kernels show when they are compiled again."""
    have = {(row.chip, row.fingerprint): row for row in known.rows}
    rows, failures = compiled(wanted, processes)
    found = failures + problems(rows)
    if known.triton == triton.__version__:
        for row in rows:
            recorded = have.get((row.chip, row.fingerprint), row)
            if (row.registers, row.shared) != (recorded.registers, recorded.shared):
                found.append(f"{row.chip}: {row.kernel}, {row.dtype}, {row.case} takes {row.registers} registers, not "
                             f"the {recorded.registers} of docs/kernels.csv")  # fmt: skip
    return found


def nearest_to_spilling(wanted: list[Compilation], known: Results) -> list[Compilation]:
    """For each chip and kernel the one that takes the most registers, if it takes many: by what was recorded under its
    name, so that a changed kernel is among them before it has been compiled in full.
    """
    registers: dict[tuple[str, ...], int] = {}
    for row in known.rows:
        name = (row.chip, row.kernel, row.dtype, row.case)
        registers[name] = max(row.registers, registers.get(name, 0))
    most: dict[tuple[str, str], tuple[int, Compilation]] = {}
    for one in wanted:
        taken = registers.get((one.chip.name, one.name, one.dtype, one.case), 0)
        place = (one.chip.name, one.name)
        if taken >= MANY_REGISTERS and (place not in most or taken > most[place][0]):
            most[place] = (taken, one)
    return [one for _, one in most.values()]


def compiled(wanted: list[Compilation], processes: int) -> tuple[list[Resources], list[str]]:
    with Progress(transient=True) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        return compile_all(wanted, processes, lambda: progress.advance(task))
