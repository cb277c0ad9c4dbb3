"""Writes the README's tables from `benchmarks/results`, so that no figure is typed by hand.

pytest benchmarks --benchmark-only -k "not peers" --benchmark-json benchmarks/results/cpu.json
pytest benchmarks --benchmark-only -k peers      # writes benchmarks/results/peers.json itself
python benchmarks/quality.py … --out benchmarks/results/quality.json
python benchmarks/readme.py            # --check only compares, and fails where the README says something else

A table whose results are not there stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPS = {"causal attention": "causal attention", "layer norm": "LayerNorm", "gelu": "GELU, tanh"}
LENGTH = 1024


def speeds(results: dict[str, Any]) -> str:
    """A Markdown table: milliseconds of each op by backend, and tokens a second of `generate`."""
    ours = [b for b in results["benchmarks"] if "backend" in b["extra_info"]]
    rows = {(b["group"], b["extra_info"]["backend"], b["extra_info"].get("cache")): b for b in ours}
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
    info = ours[0]["extra_info"]
    cpu = results["machine_info"]["cpu"].get("brand_raw", "CPU")
    lines += [
        "",
        f"Medians on {info['threads']} threads of an {cpu} ({info['isa']} kernels, torch {info['torch']}): the ops at "
        f"GPT-2's width, forward, {LENGTH} tokens, batch 1; `generate` with the embedded model in float32, tokens a "
        "second. The last column is cpp against pytorch.",
    ]
    return "\n".join(lines)


def peers(results: dict[str, Any]) -> str:
    """GPT-2 124M: tokens a second by case and precision, and how many times the peers' speed that is."""
    libraries = list(dict.fromkeys(row["library"] for row in results["rows"] if "ratios" not in row))
    lines = [f"| | llmfast | of the limit | {' | '.join(libraries)} |", "|---|---|---|" + "---|" * len(libraries)]
    alone = [row for row in results["rows"] if "busy" not in row["case"]]
    for case in dict.fromkeys(row["case"] for row in alone):
        rows = [row for row in alone if row["case"] == case]
        for ours in (row for row in rows if "ratios" in row):
            cells = []
            for library in libraries:
                other = [row for row in rows if (row["library"], row["group"]) == (library, ours["group"])]
                cells += [_peer(other[0], ours["ratios"][other[0]["engine"]]) if other else "–"]
            share = "–" if ours["share_of_limit"] is None else f"{ours['share_of_limit']:.0%}"
            lines.append(f"| {case}, {ours['precision']} | {_rate(ours)} | {share} | {' | '.join(cells)} |")
    machine, versions = results["machine"], results["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("llama-cpp-python", "ctranslate2", "transformers"))
    lines += [
        "",
        f"Tokens a second of GPT-2 124M, batch 1, on {machine['threads']} threads of an {machine['cpu']}: medians of "
        "rounds in which everybody takes turns, and in brackets how many times as fast llmfast is (the median of each "
        "round's ratio). The limit is the bandwidth of reading memory, when decoding, and arithmetic, for a prompt, "
        f"measured in the same run. {used}.",
    ]
    return "\n".join(lines)


def _rate(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']['median']:.0f}/s"


def _peer(row: dict[str, Any], ratio: dict[str, float]) -> str:
    return f"{row['precision']} {_rate(row)} ({ratio['median']:.2f} ×)"


def quality(results: dict[str, Any]) -> str:
    """What a precision costs: the change of the loss on each text, and how often the likeliest token stays the same."""
    lines = ["| text | precision | loss, nats a token | KL | same first choice |", "|---|---|---|---|---|"]
    for text, precisions in results["results"].items():
        for precision, found in precisions.items():
            if "loss" in found:
                lines.append(f"| {text} | {precision} | {found['loss']:.4f} | | |")
                continue
            change, divergence, same = found["loss_change"], found["kl_divergence"], found["top1_agreement"]
            lines.append(f"| {text} | {precision} | {change:+.4f} | {divergence:.4f} | {same:.1%} |")
    model = Path(results["model"]).name  # wherever it was
    return "\n".join([*lines, "", f"The model is `{model}`; what stands below fp32 is the difference from it."])


# The name in the README's markers -> where the figures are, and what makes a table of them.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "table": ("cpu.json", speeds),
    "peers": ("peers.json", peers),
    "quality": ("quality.json", quality),
}


def with_table(readme: str, name: str, text: str) -> str:
    """The README with what stands between `<!-- name: … -->` and `<!-- end of name -->` replaced."""
    start, end = f"<!-- {name}:", f"<!-- end of {name} -->"
    head, found, rest = readme.partition(start)
    marker, _, rest = rest.partition("\n")
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"README.md has no {start} … --> followed by {end}")
    return f"{head}{start}{marker}\n{text}\n{end}{tail}"


def with_tables(readme: str, results: Path = RESULTS) -> str:
    for name, (file, make) in TABLES.items():
        if (results / file).exists():
            readme = with_table(readme, name, make(json.loads((results / file).read_text(encoding="utf-8"))))
    return readme


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = with_tables(before)
    if "--check" in sys.argv:
        sys.exit("README.md and benchmarks/results disagree: run python benchmarks/readme.py" if after != before else 0)
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
