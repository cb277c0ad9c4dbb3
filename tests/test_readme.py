"""The README and the pages of `docs/` say what is so: their snippets print what they say, their links lead somewhere.

An output is stated in a Python snippet in one of two ways, and such a snippet stands by itself:

    print(llmfast.__version__)
    # 0.1.0
    1 / 3  # 0.33: a literal, with as many digits as are sure
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import llmfast
from llmfast.backends import _registry, cpp, pytorch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"-?\d+(?:\.(\d+))?(?=$|[\s:;,.])")


@dataclass(frozen=True)
class Output:
    """What a snippet says that one of its statements gives."""

    statement: ast.stmt
    text: str
    printed: bool

    def problem(self, found: object) -> str | None:
        """Why this is not `found`, or None."""
        if self.printed:
            shown, stated = portable(str(found)), portable(self.text)
        elif (number := NUMBER.match(self.text)) and isinstance(found, (int, float)):
            shown, stated = f"{found:.{len(number[1] or '')}f}", number[0]
        else:
            shown, stated = repr(found), repr(leading_literal(self.text))
        return None if shown == stated else f"it gives {shown!r}, not {stated!r}"


def portable(text: str) -> str:
    """Without what depends on the machine, and with single blanks."""
    return re.sub(r"\w+ kernels, \d+ threads", "… kernels, … threads", " ".join(text.split()))


def leading_literal(text: str) -> object:
    """The Python literal that a comment begins with, or `NotImplemented`."""
    for end in (len(text), *(match.start() for match in re.finditer(r"[:;,] ", text))):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text[:end])
    return NotImplemented


def outputs(snippet: str) -> list[Output]:
    """In the order of the statements. A print without a comment line below it states nothing."""
    lines, found = snippet.splitlines(), []
    for statement in ast.parse(snippet).body:
        end = statement.end_lineno
        if not isinstance(statement, ast.Expr) or end is None:
            continue
        if isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func) == "print":
            below = re.match(r"(# .*\n)+", "\n".join([*lines[end:], ""]))
            if below:
                found.append(Output(statement, re.sub(r"^# ", "", below[0], flags=re.MULTILINE), True))
        else:
            comment = lines[end - 1][statement.end_col_offset or 0 :].strip().removeprefix("# ")
            if NUMBER.match(comment) or leading_literal(comment) is not NotImplemented:
                found.append(Output(statement, comment, False))
    return found


def snippets(page: Path) -> list[str]:
    """Those that state an output."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if outputs(block)]


def problems(snippet: str, names: dict[str, object]) -> list[str]:
    """Runs a snippet; what in it is not as stated."""
    stated, found = {output.statement.lineno: output for output in outputs(snippet)}, []
    for statement in ast.parse(snippet).body:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if isinstance(statement, ast.Expr):
                value = eval(ast.unparse(statement), names)
            else:
                exec(ast.unparse(statement), names)
        if (output := stated.get(statement.lineno)) is not None:
            problem = output.problem(printed.getvalue() if output.printed else value)
            if problem is not None:
                found.append(f"{ast.unparse(statement)}: {problem}")
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
@pytest.mark.skipif(
    cpp.why_not("linear", torch.device("cpu"), torch.float32) is not None or torch.cuda.is_available(),
    reason="the figures are those of the C++ kernels",
)
def test_snippets_print_what_they_say(page, tmp_path, monkeypatch, request):
    for model in ("smollm2", "minilm"):
        if any(f'"{model}"' in snippet for snippet in snippets(page)):
            request.getfixturevalue(model)  # skips where it can't be had
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["llmfast.backends"], "_registry", dict(_registry))
    for snippet in snippets(page):
        names: dict[str, object] = {"llmfast": llmfast, "x": torch.zeros(3), "module": pytorch}
        assert problems(snippet, names) == []


def test_outputs_are_found_and_differences_noticed():
    assert len([output for snippet in snippets(ROOT / "README.md") for output in outputs(snippet)]) >= 4
    for right in (
        "print(1)\n# 1",
        "print('a  b')\n# a\n# b",
        "2 / 3  # 0.67: rounded",
        "'x'.upper()  # 'X'",
        "(1, 2)  # (1, 2): a pair",
    ):
        assert len(outputs(right)) == 1 and problems(right, {}) == []
    for wrong in ("print(1)\n# 2", "2 / 3  # 0.66", "-2 / 3  # 0.67", "'x'  # 'y'", "(1, 2)  # (1, 3)", "None  # 0.0"):
        assert len(problems(wrong, {})) == 1
    for silent in ("x = 1  # 2", "print(1)\n\n# 2", "abs(1)  # its magnitude", "print(1)  # 2"):
        assert outputs(silent) == []


def test_the_table_of_speeds_is_made_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
