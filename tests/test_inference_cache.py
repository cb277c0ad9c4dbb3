"""The KV cache: the same logits with it as without, however the tokens arrive."""

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import llmfast
from llmfast.inference.cache import KVCache
from llmfast.inference.decoders import EagerDecoder, EagerReader, UncachedDecoder

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = tiny_config(n_positions=24)


@pytest.fixture(scope="module")
def model() -> llmfast.GPT:
    torch.manual_seed(3)
    return llmfast.GPT(CONFIG).eval()


def uncached(model: llmfast.GPT, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@settings(max_examples=25)
@given(chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5), batch=st.integers(1, 3), seed=st.integers(0, 999))
def test_tokens_in_chunks_give_the_logits_of_tokens_at_once(model, chunks, batch, seed):
    chunks = [c for i, c in enumerate(chunks) if sum(chunks[: i + 1]) <= CONFIG.n_positions]
    torch.manual_seed(seed)
    ids = torch.randint(CONFIG.vocab_size, (batch, sum(chunks)))
    cache = KVCache(CONFIG, batch)
    with torch.inference_mode():
        parts = [model(part, cache) for part in ids.split(chunks, dim=1)]
        close(torch.cat(parts, dim=1), model(ids))
    assert cache.lengths.tolist() == [sum(chunks)] * batch


def rows_and_chunks():
    rows = st.lists(st.lists(st.integers(0, 18), min_size=1, max_size=9), min_size=1, max_size=4)
    return st.tuples(rows, st.lists(st.integers(1, 4), max_size=4))


@settings(max_examples=40)
@given(rows_and_chunks(), st.integers(0, 999))
def test_ragged_rows_continue_as_each_would_alone(model, rows_and_chunks, seed):
    """A prefill of rows of different lengths, then steps and chunks of several tokens."""
    rows, chunks = rows_and_chunks
    torch.manual_seed(seed)
    longest = max(map(len, rows))
    cache = KVCache(CONFIG, len(rows), capacity=longest + sum(chunks))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    with torch.inference_mode():
        logits = model.lm_head(model.hidden(padded, cache, lengths=[len(row) for row in rows]))
        for row, own in zip(rows, logits, strict=True):
            close(own[longest - len(row) :], uncached(model, row))
        rows = [list(row) for row in rows]
        for chunk in chunks:
            new = torch.randint(CONFIG.vocab_size, (len(rows), chunk))
            logits = model(new, cache)
            for row, own, tokens in zip(rows, logits, new.tolist(), strict=True):
                row += tokens
                close(own, uncached(model, row)[-chunk:])
    assert cache.lengths.tolist() == [len(row) for row in rows]


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.integers(0, 18), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 999),
)
def test_decoders_agree_with_the_model_and_start_over_at_prefill(model, rows, steps, seed):
    torch.manual_seed(seed)
    decoders = [EagerDecoder(model, len(rows)), UncachedDecoder(EagerReader(model))]
    for decoder in decoders:
        decoder.prefill([[1] * 3 for _ in rows])  # forgotten again
    sequences = [list(row) for row in rows]
    for logits in [decoder.prefill([list(row) for row in rows]) for decoder in decoders]:
        assert logits.shape == (len(rows), CONFIG.vocab_size) and logits.dtype == torch.float32
        close(logits, torch.stack([uncached(model, row)[-1] for row in sequences]))
    for _ in range(steps):
        tokens = torch.randint(CONFIG.vocab_size, (len(rows),))
        for row, token in zip(sequences, tokens.tolist(), strict=True):
            row.append(token)
        for decoder in decoders:
            close(decoder.step(tokens), torch.stack([uncached(model, row)[-1] for row in sequences]))


def test_every_backend_decodes_from_the_cache(model, place):
    backend, device = place
    moved = llmfast.GPT(CONFIG).to(device).eval()
    moved.load_state_dict(model.state_dict())
    rows = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    with llmfast.use_backend(backend):
        decoder = EagerDecoder(moved, 3)
        close(decoder.prefill(rows).cpu(), torch.stack([uncached(model, row)[-1] for row in rows]))
        for step in range(4):
            tokens = torch.tensor([step, 10 + step, 3])
            rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
            close(decoder.step(tokens.to(device)).cpu(), torch.stack([uncached(model, row)[-1] for row in rows]))


def test_more_tokens_than_the_capacity_are_an_error_that_changes_nothing(model):
    cache = KVCache(CONFIG, capacity=5)
    ids = torch.arange(6).unsqueeze(0)
    with torch.inference_mode():
        model(ids[:, :4], cache)
        with pytest.raises(ValueError, match="the cache holds 5 tokens, 4 \\+ 2 do not fit"):
            model(ids[:, 4:], cache)
        close(model(ids[:, 4:5], cache)[0], uncached(model, [0, 1, 2, 3, 4])[-1:])


def test_more_tokens_than_the_context_are_an_error_whatever_the_capacity(model):
    cache = KVCache(CONFIG, capacity=100)
    ids = torch.zeros(1, CONFIG.n_positions, dtype=torch.int64)
    with torch.inference_mode():
        model(ids, cache)
        with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
            model(ids[:, :1], cache)


def test_different_lengths_are_refused_after_the_first_tokens_and_nothing_changes(model):
    cache = KVCache(CONFIG, batch=2)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.inference_mode():
        model(ids, cache)
        with pytest.raises(ValueError, match="only be added to an empty cache"):
            model.hidden(ids, cache, lengths=[2, 3])
        assert cache.longest == 3 and cache.lengths.tolist() == [3, 3]
        close(model(ids, cache)[1], uncached(model, [4, 5, 6, 4, 5, 6])[-3:])


def test_clear_forgets_tokens_and_raggedness(model):
    cache = KVCache(CONFIG, batch=2)
    with torch.inference_mode():
        model.hidden(torch.tensor([[1, 2, 3], [0, 0, 6]]), cache, lengths=[3, 1])
        assert cache.kv_lengths is not None
        cache.clear()
        assert cache.kv_lengths is None and cache.longest == 0
        close(model(torch.tensor([[5, 6], [7, 8]]), cache)[1], uncached(model, [7, 8]))


def test_nbytes_is_the_memory_of_keys_and_values():
    cache = KVCache(CONFIG, batch=2, capacity=10, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 2 * CONFIG.blocks * 2 * 10 * CONFIG.key_heads * CONFIG.head_dim
