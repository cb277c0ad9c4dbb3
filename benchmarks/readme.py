"""Writes the README's tables and pictures from `benchmarks/results`, so that no figure is typed by hand.

llmfast bench ops prefill decode generate latency training tokenizer memory --json benchmarks/results/cpu.json
llmfast bench peers --json benchmarks/results/peers.json
llmfast bench peers --model smollm2-135m --json benchmarks/results/peers-smollm2-135m.json
llmfast bench peers --model smollm2 --json benchmarks/results/peers-smollm2.json
python benchmarks/quality.py … --out benchmarks/results/quality.json
python benchmarks/quality.py --model smollm2 … --out benchmarks/results/quality-smollm2.json
python benchmarks/training.py tinyshakespeare.txt --out benchmarks/results/training.json
python benchmarks/readme.py            # --check only compares, and fails where the README says something else

A table whose results are not there stays as it is. `docs/pictures/made_from.json` keeps the SHA-256 of the results
that each picture was made from: pictures themselves differ with the version of what draws them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmfast.benchmarking import plots, records
from llmfast.benchmarking.peers.plan import HF_COMPILED, MODELS, OURS
from llmfast.benchmarking.records import Record, Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = ROOT / "docs" / "pictures"
OPS = {
    "causal_attention forward": "causal attention",
    "layer_norm forward": "LayerNorm",
    "gelu forward": "GELU, tanh",
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TEXTS = {"generate, cached": "with the KV cache", "generate, uncached": "without it"}
LENGTH, NEW_TOKENS = 1024, 128
RUNS = ("shakespeare-char-cpu", "smaller")  # in training.json


def speeds(results: Results) -> str:
    """A Markdown table: milliseconds of each op by backend, and tokens a second of `generate`."""
    rows = {(r.name, r.precision, r.sizes.get("tokens"), r.backend): r for r in results.records}
    lines = ["| | pytorch | cpp | |", "|---|---|---|---|"]
    for op, title in OPS.items():
        for precision, dtype in DTYPES.items():
            both = [rows[op, precision, LENGTH, backend] for backend in ("pytorch", "cpp")]
            times = [1000 * r.seconds.median for r in both if r.seconds is not None]
            ratio = times[0] / times[1]
            lines.append(f"| {title}, {dtype} | {times[0]:.2f} ms | {times[1]:.2f} ms | {ratio:.1f} × |")
    for name, title in TEXTS.items():
        both = [rows[name, "fp32", NEW_TOKENS, backend] for backend in ("pytorch", "cpp")]
        rates = [r.rates["tokens_per_second"] for r in both]
        ratio = rates[1] / rates[0]
        lines.append(
            f"| `generate`, {NEW_TOKENS} tokens, {title} | {rates[0]:.0f}/s | {rates[1]:.0f}/s | {ratio:.1f} × |"
        )
    facts = results.facts
    lines += [
        "",
        f"Medians on {facts['threads']} threads of an {facts['machine']['cpu']} ({facts['isa']} kernels, torch "
        f"{facts['versions']['torch']}): the ops at GPT-2's width, forward, {LENGTH} tokens, batch 1; `generate` with "
        "the embedded model in float32, tokens a second. The last column is cpp against pytorch.",
    ]
    return "\n".join(lines)


def peers(results: Results) -> str:
    """Tokens a second by case and precision, and how many times the peers' speed that is."""
    rows = [row for row in results.of("peers") if "busy" not in row.name and row.problem is None]
    engines = {(_case(row), _engine(row)): row for row in rows}
    cases = list(dict.fromkeys(_case(row) for row in rows))
    mine = sorted((row for row in rows if row.backend == OURS), key=lambda row: cases.index(_case(row)))
    rivals = [[engines[_case(row), versus.competitor] for versus in row.versus] for row in mine]
    # One column a library, or one an engine where a library comes at several precisions beside one of ours.
    several = any(len({row.backend for row in beside}) < len(beside) for beside in rivals)
    column, cell = (_engine, "{1} ({2:.2f} ×)") if several else (lambda row: row.backend, "{0} {1} ({2:.2f} ×)")
    columns = list(dict.fromkeys(column(row) for beside in rivals for row in beside))
    lines = [f"| | llmfast | of the limit | {' | '.join(columns)} |", "|---|---|---|" + "---|" * len(columns)]
    for ours, beside in zip(mine, rivals, strict=True):
        cells = dict.fromkeys(columns, "–")
        for other, versus in zip(beside, ours.versus, strict=True):
            cells[column(other)] = cell.format(other.precision, _rate(other), versus.ratio.median)
        share = "–" if ours.share_of_limit is None else f"{ours.share_of_limit:.0%}"
        lines.append(f"| {_case(ours)}, {ours.precision} | {_rate(ours)} | {share} | {' | '.join(cells.values())} |")
    facts = results.facts
    packages = {"llama.cpp": "llama-cpp-python"}  # others have their library's name
    libraries = dict.fromkeys(row.backend.lower() for row in rows if row.backend not in (OURS, HF_COMPILED))
    names = [packages.get(library, library) for library in libraries]
    used = ", ".join(f"{name} {facts['versions'][name]}" for name in names)
    title = MODELS[next(row.model for row in rows if row.model)].title
    lines += [
        "",
        f"Tokens a second of {title}, batch 1, on {facts['threads']} threads of an {facts['machine']['cpu']}: medians "
        "of rounds in which the engines take turns, and in brackets how many times as fast llmfast is (the median of "
        "each round's ratio). The limit is the bandwidth of reading memory, when decoding, and arithmetic, for a "
        f"prompt, measured in the same run. {used}.",
    ]
    return "\n".join(lines)


