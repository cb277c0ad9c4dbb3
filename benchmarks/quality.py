"""What fewer bits cost in quality, teacher-forced, against the same model in float32.

    python benchmarks/quality.py --stories tinystories.txt --text wikitext2_valid.raw --out quality.json
    python benchmarks/quality.py --stories tinystories.txt --precisions int4 --record stories-int4

Three figures for each text and precision, over all tokens:

    Δ loss   the change of the mean loss, in nats a token
    KL       the mean of KL(float32 ‖ quantised) of the next token's distribution, in nats
    top-1    how often both find the same token the likeliest
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import llmfast
from llmfast.benchmarking.facts import facts
from llmfast.documents import read_text, split_documents
from llmfast.files import write_atomic
from llmfast.inference.scoring import Window, batch_logits, batches, windows
from llmfast.quantization.plan import PRECISIONS as QUANTIZED
from llmfast.training.configuration import TrainingConfig
from llmfast.weights.checkpoint import load, stream
from llmfast.weights.config_file import record_quality

LOGITS_AT_ONCE = 1 << 23
HELD_OUT = TrainingConfig.preset("stories").data.validation_documents
PRECISIONS = ("bf16", *QUANTIZED)


def logits_of(llm: llmfast.LLM, batch: Sequence[Window]) -> Tensor:
    """What generating would see, weights and activations rounded as they run: (n, V) float32, the windows' tokens."""
    with llm.using_backend():
        return torch.cat([*batch_logits(llm.runner.reader(), batch)])


def windows_of(llm: llmfast.LLM, documents: list[str], longest: int | None = None) -> list[Window]:
    """The documents in blocks of a context, or of `longest` tokens, each document from an end-of-text to its own."""
    assert llm.tokenizer is not None and llm.tokenizer.end_of_text is not None
    end = llm.tokenizer.end_of_text
    sequences = ([end, *llm.tokenizer.encode(document), end] for document in documents)
    context = min(llm.config.context, longest or llm.config.context)
    return [window for sequence in sequences for window in windows(sequence, context)]


@torch.inference_mode()
def compare(
    reference: llmfast.LLM, others: Mapping[str, llmfast.LLM], documents: list[str], longest: int | None = None
) -> dict[str, dict[str, float]]:
    """The three figures for each of `others`, and under "fp32" the loss that the changes are of."""
    blocks = windows_of(reference, documents, longest)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("fp32", *others)}
    tokens, size = 0, max(1, LOGITS_AT_ONCE // reference.config.vocab_size)
    lengths = [len(block.ids) - 1 for block in blocks]
    total, work = sum(lengths), list(batches(lengths, size))
    for indices in track(work, f"{total:,} tokens", console=Console(stderr=True), transient=True):
        batch = [blocks[index] for index in indices]
        picked = torch.tensor([token for block in batch for token in block.ids[block.first :]]).unsqueeze(1)
        expected = torch.log_softmax(logits_of(reference, batch), dim=-1)
        loss, best = -expected.gather(1, picked), expected.argmax(1)
        sums["fp32"][0] += loss.double().sum()
        tokens += len(picked)
        for name, llm in others.items():
            actual = torch.log_softmax(logits_of(llm, batch), dim=-1)
            sums[name][0] += (-actual.gather(1, picked) - loss).double().sum()
            sums[name][1] += torch.nn.functional.kl_div(actual, expected, reduction="sum", log_target=True).double()
            sums[name][2] += (actual.argmax(1) == best).sum()
    result = {"fp32": {"tokens": tokens, "loss": float(sums.pop("fp32")[0]) / tokens}}
    for name, (change, divergence, agreeing) in sums.items():
        result[name] = {
            "loss_change": float(change) / tokens,
            "kl_divergence": float(divergence) / tokens,
            "top1_agreement": float(agreeing) / tokens,
        }
    return result


def show(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    table = Table("text", "precision", "Δ loss, nats/token", "KL, nats", "top-1 agreement")
    for text, rows in results.items():
        for name, row in rows.items():
            if name == "fp32":
                table.add_row(text, name, f"{row['loss']:.4f} ({row['tokens']:,} tokens)", "", "")
            else:
                change, divergence = f"{row['loss_change']:+.5f}", f"{row['kl_divergence']:.5f}"
                table.add_row("", name, change, divergence, f"{row['top1_agreement']:.2%}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories", help="embedded name, directory or file, in floating point")
    parser.add_argument("--stories", type=Path, help="the file `stories` was trained from; its held-out stories count")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text to be read from end to end")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--limit", type=int, help="only so many stories, and so many thousand characters of a text")
    parser.add_argument("--window", type=int, metavar="N", help="read so many tokens at once (default: the context)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--record", type=Path, help="a directory of MODEL quantised: its config.json gets the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    limit: int | None = arguments.limit
    try:
        texts: dict[str, list[str]] = {}
        if arguments.stories:
            held_out = split_documents(read_text(arguments.stories))[-HELD_OUT:]
            texts[arguments.stories.name] = held_out[:limit]
        for path in arguments.text:
            texts[path.name] = [read_text(path)[: limit and 1000 * limit]]
        if not texts:
            raise ValueError("no text to measure on: give --stories or --text")
        reference = llmfast.load(arguments.model, precision="fp32", device="cpu")
        if reference.tokenizer is None or reference.tokenizer.end_of_text is None:
            raise ValueError(f"{arguments.model} has no tokenizer with an end of text")
        others = {name: llmfast.load(arguments.model, precision=name, device="cpu") for name in arguments.precisions}
        recorded = precision_of(arguments.record, others) if arguments.record else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results = {name: compare(reference, others, documents, arguments.window) for name, documents in texts.items()}
    show(results)
    if arguments.out:
        record: dict[str, Any] = {
            "model": arguments.model,
            "limit": limit,
            "window": arguments.window,
            "results": results,
            "facts": facts(),
        }
        write_atomic(arguments.out, (json.dumps(record, indent=2) + "\n").encode())
    if recorded is not None:
        record_quality(arguments.record, {text: rows[recorded] for text, rows in results.items()})


def precision_of(directory: Path, others: Mapping[str, llmfast.LLM]) -> str:
    """Which of the models to be measured a directory holds."""
    precision = stream(directory).precision
    if precision is None or precision not in others:
        raise ValueError(f"{directory} holds none of {', '.join(others)}, which are to be measured")
    stored = load(directory)[1]
    measured = others[precision].model.state_dict()
    if not all(name in stored and torch.equal(tensor, stored[name].float()) for name, tensor in measured.items()):
        raise ValueError(f"{directory} does not hold the weights that are to be measured")
    return precision


if __name__ == "__main__":
    main()
