"""Generation by the embedded model with and without the KV cache, by backend and length of the new text.

    pytest benchmarks --benchmark-only -k generate

With the cache the work grows with the length, without it with the square.
"""

from __future__ import annotations

import pytest
import torch
from measuring import DEVICE, facts, measurable

import llmfast

BACKENDS = measurable("causal_attention", torch.float32)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """The text that every way of generating has to give, ids (1, T)."""
    ids = torch.tensor([llmfast.load().tokenizer.encode("Once upon a time")])
    return llmfast.load(backend="pytorch", precision="fp32").generate(ids, max_new_tokens=128, temperature=0)


@pytest.mark.parametrize("new_tokens", [32, 128])
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_generate(backend, cache, new_tokens, expected, benchmark):
    benchmark.group = f"generate {new_tokens} tokens"
    llm = llmfast.load(backend=backend, precision="fp32", device=DEVICE)
    prompt = expected[:, : expected.shape[1] - 128].to(DEVICE)

    def call() -> torch.Tensor:
        return llm.generate(prompt, max_new_tokens=new_tokens, temperature=0, use_cache=cache)

    same = call().cpu() == expected[:, : prompt.shape[1] + new_tokens]
    assert same.float().mean() > 0.9, "the text differs by more than near-ties explain"
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    rate = round(new_tokens / benchmark.stats.stats.median, 1)
    benchmark.extra_info.update(backend=backend, cache=cache, tokens_per_second=rate, **facts())
