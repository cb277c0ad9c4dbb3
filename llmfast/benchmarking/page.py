"""A run as a page: one HTML file that needs nothing else, its pictures inside it, and the same pictures as PNG files.

What was slower than a competitor stands above the tables, as plainly as the pictures show what was faster, and so does
everything that was not measured. The page is readable in light and in dark, and without JavaScript.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmfast.benchmarking import limits, plots
from llmfast.benchmarking.drawing import DARK, LIGHT, as_svg
from llmfast.benchmarking.records import GROUPS, Record, Results
from llmfast.benchmarking.startup_cases import ANY
from llmfast.benchmarking.tables import figure_of, problems, sizes_of
from llmfast.files import write_atomic

STYLE = Path(__file__).with_name("page.css")
PAGE = "index.html"
EVEN = 0.005  # so much faster or slower is neither
MANY = 12  # rows from which a table is folded


def write(results: Results, folder: str | Path) -> Path:
    """Writes `index.html` and a PNG for each picture into `folder`, and returns the page's path.

    `ValueError` in a line where there is nothing to report or matplotlib is missing.
    """
    if not results.records and not results.limits:
        raise ValueError("there are no results to report")
    plots.require_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    svgs = {}
    for name, draw in plots.plots(results).items():
        figure = draw(LIGHT)
        svgs[name] = as_svg(figure)
        write_atomic(folder / f"{name}.png", functools.partial(figure.savefig, format="png", dpi=plots.DPI))
    page = folder / PAGE
    write_atomic(page, html(results, svgs).encode())
    return page


def html(results: Results, svgs: dict[str, str]) -> str:
    """The page, around pictures that are drawn already."""
    parts = [_head(results), _limits(results), _losses(results.records), _unmeasured(results.records)]
    # A picture belongs to the group that its name begins with; those of no group stand on top.
    shown = {name: group for group in GROUPS for name in svgs if name.split("-")[0] == group}
    parts.append(_pictures({name: svg for name, svg in svgs.items() if name not in shown}))
    for group, description in GROUPS.items():
        if found := results.of(group):
            parts.append(f'<h2 id="{group}">{group.capitalize()}</h2><p>{_sentence(description)}</p>')
            parts.append(_pictures({name: svg for name, svg in svgs.items() if shown.get(name) == group}))
            parts += _tables(found)
    title = f"llmfast on {_machine(results.facts)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_colors()}{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


def _colors() -> str:
    """The themes' colours as variables, which the page and the pictures use."""
    light, dark = ("".join(f"--{name}:{color};" for name, color in theme.items()) for theme in (LIGHT, DARK))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _head(results: Results) -> str:
    facts, machine = results.facts, results.facts.get("machine", {})
    commit = str(facts.get("commit") or "")[:12] + (" with changes" if facts.get("dirty") else "")
    rows = {
        "machine": ", ".join(str(machine[key]) for key in ("cpu", "gpu") if machine.get(key)),
        "cores": machine.get("cores"),
        "threads": facts.get("threads"),
        "instruction set": facts.get("isa"),
        "system": machine.get("system"),
        "versions": ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()),
        "commit": commit,
        "date": facts.get("date"),
        "command": facts.get("command"),
    }
    links = " · ".join(f'<a href="#{group}">{group}</a>' for group in GROUPS if results.of(group))
    body = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items() if value)
    return f"<h1>llmfast, measured</h1>\n<nav>{links}</nav>\n<dl>{body}</dl>"


def _machine(facts: dict[str, Any]) -> str:
    machine = facts.get("machine", {})
    return str(machine.get("gpu") or machine.get("cpu") or "this machine")


def _limits(results: Results) -> str:
    """What the machine can do at most, which the shares are shares of."""
    runs = plots.measurements(results)
    found = {name: limits.best(runs, name) for name in limits.UNITS}
    cells = [f"<td>{value:,.0f} {limits.UNITS[name]}</td>" for name, value in found.items() if value]
    if not cells:
        return "<p>The machine's limits were not measured.</p>"
    names = "".join(f"<th>{name}</th>" for name, value in found.items() if value)
    return (
        "<h2>What this machine can do</h2><p>Memory read and copied, and arithmetic in each format, on all threads: "
        "the best of the run. Shares of the limit are shares of whichever of them bounds the work. In the pictures a "
        "line is the median of some rounds, its band all of them, and a dotted line or a pale bar the limit.</p>"
        f"<table><tr>{names}</tr><tr>{''.join(cells)}</tr></table>"
    )


