"""The lessons, as the files `NN_name.py` of `lessons/` say themselves: number, title and one line in their first cell.

A lesson is a Python file in cells (jupytext's percent form): a script for tests, a notebook for readers. The folder
travels with the package as `llmfast/lessons/texts`, in a clone a link to `lessons/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"
FIRST_CELL = re.compile(r"# %% \[markdown\]\n# # (\d+)\. (.+)\n#\n# \*\*([^*]+)\*\*\n")
CELL = re.compile(r"^# %%", re.MULTILINE)
TAGGED = re.compile(r' tags=\["(picture|given)"\]')


@dataclass(frozen=True)
class Lesson:
    number: int
    title: str
    summary: str  # one sentence
    path: Path

    @property
    def solutions(self) -> Path:
        return self.path.parent / "solutions" / self.path.name

    def code(self) -> list[str]:
        """The lines that a reader types: not comments, imports, lone brackets, what is confirmed, exercises to fill in,
        or cells with the tag "picture" or "given", which draw and measure."""
        cells = CELL.split(self.path.read_text(encoding="utf-8"))[1:]
        typed = [
            cell
            for cell in cells
            if not cell.startswith(" [markdown]") and "\ncheck(" not in cell and not TAGGED.match(cell)
        ]
        lines = [line.strip() for cell in typed for line in cell.splitlines()[1:]]
        return [
            line
            for line in lines
            if re.search(r"\w", line) and not line.startswith(("#", "import ", "from ", "confirm("))
        ]


def lessons() -> list[Lesson]:
    """All of them, in reading order."""
    found = []
    for path in sorted(TEXTS.glob("[0-9][0-9]_*.py")):
        first = FIRST_CELL.search(path.read_text(encoding="utf-8"))
        if first is None:
            raise ValueError(f"{path} does not begin with a cell of its number, title and summary")
        summary = " ".join(line.removeprefix("#").strip() for line in first[3].splitlines())
        found.append(Lesson(int(first[1]), first[2], summary, path))
    return found


def lesson(number: int) -> Lesson:
    """Lesson `number`; a `ValueError` names those that there are."""
    for found in lessons():
        if found.number == number:
            return found
    raise ValueError(f"there is no lesson {number}; there are 1 to {lessons()[-1].number}")
