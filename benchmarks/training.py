"""Training on Shakespeare: how fast, beside plain PyTorch in the same run, and to which loss.

    python benchmarks/training.py tinyshakespeare.txt --out benchmarks/results/training.json    # --speed-only
    python benchmarks/training.py tinyshakespeare.txt --preset llama-small --out benchmarks/results/training-llama.json

The speed is that of the preset, whole steps with their batches: `shakespeare-char-cpu` (a GPT-2 of 4 layers, 128 wide,
context 64, batch 12, on characters) or `llama-small` (4 layers, 384 wide, context 256, batch 16, on 2,000 tokens). The
peer is the same shape as one writes it in plain PyTorch, eager, with AdamW as it comes: float32, and bfloat16 under
autocast. All take turns, a round each, and what counts is the median of the rounds' ratios: the machine drifts.

The losses are those of whole runs on characters, on the whole last tenth of the text, with the seeds asked for: of the
preset, and of a smaller model (3 layers, batch 32, 3000 steps).
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
from llmfast.models.gpt2 import GPTConfig
from llmfast.models.llama import LlamaConfig
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

    def __init__(self, shape: GPTConfig):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.positions = nn.Embedding(shape.n_positions, shape.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(shape.n_embd, shape.n_head) for _ in range(shape.n_layer))
        self.norm = nn.LayerNorm(shape.n_embd)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class PlainLlamaBlock(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, key_heads: int):
        super().__init__()
        self.heads, self.key_heads, size = heads, key_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, key_heads * size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def rotated(t: Tensor) -> Tensor:
            a, b = t.chunk(2, dim=-1)
            return t * cos + torch.cat((-b, a), dim=-1) * sin

        B, T, _ = x.shape
        h = self.norm_1(x)
        q = self.q(h).view(B, T, self.heads, -1).transpose(1, 2)
        k, v = (part(h).view(B, T, self.key_heads, -1).transpose(1, 2) for part in (self.k, self.v))
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainLlama(nn.Module):
    """A Llama without anything of this project."""

    def __init__(self, shape: LlamaConfig):
        super().__init__()
        width, size = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
        self.tokens = nn.Embedding(shape.vocab_size, width)
        sizes = (width, shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads)
        self.blocks = nn.ModuleList(PlainLlamaBlock(*sizes) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, shape.vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        frequencies = shape.rope.rope_theta ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(shape.max_position_embeddings), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x, T = self.tokens(ids), ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


CHARACTERS = "shakespeare-char-cpu"
PLAIN: dict[str, Callable[..., nn.Module]] = {CHARACTERS: PlainGPT, "llama-small": PlainLlama}


def plain_step(model: nn.Module, config: TrainingConfig, tokens: np.ndarray, precision: str) -> Callable[[], Any]:
    settings, T = config.optimization, config.model.n_positions
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=betas, weight_decay=settings.weight_decay)

    def step() -> None:
        starts = torch.randint(len(tokens) - T, (config.data.batch_size,))
        ids = torch.stack([torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_speed(data: Path, preset: str, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens a second of all, and how many times as fast as plain PyTorch at its faster: medians over the rounds."""
    dataset = TokenDataset.open(data)
    assert dataset.manifest is not None
    vocab_size = dataset.manifest.vocab_size
    config = configure(preset)
    text = dataset.window(0, dataset.num_tokens)
    calls: dict[str, Callable[[], Any]] = {}
    for precision in dict.fromkeys(("fp32", best_precision(torch.device("cpu")))):
        trainer = new_trainer(config.replace({"precision": precision}), dataset, vocab_size)
        calls[f"plain PyTorch, {precision}"] = plain_step(PLAIN[preset](trainer.model.config), config, text, precision)
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
    peer = max((rates for name, rates in found.items() if name.startswith("plain")), key=statistics.median)
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
    parser.add_argument("--preset", choices=PLAIN, default=CHARACTERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="of a round (default: as many as are 50,000 tokens)")
    parser.add_argument("--seeds", type=int, default=3, help="whole runs of each kind")
    parser.add_argument("--speed-only", action="store_true", help="no whole runs")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = configure(arguments.preset)
    steps = arguments.steps or max(1, 50_000 // (config.data.batch_size * config.model.n_positions))
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        try:
            prepare([arguments.text], data, config.data.tokenizer, config.data.vocab_size)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        results: dict[str, Any] = {"speed": measure_speed(data, arguments.preset, arguments.rounds, steps)}
        print(json.dumps(results["speed"], indent=2), flush=True)
        if arguments.preset == CHARACTERS and not arguments.speed_only:
            for name, whole in ((CHARACTERS, config), ("smaller", config.replace(SMALLER))):
                results[name] = measure_loss(data, whole, arguments.seeds)
                print(name, results[name]["losses"], flush=True)
    if arguments.out:
        write_atomic(arguments.out, (json.dumps(results | {"facts": facts()}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
