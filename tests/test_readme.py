"""The README says what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmfast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_example_gives_the_output_beside_it():
    output = " ".join(re.findall(r"^# (.*)$", README.split("print(", 1)[1].split("\n\n", 1)[0], re.MULTILINE))
    llm = llmfast.load("stories", backend="pytorch", precision="fp32")
    assert llm.generate("Once upon a time", temperature=0, stop="\n") == output
    for text, total in re.findall(r'llm.score\("(.*?)"\).total +# (-[0-9.]+)', README):
        assert llm.score(text).total == pytest.approx(float(total), abs=0.06)


def test_the_table_of_speeds_is_made_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
