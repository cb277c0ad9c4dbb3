"""What an adapter costs a step of the native decoder: rank 16 beside all matrices of smollm2's blocks, by precision.

    python benchmarks/adapter_steps.py                      # writes benchmarks/results/adapter-steps.json

Two decoders of the same packed weights, one with an adapter (random: its values cost no time), make a step each in
turns, after the same 32 tokens; the order changes every turn. The ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import llmfast
from llmfast.benchmarking.facts import facts
from llmfast.finetuning import lora
from llmfast.inference.decoders import NativeAdapter, NativeDecoder
from llmfast.weights.adapter import Adapter

RESULTS = Path(__file__).parent / "results" / "adapter-steps.json"
PRECISIONS = ("q4_1", "int8", "bf16", "fp32")
RANK, PROMPT, WARM = 16, 32, 50


def measured(precision: str, steps: int) -> dict[str, Any]:
    """Milliseconds a step without and with the adapter, their ratio, and the adapter's bytes."""
    llm = llmfast.load("smollm2", precision="auto" if precision == "q4_1" else precision, backend="cpp", device="cpu")
    shapes = {p.name: p.shape for p in lora.targets(llm.config, "all")}
    pairs = {n: (torch.randn(RANK, k) / k**0.5, torch.randn(out, RANK) * 0.002) for n, (out, k) in shapes.items()}
    model = llm.native()
    adapter = NativeAdapter(model, Adapter("smollm2", RANK, 2.0 * RANK, pairs))
    decoders = []
    for beside in (None, adapter):
        decoder = NativeDecoder(model, 1, PROMPT + WARM + steps)
        decoder.adapt([beside])
        decoder.prefill([list(range(PROMPT))])
        decoders.append(decoder)
    seconds: list[list[float]] = [[], []]
    token = torch.tensor([5])
    for turn in range(WARM + steps):
        for number in (0, 1) if turn % 2 else (1, 0):
            before = time.perf_counter()
            decoders[number].step(token)
            seconds[number].append(time.perf_counter() - before)
    without, beside_it = (1000 * statistics.median(each[WARM:]) for each in seconds)
    return {"ms": without, "ms_with_adapter": beside_it, "ratio": beside_it / without, "adapter_bytes": adapter.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="of every precision; the median is kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        rounds = sorted((measured(precision, options.steps) for _ in range(options.rounds)), key=lambda r: r["ratio"])
        middle = rounds[len(rounds) // 2]
        found[precision] = middle | {"ratios": [each["ratio"] for each in rounds]}
        print(precision, " ".join(f"{name} {value:.3f}" for name, value in middle.items()), flush=True)
    options.out.write_text(json.dumps({"precisions": found, "machine": facts()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
