"""What a campaign found, as JSON to keep and as tables to read. Losses stand there like wins."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import cpuinfo
from limits import UNITS
from rich import box
from rich.console import Console
from rich.table import Table

import llmfast
from peers import client
from peers.campaign import Group, Row
from peers.plan import BUSY, LONG, OURS, TARGETS, Case, Target


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def facts(threads: int, quick: bool) -> dict[str, Any]:
    """Where, when and by which code the figures were taken."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "command": f"pytest benchmarks -k peers --benchmark-only --threads {threads}" + (" --quick" if quick else ""),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "quick": quick,
        "machine": {
            "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
            "cores": os.cpu_count(),
            "threads": threads,
            "system": platform.platform(),
        },
        "versions": {"llmfast": llmfast.__version__, "python": platform.python_version(), **client.versions()},
    }


def row_of(group_name: str, group: Group, row: Row, case: Case) -> dict[str, Any]:
    """One engine in one case."""
    rates = group.rates(row, case.name)
    unit = "gigabytes_per_second" if case.new else "gigaflops_per_second"
    share = group.share(row, case)
    found: dict[str, Any] = {
        "group": group_name,
        "engine": row.engine.name,
        "library": row.engine.library,
        "precision": row.engine.precision,
        "case": case.name,
        "tokens_per_second": spread(rates, 1),
        unit: round(statistics.median(rates) * group.work(row, case) / 1e9, 1),
        "share_of_limit": None if share is None else round(share, 3),
    }
    if row.engine.library == OURS:
        others = [other for other in group.rows if other.engine.library != OURS and group.rates(other, case.name)]
        found["ratios"] = {other.engine.name: spread(group.ratios(row, case.name, other)) for other in others}
    return found


def target_of(group: Group, target: Target) -> dict[str, Any]:
    reached = group.reached(target)
    what = {LONG.name: "its GB/s at 32 tokens", BUSY.name: "its speed alone"}
    found: dict[str, Any] = {
        "ours": target.ours,
        "case": target.case,
        "against": target.peer or what[target.case],
        "least": target.least,
        "reached": spread(reached) if reached else None,
    }
    return found | {"met": bool(reached) and found["reached"]["median"] >= target.least}


def results(groups: dict[str, Group]) -> dict[str, Any]:
    rows = [(name, group, row) for name, group in groups.items() for row in group.rows]
    return {
        "limits": {name: {"before": g.limits_before, "after": g.limits_after} for name, g in groups.items()},
        "cpus_others_used": {name: group.others for name, group in groups.items()},
        "rows": [
            row_of(name, group, row, case)
            for name, group, row in rows
            for case in group.cases
            if group.rates(row, case.name)
        ],
        "memory": [
            {
                "engine": row.engine.name,
                "megabytes": round(row.memory / 1e6, 1),
                "bound": round(group.memory_bound(row) / 1e6, 1) if row.engine.library == OURS else None,
            }
            for _, group, row in rows
            if row.memory is not None
        ],
        "agreement": {row.engine.name: round(row.agreement, 5) for *_, row in rows if row.agreement is not None},
        "problems": {row.engine.name: row.problem for *_, row in rows if row.problem is not None},
        "targets": [target_of(groups[target.group], target) for target in TARGETS if target.group in groups],
    }


def tables(found: dict[str, Any]) -> str:
    """For a terminal."""
    # Only a file that is no terminal has a width of its own; the caller writes the text out.
    console = Console(file=StringIO(), width=118, force_terminal=False)
    cases = list(dict.fromkeys(row["case"] for row in found["rows"]))
    for name, limits in found["limits"].items():
        rows = [row for row in found["rows"] if row["group"] == name]
        console.print(_speeds(name, limits, cases, rows))
        if any(used and used > 0.1 for used in found["cpus_others_used"][name]):
            console.print(f"other processes were using {found['cpus_others_used'][name]} CPUs before and after")
    console.print(_memory(found["memory"]))
    console.print(_targets(found["targets"]))
    for engine, problem in found["problems"].items():
        console.print(f"{engine} was not measured: {problem}", markup=False, highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _speeds(name: str, limits: dict[str, Any], cases: list[str], rows: list[dict[str, Any]]) -> Table:
    table = _table(f"{name}: tokens a second (lowest–highest round), share of the limit")
    table.add_column("engine")
    for case in cases:
        table.add_column(case, justify="right")
    for engine in dict.fromkeys(row["engine"] for row in rows):
        cells = {row["case"]: row for row in rows if row["engine"] == engine}
        table.add_row(engine, *[_speed(cells[case]) if case in cells else "–" for case in cases])
    parts = []
    for kind in ("read", "fp32", "bf16", "int8"):
        taken = [limits[when] for when in ("before", "after")]
        if all(found[kind] for found in taken):
            best = [f"{found[kind][str(found['threads'])]['best']:.0f}" for found in taken]
            parts.append(f"{kind} {', '.join(best)} {UNITS[kind]}")
    table.caption = f"limits before, after: {'; '.join(parts)}"
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _speed(row: dict[str, Any]) -> str:
    rate = row["tokens_per_second"]
    share = "" if row["share_of_limit"] is None else f"  {row['share_of_limit']:.0%}"
    return f"{rate['median']:.0f} ({rate['min']:.0f}–{rate['max']:.0f}){share}"


def _memory(memory: list[dict[str, Any]]) -> Table:
    table = _table("memory: the most that loading and decoding take")
    for title in ("engine", "MB", "bound"):
        table.add_column(title, justify="left" if title == "engine" else "right")
    for row in memory:
        bound = row["bound"]
        verdict = "" if bound is None else f"{bound:.0f} {'met' if row['megabytes'] <= bound else 'MISSED'}"
        table.add_row(row["engine"], f"{row['megabytes']:.0f}", verdict)
    return table


def _targets(targets: list[dict[str, Any]]) -> Table:
    table = _table("what it should come to: times a peer's speed, or shares of its own")
    for title in ("", "case", "against", "at least", "reached (lowest–highest)", ""):
        table.add_column(title)
    for target in targets:
        reached = target["reached"]
        found = "not measured"
        if reached:
            found = f"{reached['median']:.2f} ({reached['min']:.2f}–{reached['max']:.2f})"
        verdict = "met" if target["met"] else "MISSED" if reached else ""
        table.add_row(target["ours"], target["case"], target["against"], f"{target['least']:.2f}", found, verdict)
    return table
