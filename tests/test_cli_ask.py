"""The README's question to a folder of manuals, with the real models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmfast.cli import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_readme_shows_what_is_answered(monkeypatch, tmp_path, smollm2, minilm):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, output = re.search(r"\n\$ (llmfast index examples.+)\n([^`]+)```", readme).groups()
    monkeypatch.chdir(ROOT)
    said = ""
    for part in command.replace("manuals.index", str(tmp_path / "manuals.index")).split(" && "):
        name, *arguments = re.findall(r'"[^"]*"|\S+', part)
        assert name == "llmfast"
        result = CliRunner().invoke(cli, [a.strip('"') for a in arguments])
        assert result.exit_code == 0, result.output
        said += result.output
    assert said.replace(str(tmp_path / "manuals.index"), "manuals.index").split() == output.split()
