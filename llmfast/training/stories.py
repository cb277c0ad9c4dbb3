"""Trains the embedded model `stories`: a tokenizer and a small GPT from one file of short stories.

    python -m llmfast.training.stories tinystories.txt --out stories

The file holds stories with `<|endoftext|>` on a line of its own after each. The last 500 are kept out of training and
score the result. Everything is decided by the arguments and the seed: the data order, the initial weights, dropout.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.backends import BackendUnavailable, use_backend
from llmfast.evaluation.perplexity import Perplexity, document_perplexity
from llmfast.files import write_atomic
from llmfast.models import GPT, GPTConfig
from llmfast.tokenizers import BPETokenizer
from llmfast.tokenizers.protocol import END_OF_TEXT

VALIDATION_STORIES = 500


def read_stories(path: Path) -> tuple[list[str], list[str]]:
    """The training and the validation stories of a file, without the blank around them."""
    stories = [story.strip() for story in path.read_text(encoding="utf-8").split(END_OF_TEXT)]
    stories = [story for story in stories if story]
    if len(stories) <= VALIDATION_STORIES:
        raise ValueError(f"{path} holds {len(stories)} stories; {VALIDATION_STORIES} are needed for validation alone")
    return stories[:-VALIDATION_STORIES], stories[-VALIDATION_STORIES:]


def batches(stories: list[list[int]], end_of_text: int, tokens: int, context: int, seed: int) -> Iterator[Tensor]:
    """Endless (B, T + 1) batches of about `tokens` tokens, one story a row, ending in end-of-text, padded with -100.

    Half of the rows start with an end-of-text, as a story out of nothing does, the others as a prompt does: with the
    story's first word, or somewhere in its first half. Stories of like length share a batch, so that little is padding.
    """
    rng = np.random.default_rng(seed)

    def row(story: list[int]) -> list[int]:
        chance = rng.random()
        if chance < 0.5:
            sequence = [end_of_text, *story, end_of_text]
        else:
            start = 0 if chance < 0.85 else int(rng.integers(len(story) // 2 + 1))
            sequence = [*story[start:], end_of_text]
        return sequence[: context + 1]

    while True:
        rows = [row(stories[i]) for i in rng.permutation(len(stories))]
        pools = [sorted(rows[i : i + 1024], key=len) for i in range(0, len(rows), 1024)]
        epoch: list[list[list[int]]] = []
        for pool in pools:
            batch: list[list[int]] = []
            for sequence in pool:
                batch.append(sequence)
                if len(batch) * len(sequence) >= tokens:
                    epoch.append(batch)
                    batch = []
            if batch:
                epoch.append(batch)
        for i in rng.permutation(len(epoch)):
            width = max(map(len, epoch[i]))
            yield torch.tensor([sequence + [-100] * (width - len(sequence)) for sequence in epoch[i]])


def learning_rate(progress: float) -> float:
    """A factor over the run's progress from 0 to 1: 2 % linear warm-up, constant to 30 %, then linear to zero."""
    return min(progress / 0.02, 1.0, (1 - progress) / 0.7)