def _case(row: Record) -> str:
    return f"{row.name}, {row.sizes.get('context', row.sizes.get('tokens'))} tokens"


def _engine(row: Record) -> str:
    return f"{row.backend} {row.precision}"


def _rate(row: Record) -> str:
    return f"{row.rates['tokens_per_second']:.0f}/s"


def quality(content: dict[str, Any]) -> str:
    """What a precision costs: the change of the loss on each text, and how often the likeliest token stays the same."""
    lines = ["| text | precision | loss, nats a token | KL | same first choice |", "|---|---|---|---|---|"]
    for text, precisions in content["results"].items():
        for precision, found in precisions.items():
            if "loss" in found:
                lines.append(f"| {text} | {precision} | {found['loss']:.4f} | | |")
                continue
            change, divergence, same = found["loss_change"], found["kl_divergence"], found["top1_agreement"]
            lines.append(f"| {text} | {precision} | {change:+.4f} | {divergence:.4f} | {same:.1%} |")
    model = Path(content["model"]).name  # wherever it was
    limit = f", of a text its first {content['limit']},000 characters" if content.get("limit") else ""
    limit += f", in windows of {content['window']} tokens" if content.get("window") else ""
    return "\n".join([*lines, "", f"The model is `{model}`{limit}; what stands below fp32 is the difference from it."])


def training(content: dict[str, Any]) -> str:
    """Characters of Shakespeare: tokens a second beside plain PyTorch, and the losses of whole runs."""
    lines = ["| | tokens/s | |", "|---|---|---|"]
    for name, found in content["speed"].items():
        ratio = "" if name.startswith("plain") else f"{found['times_plain']:.1f} ×"
        lines.append(f"| {name} | {found['tokens_per_second']:,} | {ratio} |")
    lines += ["", "| run | seconds | validation loss of each seed, nats a character |", "|---|---|---|"]
    for name in RUNS:
        if name in content:
            model, data = content[name]["config"]["model"], content[name]["config"]["data"]
            shape = f"{model['n_layer']} layers, {model['n_embd']} wide, context {model['n_positions']}"
            steps = f"{content[name]['config']['run']['steps']} steps of {data['batch_size']}"
            losses = ", ".join(f"{loss:.3f}" for loss in content[name]["losses"])
            lines.append(f"| {shape}, {steps} | {content[name]['seconds']:.0f} | {losses} |")
    facts = content["facts"]
    lines += [
        "",
        f"The first shape's steps in turns with the same model in plain, eager PyTorch, on {facts['threads']} threads "
        f"of an {facts['machine']['cpu']}; the loss is that of the whole last tenth of tiny Shakespeare.",
    ]
    return "\n".join(lines)


# The name in the README's markers -> where the figures are, and what makes a table of the file.
TABLES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "table": ("cpu.json", lambda path: speeds(records.load(path))),
    "peers": ("peers.json", lambda path: peers(records.load(path))),
    "llama-peers": ("peers-smollm2-135m.json", lambda path: peers(records.load(path))),
    "smollm2-peers": ("peers-smollm2.json", lambda path: peers(records.load(path))),
    "quality": ("quality.json", lambda path: quality(json.loads(path.read_text(encoding="utf-8")))),
    "smollm2-quality": ("quality-smollm2.json", lambda path: quality(json.loads(path.read_text(encoding="utf-8")))),
    "training": ("training.json", lambda path: training(json.loads(path.read_text(encoding="utf-8")))),
}

# The name of a picture, of those that `plots` draws -> the results it is made from.
PICTURES = {"peers": "peers.json", "ops-causal_attention": "cpu.json"}
MADE_FROM = "made_from.json"


def fingerprints(results: Path = RESULTS) -> dict[str, str]:
    """The SHA-256 of the results behind each picture, without regard to how lines end."""
    return {
        name: hashlib.sha256((results / file).read_text(encoding="utf-8").encode()).hexdigest()
        for name, file in PICTURES.items()
    }


def draw(folder: Path, results: Path = RESULTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in PICTURES.items():
        plots.draw(records.load(results / file), name, folder / f"{name}.png")
    (folder / MADE_FROM).write_text(json.dumps(fingerprints(results), indent=2) + "\n", encoding="utf-8")


def drawn(folder: Path, results: Path = RESULTS) -> bool:
    """Whether every picture is there, and of these results."""
    there = all((folder / f"{name}.png").exists() for name in PICTURES) and (folder / MADE_FROM).exists()
    return there and json.loads((folder / MADE_FROM).read_text(encoding="utf-8")) == fingerprints(results)


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
            readme = with_table(readme, name, make(results / file))
    return readme


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = with_tables(before)
    agree = after == before and drawn(FOLDER)
    if "--check" in sys.argv:
        sys.exit(0 if agree else "README.md and benchmarks/results disagree: run python benchmarks/readme.py")
    if not agree:
        readme.write_text(after, encoding="utf-8")
        draw(FOLDER)


if __name__ == "__main__":
    main()
