"""The measurement of what quantised weights cost, on a model and texts small enough to check it by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmfast
from llmfast.quantization.plan import PRECISIONS
from llmfast.weights import checkpoint
from llmfast.weights.quantizing import quantize_checkpoint

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality.py"
TEXT = "Once upon a time there was a big cat. The dog liked to sing in the park."


def measure(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def after_each_token(decoder, ids: list[int]) -> torch.Tensor:
    """The log-probabilities of what comes next, (T, V) float64, one token at a time."""
    logits = [decoder.prefill([ids[:1]])] + [decoder.step(torch.tensor([token])) for token in ids[1:]]
    return torch.cat(logits).double().log_softmax(-1)


def test_the_figures_are_what_their_names_say(storyteller, storyteller_directory, text, tmp_path):
    result = measure("--model", storyteller_directory, "--text", text, "--out", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]["text.txt"]
    assert results.keys() == {"fp32", "bf16", *PRECISIONS}

    tokenizer = storyteller.tokenizer
    ids = [tokenizer.end_of_text, *tokenizer.encode(TEXT), tokenizer.end_of_text]
    assert len(ids) <= storyteller.config.n_positions
    with torch.inference_mode():
        exact, approximate = (
            after_each_token(llmfast.load(storyteller_directory, precision=p, device="cpu").decoder(), ids[:-1])
            for p in ("fp32", "int4")
        )
    target = torch.tensor(ids[1:])[:, None]
    assert results["fp32"]["tokens"] == len(ids) - 1
    assert results["fp32"]["loss"] == pytest.approx(-float(exact.gather(1, target).mean()), abs=1e-5)
    change = float((exact.gather(1, target) - approximate.gather(1, target)).mean())
    # A prompt attends in tiles, a single token does not: their roundings differ where the cache has 16 bits.
    assert results["int4"]["loss_change"] == pytest.approx(change, abs=2e-3)
    divergence = float((exact.exp() * (exact - approximate)).sum(1).mean())
    assert results["int4"]["kl_divergence"] == pytest.approx(divergence, abs=2e-3) and divergence > 1e-4
    agreement = float((exact.argmax(1) == approximate.argmax(1)).double().mean())
    assert results["int4"]["top1_agreement"] == pytest.approx(agreement)
    assert results["int8"]["kl_divergence"] < results["int4"]["kl_divergence"]
    assert f"{agreement:.2%}" in result.stdout


def test_the_figures_are_recorded_with_the_model_they_are_of(storyteller_directory, text, tmp_path):
    quantize_checkpoint(storyteller_directory, tmp_path / "small", "int8")
    arguments = ("--model", storyteller_directory, "--text", text, "--precisions", "int8", "--record")
    assert measure(*arguments, tmp_path / "small").returncode == 0
    quality = checkpoint.stream(tmp_path / "small").quantization.quality
    assert quality["text.txt"].keys() == {"loss_change", "kl_divergence", "top1_agreement"}

    quantize_checkpoint(storyteller_directory, tmp_path / "other", "int4")
    result = measure(*arguments, tmp_path / "other")
    assert result.returncode == 2 and "other holds none of int8" in result.stderr and "Traceback" not in result.stderr
