"""The command: `python -m benchmarks.gpu --out DIR`, one section after another."""

from __future__ import annotations

import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from llmfast.benchmarking import records
from llmfast.benchmarking.facts import facts
from llmfast.benchmarking.records import Record, Results
from llmfast.files import write_atomic

# Seconds for each at most, starting its process included: ten minutes in all, and 200 s with --quick. What is asked
# most comes first, so that a run which is ended early has it.
SECTIONS = {
    "limits": (18, 8),
    "correctness": (80, 40),
    "launches": (25, 16),
    "decoding": (110, 42),
    "training": (115, 32),
    "layers": (95, 22),
    "llama_layers": (55, 14),
    "attention": (85, 20),
    "memory": (15, 6),
}
GRACE = (30, 15)  # after its time a section finishes the task at hand; then it is stopped
CONSOLE = Console(stderr=True)


@click.command(name="python -m benchmarks.gpu")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the results go.")
@click.option("--quick", is_flag=True, help="Fewer sizes and repetitions: about a third of the time.")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Only this section; may be repeated.")
@click.option("--isolate/--no-isolate", default=None, help="A process for each section (on a GPU by default).")
@click.option("--child", type=click.Choice(list(SECTIONS)), hidden=True)
@click.option("--until", type=float, default=math.inf, hidden=True, help="When the child's time is up (monotonic).")
def main(out: Path, quick: bool, only: tuple[str, ...], isolate: bool | None, child: str | None, until: float) -> None:
    """Measures the Triton kernels on this machine's GPU: DIR/gpu.json, DIR/targets.md and pictures."""
    torch.manual_seed(0)
    scale = "tiny" if not torch.cuda.is_available() else "quick" if quick else "full"
    (out / "parts").mkdir(parents=True, exist_ok=True)
    if child is not None:
        return section(child, out, scale, until)
    command = ["python", "-m", "benchmarks.gpu", "--out", str(out), *(["--quick"] if quick else [])]
    if scale == "tiny":
        CONSOLE.print("no GPU here: tiny sizes, which say that the command works and nothing about speed")
    isolate = torch.cuda.is_available() if isolate is None else isolate
    command += [word for name in only for word in ("--only", name)]
    known = facts(command) | {"gpu": gpu_facts(), "scale": scale, "sections": {}}
    for name in only or SECTIONS:
        (out / "parts" / f"{name}.json").unlink(missing_ok=True)
        CONSOLE.print(f"[bold]{name}[/bold], up to {seconds_of(name, scale)} s …")
        start = time.monotonic()
        problem = in_a_process(name, out, scale) if isolate else in_this_process(name, out, scale)
        known["sections"][name] = {"seconds": round(time.monotonic() - start, 1)}
        if problem:
            known["sections"][name]["problem"] = problem
            CONSOLE.print(f"  [red]{problem}[/red]", highlight=False)
        merge(out, known)
    results = records.load(out / "gpu.json")
    from benchmarks.gpu import targets

    text = summary(results, targets.table(results.records))
    write_atomic(out / "targets.md", text.encode())
    show(results, text)
    try:
        from benchmarks.gpu.plots import draw

        pictures = draw(results.records, out, results.facts["machine"]["gpu"] or "no GPU, meaningless")
        CONSOLE.print(f"wrote {out / 'gpu.json'}, targets.md and {len(pictures)} pictures")
    except ImportError:
        CONSOLE.print(f"wrote {out / 'gpu.json'} and targets.md; for the pictures pip install matplotlib")


def section(name: str, out: Path, scale: str, until: float) -> None:
    """Runs one, writing what there is after every task, and begins none after `until`."""
    from benchmarks.gpu.bench import Bench

    file = out / "parts" / f"{name}.json"

    def save(bench: Bench) -> None:
        records.save(Results(bench.facts, bench.limits if name == "limits" else {}, tuple(bench.records)), file)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = {} if name == "limits" else part(out, "limits").limits
    bench = Bench(device, scale, until, limits, save=save)
    try:
        importlib.import_module(f"benchmarks.gpu.{name}").run(bench)
    finally:
        save(bench)


