"""Writes the README's table of speeds from `benchmarks/results/cpu.json`, so that no figure is typed by hand.

pytest benchmarks --benchmark-only --benchmark-json benchmarks/results/cpu.json
python benchmarks/readme.py            # --check only compares, and fails where the README says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
START, END = "<!-- table:", "<!-- end of table -->"
OPS = {"causal attention": "causal attention", "layer norm": "LayerNorm", "gelu": "GELU, tanh"}
LENGTH = 1024


def table(results: dict) -> str:
    """A Markdown table: milliseconds of each op by backend, and tokens a second of `generate`."""
    rows = {(b["group"], b["extra_info"]["backend"], b["extra_info"].get("cache")): b for b in results["benchmarks"]}
    lines = ["| | pytorch | cpp | |", "|---|---|---|---|"]
    for op, title in OPS.items():
        for dtype in ("float32", "bfloat16"):
            group = f"{op}, {dtype}, T={LENGTH}"
            times = [1000 * rows[group, backend, None]["stats"]["median"] for backend in ("pytorch", "cpp")]
            ratio = times[0] / times[1]
            lines.append(f"| {title}, {dtype} | {times[0]:.2f} ms | {times[1]:.2f} ms | {ratio:.1f} × |")
    for cache, title in ((True, "with the KV cache"), (False, "without it")):
        group = "generate 128 tokens"
        rates = [rows[group, backend, cache]["extra_info"]["tokens_per_second"] for backend in ("pytorch", "cpp")]
        ratio = rates[1] / rates[0]
        lines.append(f"| `generate`, 128 tokens, {title} | {rates[0]:.0f}/s | {rates[1]:.0f}/s | {ratio:.1f} × |")
    info = results["benchmarks"][0]["extra_info"]
    cpu = results["machine_info"]["cpu"].get("brand_raw", "CPU")
    lines += [
        "",
        f"Medians on {info['threads']} threads of an {cpu} ({info['isa']} kernels, torch {info['torch']}): the ops at "
        f"GPT-2's width, forward, {LENGTH} tokens, batch 1; `generate` with the embedded model in float32, tokens a "
        "second. The last column is cpp against pytorch.",
    ]
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """The README with its table replaced."""
    head, _, rest = readme.partition(START)
    marker, _, rest = rest.partition("\n")
    _, _, tail = rest.partition(END)
    return f"{head}{START}{marker}\n{text}\n{END}{tail}"


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = with_table(before, table(json.loads(RESULTS.read_text(encoding="utf-8"))))
    if "--check" in sys.argv:
        sys.exit("README.md and benchmarks/results disagree: run python benchmarks/readme.py" if after != before else 0)
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