def make_optimizers(model: GPT, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for embeddings, norms and biases."""
    matrices: list[torch.nn.Parameter] = []
    embeddings: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        else:
            (matrices if ".h." in name else embeddings).append(parameter)
    groups = [{"params": embeddings, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True),
    ]


def evaluate(model: GPT, stories: list[str], tokenizer: BPETokenizer) -> Perplexity:
    assert tokenizer.end_of_text is not None
    documents = [(tokenizer.encode(story), len(story.encode())) for story in stories]
    return document_perplexity(model, documents, tokenizer.end_of_text)


def card(record: dict[str, Any], config: GPTConfig) -> str:
    """The model card: what the model is, what it was made from and how, and how well it predicts new stories."""
    arguments = record["arguments"]
    length = "minutes" if arguments["minutes"] != "None" else "steps"
    command = f"python -m llmfast.training.stories {record['data']} --out stories --{length} {arguments[length]}"
    return f"""# stories

A GPT-2-family model of {config.num_parameters:,} parameters ({config.n_layer} layers, {config.n_head} heads, \
{config.n_embd} wide, context {config.n_positions}, a byte-level BPE of {config.vocab_size} tokens), stored in \
bfloat16. It writes short stories in simple English and knows nothing else.

**Data**: {record["data"]}, {record["stories"]:,} stories of TinyStories (Eldan & Li, 2023), licence \
CDLA-Sharing-1.0. The last {VALIDATION_STORIES} stories were kept out of training, and out of the tokenizer's.

**Made by** `{command}`: {record["tokens"]:,} tokens in {record["step"]:,} steps and {record["minutes"]:.0f} minutes \
on a CPU (Muon and AdamW, learning rate {arguments["lr"]}, dropout {arguments["dropout"]}, seed {arguments["seed"]}). \
A run limited by minutes sees as many tokens as the machine manages; `--steps {record["step"]}` takes as many as this.

**How well**: on the {VALIDATION_STORIES} stories it has not seen, each scored alone with its end-of-text: \
{record["validation_nats_per_token"]:.4f} nats a token, perplexity {record["validation_perplexity"]:.2f}, \
**{record["validation_bits_per_byte"]:.4f} bits a byte**.

**Limits**: a story can lose its thread, and facts are made up. The stories it learned from were themselves written by \
a language model. Not for advice, and not a base for anything that matters.
"""


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    out: Path = arguments.out
    training, validation = read_stories(arguments.data)
    tokenizer = BPETokenizer.train(training, arguments.vocab_size)
    tokenizer.save(out)
    assert tokenizer.end_of_text is not None
    config = GPTConfig.preset(
        "stories",
        vocab_size=tokenizer.vocab_size,
        embd_pdrop=arguments.dropout,
        attn_pdrop=0.0,
        resid_pdrop=arguments.dropout,
        bos_token_id=tokenizer.end_of_text,
        eos_token_id=tokenizer.end_of_text,
    )
    model = GPT(config).to(arguments.device)
    encoded = [tokenizer.encode(story) for story in training]
    stream = batches(encoded, tokenizer.end_of_text, arguments.batch_tokens, config.n_positions, arguments.seed)
    optimizers = make_optimizers(model, arguments.lr, arguments.weight_decay)
    # The forward and backward run on a bfloat16 copy; the optimizer keeps its weights and moments in float32.
    worker = copy.deepcopy(model).to(torch.bfloat16)
    pairs = list(zip(model.parameters(), worker.parameters(), strict=True))
    print(f"{config.num_parameters:,} parameters, {sum(map(len, encoded)):,} training tokens", flush=True)

    def save(score: Perplexity, step: int) -> None:
        worker.save_pretrained(out)
        record = {
            "data": arguments.data.name,
            "stories": len(training) + len(validation),
            "step": step,
            "tokens": tokens,
            "arguments": {k: str(v) for k, v in vars(arguments).items() if k not in ("data", "out")},
            "validation_nats_per_token": score.nats_per_token,
            "validation_perplexity": score.perplexity,
            "validation_bits_per_byte": score.bits_per_byte,
            "minutes": (time.perf_counter() - start) / 60,
        }
        write_atomic(out / "training.json", json.dumps(record, indent=2).encode())
        write_atomic(out / "README.md", card(record, config).encode())

    start = time.perf_counter()
    progress, step, tokens = 0.0, 0, 0
    worker.train()
    while progress < 1:
        step += 1
        rows = next(stream).to(arguments.device)
        ids, targets = rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous()
        tokens += int((targets >= 0).sum())
        loss = worker.loss(ids, targets)
        loss.backward()
        for master, copied in pairs:
            assert copied.grad is not None
            master.grad, copied.grad = copied.grad.float(), None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        elapsed = (time.perf_counter() - start) / 60
        progress = step / arguments.steps if arguments.minutes is None else min(1.0, elapsed / arguments.minutes)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * learning_rate(progress)
            optimizer.step()
        with torch.no_grad():
            for master, copied in pairs:
                copied.copy_(master)
        if step % 20 == 0 or step == 1:
            if not math.isfinite(loss.item()):
                raise SystemExit(f"the loss is {loss.item()} at step {step}: try a smaller --lr")
            rate = tokens / elapsed / 60
            print(f"step {step} ({progress:.1%})  loss {loss.item():.4f}  {rate:,.0f} tokens/s", flush=True)
        if step % arguments.evaluate_every == 0 or progress == 1:
            score = evaluate(worker.eval(), validation, tokenizer)
            print(f"step {step}  validation {score.nats_per_token:.4f} nats/token, {score.bits_per_byte:.4f} bits/byte")
            save(score, step)
            worker.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a text file of stories")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, help="stop after this long instead of a number of steps")
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens a step, padding included")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="pytorch")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        with use_backend(arguments.backend):
            train(arguments)
    except (OSError, ValueError, BackendUnavailable) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
