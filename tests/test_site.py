"""The documentation site builds without a warning, with what its hooks add."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

for needed in ("material", "mkdocstrings", "jupytext", "nbconvert", "nbclient", "latex2mathml"):
    pytest.importorskip(needed, reason='the site needs pip install -e ".[docs]"')


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "LLMFAST_LESSONS": "quick", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lesson = (tmp_path / "lessons" / "05_attention_with_weights.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"?(https?:)?//", lesson)  # nothing from the network
    assert "<math" in lesson and list((tmp_path / "lessons" / "05_attention_with_weights").glob("*.png"))
    assert 'nf">gelu<' in (tmp_path / "source" / "llmfast" / "ops.py.html").read_text(encoding="utf-8")
    example = (tmp_path / "api" / "tokenizers.html").read_text(encoding="utf-8")
    assert "<blockquote>" not in example  # what doctests become where nothing fences them