def _losses(records: Sequence[Record]) -> str:
    """Everything of ours that is slower than a competitor, slowest first."""
    compared = [(record, versus) for record in records for versus in record.versus]
    if not compared:
        return ""
    won = [pair for pair in compared if pair[1].ratio.median > 1 + EVEN]
    lost = sorted((p for p in compared if p[1].ratio.median < 1 - EVEN), key=lambda pair: pair[1].ratio.median)
    said = (
        f"Of {len(compared)} comparisons {len(won)} are faster than the competitor, {len(lost)} slower, and "
        f"{len(compared) - len(won) - len(lost)} as fast."
    )
    rows = [
        f"<tr><td>{_what(r)}</td><td>{escape(r.backend)} {escape(r.precision)}</td><td>{escape(v.competitor)}</td>"
        f'<td class="lost">{v.ratio.median:.2f} ×</td><td>{v.ratio.low:.2f} to {v.ratio.high:.2f}</td></tr>'
        for r, v in lost
    ]
    head = "<tr><th>what</th><th>who</th><th>slower than</th><th>speed</th><th>in single rounds</th></tr>"
    return f"<h2>Won and lost</h2><p>{said}</p>" + _folded(head, rows, "What is slower", opened=True)


def _unmeasured(records: Sequence[Record]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in problems(records))
    return f'<h2>Not measured</h2><ul class="lost">{lines}</ul>' if lines else ""


def _tables(records: Sequence[Record]) -> Iterator[str]:
    """One for each thing that was measured."""
    for name in dict.fromkeys(record.name for record in records):
        mine = [record for record in records if record.name == name]
        columns = ["what", "who", "figure", "rounds,_low_to_high", "limit_share", "speed_against_competitors"]
        head = "<tr>" + "".join(f"<th>{column.replace('_', ' ')}</th>" for column in columns) + "</tr>"
        yield _folded(head, [_row(record) for record in mine], name.replace("_", " "))


def _folded(head: str, rows: list[str], title: str, opened: bool = False) -> str:
    if not rows:
        return ""
    table = f"<table>{head}{''.join(rows)}</table>"
    opens = " open" if opened or len(rows) <= MANY else ""
    return f"<details{opens}><summary>{escape(title)} ({len(rows)})</summary>{table}</details>"


def _row(record: Record) -> str:
    if record.problem is not None:
        problem = f'<td colspan="4" class="lost">not measured: {escape(record.problem)}</td>'
        return f"<tr><td>{_what(record)}</td><td>{_who(record)}</td>{problem}</tr>"
    share = ""
    if record.share_of_limit is not None:
        width = min(1.0, record.share_of_limit)
        bar = f'<span class="share"><i style="width:{width:.1%}"></i></span>'
        share = f"{bar} {record.share_of_limit:.0%} of {record.limit}"
    spread = ""
    if record.seconds is not None:
        low, high = record.seconds.low / record.seconds.median, record.seconds.high / record.seconds.median
        spread = f"{record.seconds.rounds}, {low - 1:+.0%} to {high - 1:+.0%} of the time"
    ratios = ", ".join(
        f'<span class="{"won" if v.ratio.median >= 1 else "lost"}">{v.ratio.median:.2f} × {escape(v.competitor)}</span>'
        for v in record.versus
    )
    note = f"<br><small>{escape(record.note)}</small>" if record.note else ""
    return (
        f"<tr><td>{_what(record)}{note}</td><td>{_who(record)}</td><td>{escape(figure_of(record))}</td>"
        f"<td>{spread}</td><td>{share}</td><td>{ratios}</td></tr>"
    )


def _sentence(text: str) -> str:
    return escape(f"{text[0].upper()}{text[1:]}.")


def _what(record: Record) -> str:
    parts: Iterable[str | None] = (record.name.replace("_", " "), record.model, sizes_of(record))
    return escape(", ".join(part for part in parts if part))


def _who(record: Record) -> str:
    return escape(record.backend if record.precision == ANY else f"{record.backend} {record.precision}")


def _pictures(svgs: dict[str, str]) -> str:
    figures = [f'<figure role="img" aria-label="{escape(name)}">{svg}</figure>' for name, svg in svgs.items()]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""
