"""How training scales to larger models and more processes: a short measurement, and what follows from it.

    python benchmarks/scaling.py --out results/scaling.json               # measures GPT-2 124M and two processes here
    python benchmarks/scaling.py --peak 989e12 --share 0.4 --bandwidth 300e9 --device-memory 141e9   # another machine

Measured: the share of the machine's arithmetic that a step of GPT-2 124M reaches, its memory, and how fast two
processes add up 64 MB. Computed from these, or from the figures given: what GPT-2 124M and 1.5B take on n devices, by
the formulas of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmfast.benchmarking.facts import facts
from llmfast.files import write_atomic
from llmfast.models import GPTConfig
from llmfast.training.configuration import configure
from llmfast.training.dataset import TokenDataset
from llmfast.training.hardware import flops_per_token, peak_flops
from llmfast.training.memory import Peak, estimate
from llmfast.training.pretraining import new_trainer
from llmfast.training.processes import Processes
from llmfast.training.trainer import best_precision

MODELS = ("gpt2", "gpt2-xl")
TOKENS_PER_STEP = 512 * 1024  # GPT-2's batch
MESSAGE = 64 << 20  # bytes
CONTEXT = 1024


def measure_step(device: torch.device, steps: int) -> dict[str, Any]:
    """The speed and the memory of GPT-2 124M, one sequence of 1024 tokens at a time (8 on a GPU)."""
    sequences = 8 if device.type == "cuda" else 1
    precision = best_precision(device)
    config = configure("gpt2", changes={"batch_size": sequences, "accumulation": 1, "precision": precision})
    tokens = np.random.default_rng(0).integers(0, 50257, 64 * CONTEXT).astype(np.uint16)
    memory = Peak(device)
    trainer = new_trainer(config, TokenDataset.from_tokens(tokens), 50257, group=Processes(device=device))
    float(trainer.step()[0])  # warms up
    start = time.perf_counter()
    for _ in range(steps):
        loss, _ = trainer.step()
    float(loss)
    rate = steps * sequences * CONTEXT / (time.perf_counter() - start)
    shape = trainer.model.config
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    peak, source = peak_flops(device, precision)
    return {
        "tokens_per_second": rate,
        "peak_flops": peak,
        "peak_source": source,
        "share_of_peak": rate * flops_per_token(shape, CONTEXT) / peak,
        "memory": memory.measured(),
        "memory_estimated": estimate(shape, sequences, CONTEXT, "adamw", dtype, device).total,
        "precision": precision,
    }


def measure_bandwidth(rounds: int = 5) -> float:
    """Bytes a second that each of two processes of this machine sends while they add up a message (gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = os.fork()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=int(child == 0), world_size=2)
    message = torch.zeros(MESSAGE // 4)
    dist.all_reduce(message)
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(message)
    seconds = (time.perf_counter() - start) / rounds
    dist.destroy_process_group()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return MESSAGE / seconds  # 2 (n - 1) / n of the message, n = 2


def predictions(
    peak: float, share: float, bandwidth: float, sequences: int, counts: list[int]
) -> Iterator[dict[str, Any]]:
    """A step of half a million tokens on n devices, for each model and way of sharing; see docs/scaling.md."""
    for name in MODELS:
        config = GPTConfig.preset(name, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        N = config.num_parameters
        for n in counts:
            for parallel in ("ddp", "fsdp"):
                passes = TOKENS_PER_STEP / (n * sequences * CONTEXT)  # forward and backward passes of a device
                arithmetic = TOKENS_PER_STEP / n * flops_per_token(config, CONTEXT) / (share * peak)
                sent = (n - 1) / n * (2 * 4 * N if parallel == "ddp" else passes * (2 + 2 + 4) * N)
                memory = estimate(
                    config,
                    sequences,
                    CONTEXT,
                    "adamw",
                    torch.bfloat16,
                    torch.device("cuda"),
                    shards=n if parallel == "fsdp" else 1,
                )
                # The sum of ddp comes after the last backward; fsdp's messages are sent while others compute.
                message = sent / bandwidth
                seconds = arithmetic + message if parallel == "ddp" else max(arithmetic, message)
                yield {
                    "model": name,
                    "parallel": parallel,
                    "devices": n,
                    "tokens_per_second": TOKENS_PER_STEP / seconds,
                    "efficiency": arithmetic / seconds,
                    "bytes_sent": sent,
                    "memory": memory.total,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="of the measurement")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--peak", type=float, help="FLOP/s of a device; nothing is measured then")
    parser.add_argument("--share", type=float, default=0.4, help="of it that a step reaches, with --peak")
    parser.add_argument("--bandwidth", type=float, default=300e9, help="bytes/s a device sends, with --peak")
    parser.add_argument("--sequences", type=int, default=8, help="that a device computes at once")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    peak, share, bandwidth = arguments.peak, arguments.share, arguments.bandwidth
    if peak is None:
        bandwidth = measure_bandwidth()  # first: it forks
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        step = measure_step(torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.steps)
        peak, share = step["peak_flops"], step["share_of_peak"]
        results["measured"] = step | {"bandwidth": bandwidth}
        print(json.dumps(results["measured"], indent=2))
    results["computed"] = list(predictions(peak, share, bandwidth, arguments.sequences, arguments.devices))
    print(f"computed, at {peak:.3g} FLOP/s, {share:.0%} of it reached, {bandwidth:.3g} bytes/s:")
    print(f"{'model':8} {'':5} {'n':>4} {'tokens/s':>12} {'efficiency':>10} {'sent a step':>12} {'memory':>9}")
    for row in results["computed"]:
        print(
            f"{row['model']:8} {row['parallel']:5} {row['devices']:4} {row['tokens_per_second']:12,.0f} "
            f"{row['efficiency']:10.0%} {row['bytes_sent'] / 1e9:9.2f} GB {row['memory'] / 1e9:6.1f} GB"
        )
    if arguments.out:
        write_atomic(arguments.out, (json.dumps(results | {"facts": facts()}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