def seconds_of(name: str, scale: str) -> float:
    return SECTIONS[name][scale == "quick"]


def in_this_process(name: str, out: Path, scale: str) -> str | None:
    """What went wrong, or None."""
    try:
        section(name, out, scale, math.inf if scale == "tiny" else time.monotonic() + seconds_of(name, scale))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def in_a_process(name: str, out: Path, scale: str) -> str | None:
    """The same where a kernel that reads where it may not ends a section, and not the whole run."""
    seconds, grace = seconds_of(name, scale), GRACE[scale == "quick"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--child", name]
    command += ["--until", str(time.monotonic() + seconds), *(["--quick"] if scale == "quick" else [])]
    log = out / "parts" / f"{name}.log"
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr, start_new_session=True) as process:
        try:
            code = process.wait(seconds + grace)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"stopped after {seconds + grace} s"
    if code == 0:
        return None
    last = (log.read_text().strip().splitlines() or ["no word on stderr"])[-1]
    return f"ended with {code}: {last[:300]}"


def part(out: Path, name: str) -> Results:
    try:
        return records.load(out / "parts" / f"{name}.json")
    except (OSError, ValueError):
        return Results({}, {}, ())


def merge(out: Path, known: dict[str, Any]) -> None:
    """The sections so far, those of earlier runs into the same folder too, as one file."""
    parts = {name: part(out, name) for name in SECTIONS}
    found: tuple[Record, ...] = tuple(record for p in parts.values() for record in p.records)
    more = {key: value for p in parts.values() for key, value in p.facts.items()}
    records.save(Results(known | more, parts["limits"].limits, found), out / "gpu.json")


def gpu_facts() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    wanted = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    query = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        said = []
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver, clocks and power limit": said[0] if said else None,
    }


def summary(results: Results, table: str) -> str:
    correct = results.facts.get("correctness")
    lines = [f"# {results.facts['machine']['gpu'] or 'No GPU: tiny sizes, meaningless figures'}", ""]
    if correct:
        lines += [
            f"Correctness: {correct['passed']} cases passed, {len(correct['failed'])} failed, "
            f"{correct['not_reached']} not reached.",
            *(f"- {name}: {'; '.join(problems)}" for name, problems in correct["failed"].items()),
            "",
        ]
    rates = {name: found["1"]["best"] for name, found in results.limits.items() if isinstance(found, dict)}
    lines += [f"Limits, in 10^9 a second: {', '.join(f'{n} {rate:,.0f}' for n, rate in rates.items())}.", "", table, ""]
    return "\n".join(lines)


def show(results: Results, text: str) -> None:
    """Every record in a line on stdout, then the targets."""
    table = Table("task", "sizes", "who", "time", "rate", "of limit", "times as fast as")
    for r in results.records:
        sizes = ", ".join(f"{name} {value}" for name, value in r.sizes.items())
        if r.problem is not None:
            table.add_row(r.name, sizes, f"{r.backend} {r.precision}", f"[dim]{r.problem[:60]}[/dim]")
            continue
        time_taken = f"{r.seconds.median * 1e6:,.1f} µs" if r.seconds else f"{(r.bytes or 0) / 2**20:,.0f} MiB"
        rate = ", ".join(f"{value:,.0f} {UNITS[name]}" for name, value in r.rates.items())
        share = "" if r.share_of_limit is None else f"{r.share_of_limit:.0%}"
        versus = ", ".join(f"{v.competitor} {v.ratio.median:.2f}" for v in r.versus)
        table.add_row(r.name, sizes, f"{r.backend} {r.precision}", time_taken, rate, share, versus)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(Markdown(text))


UNITS = {
    "tokens_per_second": "tokens/s",
    "megabytes_per_second": "MB/s",
    "gigabytes_per_second": "GB/s",
    "gigaflops_per_second": "GFLOP/s",
}

if __name__ == "__main__":
    main()
