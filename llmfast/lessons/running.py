"""A lesson run as the script that it is."""

from __future__ import annotations

import runpy
import time
from pathlib import Path

from llmfast.lessons import checking
from llmfast.lessons.catalogue import Lesson


def run(lesson: Lesson, pictures: Path | None = None) -> str:
    """Runs all cells of a lesson; a line on what was checked. What it draws is saved as PNG in the folder `pictures`.

    An `AssertionError` names a number that is not as the lesson says.
    """
    try:
        import matplotlib
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError('the lessons draw with matplotlib: pip install -e ".[lessons]"') from None
    matplotlib.use("Agg")
    plt.close("all")
    checking.confirmed.clear()
    start = time.perf_counter()
    runpy.run_path(str(lesson.path), run_name="__main__")
    seconds = time.perf_counter() - start
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for number in plt.get_fignums():
            plt.figure(number).savefig(pictures / f"{lesson.path.stem}-{number}.png", dpi=110, bbox_inches="tight")
    drawn = len(plt.get_fignums())
    plt.close("all")
    said = f"lesson {lesson.number}, {lesson.title}: {len(checking.confirmed)} results confirmed, {drawn} pictures"
    return f"{said}, {seconds:.0f} s; {len(checking.exercises(str(lesson.number)))} exercises wait for you"
