"""The report of a run as one page: what was measured before and after, the curves, and answers side by side."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmfast.files import write_atomic
from llmfast.finetuning.answers import Answer

PAGE = "report.html"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd;
text-align: left; vertical-align: top; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; width: 25%; font-size: 13px; } img { max-width: 100%; }
"""


def write_page(
    path: Path,
    title: str,
    lines: Sequence[str],
    before: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
    curves: Path,
    answers: Sequence[Answer] = (),
) -> None:
    """One file without any other. What models and people wrote is shown as text, whatever it is."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
    parts += _figures(before, after)
    if curves.exists():
        parts.append(f'<img alt="losses" src="data:image/png;base64,{base64.b64encode(curves.read_bytes()).decode()}">')
    for part, figures in after.items():
        if "confusion" in figures:
            parts += _confusion(part, figures)
    if answers:
        parts.append("<h2>Answers to what was held out</h2><table>")
        parts.append("<tr><th>asked</th><th>expected</th><th>before</th><th>after</th></tr>")
        for one in answers:
            cells = (one.question.text, one.question.expected, one.before, one.after)
            parts.append("<tr>" + "".join(f'<td class="text">{html.escape(c)}</td>' for c in cells) + "</tr>")
        parts.append("</table>")
    document = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    write_atomic(path, (document + "\n".join(parts) + "\n").encode())


def _figures(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = ["<table><tr><th></th><th></th><th>before</th><th>after</th></tr>"]
    for part, figures in after.items():
        for name, value in figures.items():
            if isinstance(value, float):
                old = before.get(part, {}).get(name)
                cells = "".join(f'<td class="number">{"" if v is None else f"{v:.4f}"}</td>' for v in (old, value))
                rows.append(
                    f"<tr><td>{html.escape(part)}</td><td>{html.escape(name.replace('_', ' '))}</td>{cells}</tr>"
                )
    return [*rows, "</table>"]


def _confusion(part: str, figures: Mapping[str, Any]) -> list[str]:
    labels = [html.escape(label) for label in figures["labels"]]
    head = "".join(f"<th>→ {label}</th>" for label in labels)
    rows = [f"<h2>Which class was taken for which ({html.escape(part)})</h2><table><tr><th></th>{head}</tr>"]
    for label, counts in zip(labels, figures["confusion"], strict=True):
        cells = "".join(f'<td class="number">{count}</td>' for count in counts)
        rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    return [*rows, "</table>"]
