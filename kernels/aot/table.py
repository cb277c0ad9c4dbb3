"""What the compiled kernels take: `docs/kernels.csv` for programs, a table in `docs/kernels.md` for people."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from .chips import CHIPS, KIB
from .compiler import Resources

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS, PAGE = DOCS / "kernels.csv", DOCS / "kernels.md"
BEGIN, END = "<!-- begin: python -m llmfast.kernels.aot -->", "<!-- end -->"
COLUMNS = [field.name for field in fields(Resources)]


@dataclass(frozen=True)
class Results:
    """Every compiled kernel, and the Triton that compiled it."""

    triton: str
    rows: tuple[Resources, ...]


def read(path: Path = RESULTS) -> Results:
    """`OSError` where there is no file; an empty result where it was written by another layout of columns."""
    with open(path, newline="") as file:
        triton = file.readline().removeprefix("# triton ").strip()
        table = csv.DictReader(file)
        if table.fieldnames != COLUMNS:
            return Results(triton, ())
        return Results(triton, tuple(_parsed(row) for row in table))


def as_csv(results: Results) -> str:
    text = io.StringIO()
    text.write(f"# triton {results.triton}\n")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows([getattr(row, column) for column in COLUMNS] for row in results.rows)
    return text.getvalue()


def _parsed(row: dict[str, str]) -> Resources:
    kinds = {"int": int, "float": float, "str": str}
    return Resources(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Resources)})


# ------------------------------------------------------------------------------------------------------------- verdicts


def problems(rows: Iterable[Resources]) -> list[str]:
    """What is wrong with them, a line each: registers spilled, too much shared memory, dots without matrix units."""
    found = []
    for row in rows:
        where = f"{row.chip}: {row.kernel}, {row.dtype}, {row.case}"
        if row.spilled:
            found.append(f"{where} spills {row.spilled} bytes of registers")
        if row.shared > CHIPS[row.chip].shared_a_program:
            found.append(f"{where} takes {row.shared} bytes of shared memory of {CHIPS[row.chip].shared_a_program}")
        expected = expected_instructions(row)
        if expected and row.instruction not in expected:
            found.append(f"{where} multiplies with {row.instruction or 'no matrix instruction'}, not {expected[0]}")
    return found


def _spilling(rows: Sequence[Resources]) -> str:
    """How many of them spill, by chip."""
    spilled = {chip: [row.spilled for row in rows if row.chip == chip and row.spilled] for chip in CHIPS}
    said = [f"{len(found)} on {chip} (up to {max(found)} bytes)" for chip, found in spilled.items() if found]
    return f"These spill: {', '.join(said)}." if said else "None of them spills."


# Kernels whose products are large: there a dot must use the largest matrix instruction that the chip has.
_LARGE_PRODUCTS = (
    "attention_forward.forward",
    "linear_cross_entropy.statistics",
    "linear_cross_entropy.logit_gradient",
)
_PRODUCTS = (*_LARGE_PRODUCTS, "attention_query_gradient.query_gradient", "attention_key_gradient.key_gradient",
             "attention_decoding.decoding", "matmul.multiply", "quantized_linear.quantized_linear")  # fmt: skip
_BY_CHIP = {
    "sm_80": ("mma.sync",),
    "default": ("mma.sync",),
    "sm_90": ("wgmma", "mma.sync"),
    "sm_100": ("tcgen05", "mma.sync"),
    "gfx942": ("v_mfma",),
}


def expected_instructions(row: Resources) -> tuple[str, ...]:
    """The matrix instructions that a kernel may use, the best first; none is expected of float32, which is exact.

    wgmma and tcgen05 take 64 rows at least, which the tiles of small products (decoding, few rows) do not have.
    """
    if row.dtype == "float32" or row.kernel not in _PRODUCTS:
        return ()
    best = _BY_CHIP[row.chip]
    large = row.kernel in _LARGE_PRODUCTS or (row.kernel == "matmul.multiply" and "large" in row.case)
    wide = not re.search(r"head dim 256", row.case)  # whose tiles are small
    return best[:1] if large and wide else best


# ---------------------------------------------------------------------------------------------------------------- table


def table(results: Results) -> str:
    """registers / KiB of shared memory / occupancy in percent, a line a kernel and configuration, a column a chip.

    Each the worst of the cases that a configuration serves (dropout, grouped heads, odd sizes, ...).
    """
    cells: dict[tuple[str, str, str], dict[str, list[Resources]]] = defaultdict(lambda: defaultdict(list))
    for row in results.rows:
        if row.dtype == "float16" or "descriptors" in row.case:
            continue
        size = row.case.split(",")[0]
        cells[row.kernel, row.dtype, size][row.chip].append(row)
    lines = [
        f"Compiled by Triton {results.triton}: {len(results.rows)} kernels. {_spilling(results.rows)}",
        "",
        "| kernel | dtype | size | " + " | ".join(f"{chip.name} ({chip.gpus})" for chip in CHIPS.values()) + " |",
        "|---|---|---|" + "---|" * len(CHIPS),
    ]
    for (kernel, dtype, size), chips in sorted(cells.items(), key=lambda item: _order(*item[0])):
        words = [_cell(chips[name]) if chips.get(name) else "" for name in CHIPS]
        lines.append(f"| {kernel} | {dtype} | {size} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def _cell(rows: list[Resources]) -> str:
    registers, shared = max(row.registers for row in rows), max(row.shared for row in rows)
    return f"{registers} / {shared / KIB:.0f} / {100 * min(row.occupancy for row in rows):.0f}"


def _order(kernel: str, dtype: str, size: str) -> tuple[str, str, int, str]:
    number = re.search(r"\d+", size)
    return kernel, dtype, int(number.group()) if number else 0, size


def with_table(page: str, text: str) -> str:
    """The page with what stands between its two marks replaced. `ValueError` where it has no marks."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"docs/kernels.md lacks the marks {BEGIN} and {END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
