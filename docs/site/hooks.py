"""What the documentation site has beside the pages of `docs/`: lessons with their output and pictures, the source files
that pages link to, the list of changes, and formulas as MathML, which browsers draw without a script."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jupytext
import latex2mathml.converter
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

from llmfast.lessons import effort

ROOT = Path(__file__).resolve().parents[2]
LESSONS = ROOT / "lessons"
ELSEWHERE = re.compile(r"\]\(\.\./((?!docs/)[\w./-]+)\)")  # a link to a file outside docs/
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
QUICK = "*Run in a few seconds for this page: what is trained has hardly begun, and its pictures say nothing yet.*"
LANGUAGES = {".py": "python", ".cpp": "cpp", ".inl": "cpp", ".h": "cpp", ".json": "json"}


def on_config(config: Any) -> None:
    """The lessons' pages in the list of pages, as many as there are."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # in what runs the lessons: they name paths of the machine that builds
    for entry in config.nav:
        if entry.get("Lessons") == "lessons/":
            entry["Lessons"] = [f"lessons/{path.stem}.md" for path in lesson_files()]


def on_files(files: Files, config: Any) -> None:
    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    add("changelog.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    linked = {name for file in files.documentation_pages() for name in ELSEWHERE.findall(file.content_string)}
    for name in sorted(linked):
        add(page_of(name), source_page(name))
    for path in lesson_files():
        body, pictures = lesson_page(path)
        add(f"lessons/{path.stem}.md", body)
        for picture, content in pictures.items():
            add(f"lessons/{picture}", content)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = page.file.src_uri.count("/")
    return ELSEWHERE.sub(lambda match: f"]({'../' * depth}{page_of(match[1])})", markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    def mathml(match: re.Match[str]) -> str:
        formula = match[3].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return latex2mathml.converter.convert(formula, display="inline" if match[2] == "(" else "block")

    if page.file.src_uri.startswith("lessons/"):  # what cells print is often prose
        html = html.replace('class="language-text highlight"', 'class="language-text highlight printed"')
    return FORMULA.sub(mathml, html)


def page_of(name: str) -> str:
    return f"source/{name}.md"


def source_page(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        return text
    return f"# {name}\n\n````{LANGUAGES[Path(name).suffix]}\n{text}````\n"


def lesson_files() -> list[Path]:
    return sorted(LESSONS.glob("[0-9][0-9]_*.py"))


def lesson_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A lesson as Markdown, run from top to bottom, and its pictures by the names that they have there."""
    notebook = jupytext.read(path)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    name = {"unique_key": path.stem, "output_files_dir": path.stem}
    without_drawing = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["picture"]}})
    body, resources = MarkdownExporter(config=without_drawing).from_notebook_node(notebook, resources=name)
    if effort(quick=True, full=False):
        title, rest = body.split("\n", 1)
        body = f"{title}\n\n{QUICK}\n{rest}"
    return body, resources["outputs"]
