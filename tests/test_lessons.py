"""Every lesson runs, is short enough to type, has solutions that are right, and checkers that say what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from lessons_wrong_answers import HAS_TRITON, WRONG, solved

from llmfast.cli import cli
from llmfast.lessons import check, compiling, confirm, effort
from llmfast.lessons.catalogue import lesson, lessons
from llmfast.lessons.checking import difference, exercises, judgement
from llmfast.lessons.material import SHAKESPEARE, corpus

DATA = Path(__file__).parents[2] / "shared" / "data"  # where tiny Shakespeare is, if it is
NUMBERS = [lesson.number for lesson in lessons()]


def needs(number: int) -> list[pytest.MarkDecorator]:
    """What keeps a lesson from running here."""
    missing = compiling.why_not() if number == 15 else None
    if number == 16 and not HAS_TRITON:
        missing = "there is no Triton here"
    return [pytest.mark.skip(reason=missing)] if missing else []


RUN = [pytest.param(number, marks=needs(number)) for number in NUMBERS]
EXERCISES = [pytest.param(name, marks=needs(int(name.split(".")[0]))) for name in WRONG]


@pytest.mark.parametrize("mode", ["quick", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", RUN)
def test_a_lesson_runs(number, mode, tmp_path):
    pytest.importorskip("matplotlib")
    chosen = {"LLMFAST_LESSONS": mode, "PYTHONWARNINGS": "ignore"}
    if (DATA / SHAKESPEARE).is_file():
        chosen["LLMFAST_DATA"] = str(DATA)
    command = [sys.executable, "-m", "llmfast", "lessons", "run", str(number)]
    ran = subprocess.run(command, env=os.environ | chosen, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert re.search(r"[1-9]\d* results confirmed", ran.stdout), ran.stdout[-500:]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_is_short_and_whole(number):
    chosen = lesson(number)
    assert len(chosen.code()) <= 60
    text = chosen.path.read_text(encoding="utf-8")
    assert len(chosen.summary) < 140 and chosen.summary[-1] in ".?"
    assert "**Read next**" in text and chosen.solutions.name in text
    for file in re.findall(r"`((?:llmfast|csrc|kernels|docs|lessons|benchmarks|examples)/[\w/.-]+\.\w+)`", text):
        assert (Path(__file__).parents[1] / file).is_file(), f"{chosen.path.name} names {file}"
    for name in exercises(str(number)):
        assert f'check("{number}.{name}", ' in text and f"**{number}.{name}**" in text
        assert f"{number}.{name}" in WRONG or number == 16
    assert len(exercises(str(number))) in (2, 3)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_solution_is_right(exercise):
    assert judgement(exercise, solved[exercise]) is None


def in_place(x, weight, eps):
    x /= (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    x *= weight
    return x


@pytest.mark.parametrize(
    "exercise, answer",
    [
        ("5.3", lambda s, W: solved["5.3"](s, W).tolist()),
        ("6.1", in_place),
        ("8.1", lambda w, g, m, lr, beta: list(solved["8.1"](w, g, m, lr, beta))),
        ("8.2", lambda gs, most: (g for g in solved["8.2"](gs, most))),
        ("8.3", lambda s, n, w, lr: torch.tensor(lr * (s + 1) / w) if s < w else lr * (n - s) / (n - w)),
        ("9.1", lambda logits, k: logits.masked_fill_(logits < logits.topk(k).values[-1], -torch.inf).numpy()),
        ("9.2", lambda ps, p: tuple(torch.tensor(solved["9.2"](ps, p)))),
        ("9.3", lambda ps, finger: torch.tensor(float(solved["9.3"](ps, finger)))),
        ("10.3", lambda E, B, beta, target: torch.tensor(solved["10.3"](E, B, beta, target))),
        ("12.2", lambda W, A, B, scale: W.add_(B @ A, alpha=scale)),
        ("12.3", lambda question, answer: torch.tensor([-100.0] * (len(question) - 1) + answer)),
        ("13.1", lambda table, q, count: torch.cosine_similarity(table, q[None]).argsort(descending=True)[:count]),
        ("13.2", lambda rankings, k=60: tuple(solved["13.2"](rankings, k))),
        ("17.2", lambda packed: torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8),
        ("18.3", lambda memory, weights, cache: float(max(0, (memory - weights) // cache))),
    ],
)
def test_a_right_answer_may_have_another_form(exercise, answer):
    assert judgement(exercise, answer) is None


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_checker_says_what_is_wrong(exercise):
    answers = WRONG[exercise]
    assert len(answers) >= 3
    for answer, words in answers:
        said = judgement(exercise, answer)
        assert said is not None, f"{words!r} is wrong, and passes"
        assert words in said


def test_all_lessons_are_listed_in_order():
    assert [chosen.number for chosen in lessons()] == sorted(NUMBERS)
    listed = CliRunner().invoke(cli, ["lessons"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    for chosen in lessons():
        assert chosen.title in listed.output
    for verb in ("open", "run"):
        refused = CliRunner().invoke(cli, ["lessons", verb, "99"])
        assert refused.exit_code == 2 and refused.output.count("\n") == 1 and "no lesson 99" in refused.output


def test_a_lesson_becomes_a_notebook_and_is_not_overwritten(tmp_path):
    pytest.importorskip("jupytext")
    arguments = ["lessons", "open", "1", "--no-browser", "--dir", str(tmp_path)]
    made = CliRunner().invoke(cli, arguments)
    notebook = Path(made.output.strip())
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert made.exit_code == 0 and content["cells"][0]["cell_type"] == "markdown"
    assert content["metadata"]["kernelspec"]["name"] == "python3"  # or Jupyter asks which
    notebook.write_text("mine", encoding="utf-8")
    CliRunner().invoke(cli, arguments)
    assert notebook.read_text(encoding="utf-8") == "mine"


def test_without_the_extra_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    refused = CliRunner().invoke(cli, ["lessons", "open", "1", "--dir", str(tmp_path)])
    assert (
        refused.exit_code == 2 and refused.output == 'llmfast: notebooks need the extra: pip install -e ".[lessons]"\n'
    )


def test_differences_are_said():
    assert difference([1, 2], torch.tensor([1.0, 2.0])) is None
    assert "is 3 at [1], where it should be 2" in str(difference([1, 3], [1, 2]))
    assert "transposed" in str(difference(torch.zeros(2, 3), torch.zeros(3, 2)))
    assert "of type str" in str(difference("x", 1.0))
    assert "'b', not 'a'" in str(difference("b", "a"))
    assert "is nan" in str(difference(float("nan"), 1.0)) and difference(float("-inf"), float("-inf")) is None
    assert difference(2.0, 1.0, mistakes={"doubled": 2.0}) == "doubled"
    assert difference(None, 1.0, where="here").startswith("here: there is no answer")
    with pytest.raises(AssertionError, match="the sum: it is 1"):
        confirm("the sum", 1.0, 2.0)


def test_a_check_prints(capsys):
    check("1.1", lambda counts, c, size: 1 / 0)
    assert "✗ 1.1: it raises ZeroDivisionError" in capsys.readouterr().out
    check("1.1", lambda counts, c, size: None)
    assert capsys.readouterr().out == "○ 1.1 waits for you\n"
    check("1.1", solved["1.1"])
    assert capsys.readouterr().out == "✓ 1.1 is right\n"
    with pytest.raises(ValueError, match="no exercise 1.9; lesson 1 has 1, 2, 3"):
        check("1.9", 1)


def test_without_shakespeare_there_is_another_text(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LLMFAST_HOME", str(tmp_path))
    monkeypatch.delenv("LLMFAST_DATA", raising=False)
    other = corpus()
    assert not other.is_shakespeare and len(other.text) > 300_000 and "curl" in capsys.readouterr().out
    (tmp_path / SHAKESPEARE).write_text("0123456789", encoding="utf-8")
    book = corpus()
    assert book.is_shakespeare and (book.train, book.validation) == ("012345678", "9")
    monkeypatch.setenv("LLMFAST_LESSONS", "quick")
    assert effort(quick=1, full=2) == 1


def test_a_notebook_shows_each_picture_once():
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = jupytext.read(lesson(4).path)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    cells = [cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", [])]
    shown = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]
    assert shown == [1, 1, 1]
