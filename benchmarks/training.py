"""Training characters of Shakespeare: how fast, beside plain PyTorch in the same run, and to which loss.

    python benchmarks/training.py tinyshakespeare.txt --out benchmarks/results/training.json    # --speed-only

The speed is that of the preset `shakespeare-char-cpu` (4 layers, 4 heads, 128 wide, context 64, batch 12), whole steps
with their batches. The peer is the same shape as one writes it in plain PyTorch, eager, float32, with AdamW. All take
turns, a round each, and what counts is the median of the rounds' ratios: the machine drifts.

The losses are those of whole runs, on the whole last tenth of the text, with the seeds asked for: of the preset, and of
a smaller model (3 layers, batch 32, 3000 steps).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.benchmarking.facts import facts
from llmfast.files import write_atomic
from llmfast.training.configuration import TrainingConfig, configure
from llmfast.training.dataset import TokenDataset
from llmfast.training.prepare import prepare
from llmfast.training.pretraining import new_trainer
from llmfast.training.run import train
from llmfast.training.trainer import best_precision

SMALLER = {"n_layer": 3, "batch_size": 32, "steps": 3000, "lr": 3e-3}


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.gelu, self.narrow = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.narrow(self.gelu(self.wide(self.norm_2(x))))


class PlainGPT(nn.Module):
    """A GPT without anything of this project."""

    def __init__(self, config: TrainingConfig, vocab_size: int):
        super().__init__()
        shape = config.model
        self.tokens = nn.Embedding(vocab_size, shape.n_embd)
        self.positions = nn.Embedding(shape.n_positions, shape.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(shape.n_embd, shape.n_head) for _ in range(shape.n_layer))
        self.norm = nn.LayerNorm(shape.n_embd)
        self.head = nn.Linear(shape.n_embd, vocab_size, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def plain_step(config: TrainingConfig, tokens: np.ndarray, vocab_size: int) -> Callable[[], Any]:
    model = PlainGPT(config, vocab_size)
    settings, T = config.optimization, config.model.n_positions
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=settings.weight_decay)

    def step() -> None:
        starts = torch.randint(len(tokens) - T, (config.data.batch_size,))
        ids = torch.stack([torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        model(ids, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_speed(data: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens a second of all, and how many times as fast as the peer: medians over the rounds."""
    dataset = TokenDataset.open(data)
    assert dataset.manifest is not None
    vocab_size = dataset.manifest.vocab_size
    config = configure("shakespeare-char-cpu")
    calls = {"plain PyTorch, fp32": plain_step(config, dataset.window(0, dataset.num_tokens), vocab_size)}
    for precision in dict.fromkeys(("fp32", best_precision(torch.device("cpu")))):
        trainer = new_trainer(config.replace({"precision": precision}), dataset, vocab_size)
        calls[f"llmfast, {precision}"] = trainer.step
    tokens = steps * config.data.batch_size * config.model.n_positions
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, step in calls.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if turn:  # the first round warms up
                found[name].append(tokens / (time.perf_counter() - start))
    peer = found["plain PyTorch, fp32"]
    return {
        name: {
            "tokens_per_second": round(statistics.median(rates)),
            "times_plain": round(statistics.median(a / b for a, b in zip(rates, peer, strict=True)), 2),
        }
        for name, rates in found.items()
    }


def measure_loss(data: Path, config: TrainingConfig, seeds: int) -> dict[str, Any]:
    """The loss on the whole validation split at the end of each seed's run."""
    losses, seconds = [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as out:
            quiet = {"evaluate_every": 0, "checkpoint_every": 0, "sample_every": 0, "seed": seed}
            outcome = train([data], out, config, changes=quiet, quiet=True)
        assert outcome.validation is not None
        losses.append(outcome.validation["loss"])
        seconds.append(outcome.seconds)
    return {
        "losses": [round(loss, 4) for loss in losses],
        "mean": round(statistics.mean(losses), 4),
        "seconds": round(statistics.median(seconds), 1),
        "config": config.to_document(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="of a round")
    parser.add_argument("--seeds", type=int, default=3, help="whole runs of each kind")
    parser.add_argument("--speed-only", action="store_true", help="no whole runs")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        try:
            prepare([arguments.text], data, "char")
        except (OSError, ValueError) as error:
            parser.error(str(error))
        results: dict[str, Any] = {"speed": measure_speed(data, arguments.rounds, arguments.steps)}
        print(json.dumps(results["speed"], indent=2), flush=True)
        if not arguments.speed_only:
            preset = configure("shakespeare-char-cpu")
            for name, config in (("shakespeare-char-cpu", preset), ("smaller", preset.replace(SMALLER))):
                results[name] = measure_loss(data, config, arguments.seeds)
                print(name, results[name]["losses"], flush=True)
    if arguments.out:
        write_atomic(arguments.out, (json.dumps(results | {"facts": facts()}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
