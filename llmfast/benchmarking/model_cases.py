"""A whole model: reading a prompt, decoding, generating with and without the cache.

What a model needs, whatever a competitor does (formulas in `peers/counting.py`): a prompt the operations of its matrix
products and of causal attention; a decoded token every weight and every cached key and value once, in the formats of
its precision, and the weights once for a whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llmfast import LLM
from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work, WrongResult
from llmfast.benchmarking.models import (
    ARITHMETIC,
    FORMATS,
    check_logits,
    competitors,
    config_of,
    expected_logits,
    llm_of,
)
from llmfast.benchmarking.peers import counting
from llmfast.benchmarking.peers.models import prompt_ids
from llmfast.benchmarking.timing import Turn, cache_bytes, timed

SPAN = 64  # tokens decoded before a decoder starts again from its prompt
STEPS = 4  # a turn
PROMPT = 8  # tokens before what is generated
NEAR_TIE = 1e-4  # of two logits: either token may be chosen


def prefill(
    model: str, lengths: Sequence[int], precisions: Sequence[str], device: str = "cpu", chosen: Sequence[str] = ()
) -> Iterator[Comparison]:
    """A prompt of each length, up to the logits of its last position."""
    config = config_of(model)
    entries = competitors(precisions, device, chosen)

    def work(entry: Entry, tokens: int) -> Work:
        read = counting.weight_bytes(config, FORMATS[entry.precision])
        return Work(
            tokens=tokens,
            read=read,
            operations=counting.prefill_operations(config, tokens),
            arithmetic=ARITHMETIC[entry.precision],
            in_cache=read < cache_bytes(),
        )

    for tokens in _within(lengths, config.context):
        yield Comparison(
            group="prefill",
            name="prefill",
            device=device,
            entries=entries,
            start=functools.partial(_start_prefill, model, tokens, device),
            work=functools.partial(work, tokens=tokens),
            sizes={"batch": 1, "tokens": tokens},
            model=model,
        )


def _start_prefill(model: str, tokens: int, device: str) -> Callable[[Entry], Contestant]:
    expected = expected_logits(model, tokens, device)

    def ready(entry: Entry) -> Contestant:
        llm = llm_of(model, entry, device)
        ids = prompt_ids(tokens, llm.config.vocab_size)
        with llm.using_backend():
            decoder = llm.decoder(batch=1, capacity=tokens)
            checked = check_logits(decoder.prefill([ids])[0], expected, entry.precision)
        return Contestant(_on_its_backend(llm, timed(decoder.prefill, lambda: [ids], device)), checked)

    return ready


def decode(
    model: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    precisions: Sequence[str],
    device: str = "cpu",
    chosen: Sequence[str] = (),
) -> Iterator[Comparison]:
    """`SPAN` tokens after each context for one sequence, and after the shortest for batches of several."""
    config = config_of(model)
    entries = competitors(precisions, device, chosen)

    def work(entry: Entry, batch: int, context: int) -> Work:
        formats, positions = FORMATS[entry.precision], context + SPAN / 2
        cached = batch * positions * counting.cache_bytes(config, formats.cache)
        read = counting.weight_bytes(config, formats) + cached
        return Work(
            tokens=batch,
            read=read,
            operations=batch * counting.step_operations(config, positions),
            arithmetic=ARITHMETIC[entry.precision],
            in_cache=read < cache_bytes(),
        )

    contexts = _within(contexts, config.context - SPAN)
    for batch, context in [(1, context) for context in contexts] + [(b, contexts[0]) for b in batches if b > 1]:
        yield Comparison(
            group="decode",
            name="decode",
            device=device,
            entries=entries,
            start=functools.partial(_start_decode, model, batch, context, device),
            work=functools.partial(work, batch=batch, context=context),
            sizes={"batch": batch, "context": context},
            model=model,
        )


def _start_decode(model: str, batch: int, context: int, device: str) -> Callable[[Entry], Contestant]:
    expected = expected_logits(model, context + 1, device)

    def ready(entry: Entry) -> Contestant:
        llm = llm_of(model, entry, device)
        ids = prompt_ids(context + SPAN, llm.config.vocab_size)
        with llm.using_backend():
            decoder = llm.decoder(batch, capacity=context + SPAN)
        done = SPAN

        def start_over() -> None:
            """All competitors are at the same position in the same round: the context grows by the same steps."""
            nonlocal done
            if done + STEPS > SPAN:
                decoder.prefill([ids[:context]] * batch)
                done = 0

        def steps(_: None) -> Tensor:
            nonlocal done
            for _step in range(STEPS):
                logits = decoder.step(torch.full((batch,), ids[context + done], device=device))
                done += 1
            return logits

        with llm.using_backend():
            start_over()
            logits = decoder.step(torch.full((batch,), ids[context], device=device))
            checked = max(check_logits(row, expected, entry.precision) for row in logits)
        done = SPAN
        turn = timed(steps, start_over, device)
        return Contestant(_on_its_backend(llm, lambda: turn() / STEPS), checked)

    return ready


def generate(
    model: str, lengths: Sequence[int], precisions: Sequence[str], device: str = "cpu", chosen: Sequence[str] = ()
) -> Iterator[Comparison]:
    """Texts of each number of new tokens. With the cache the work grows with the length, without it with the square."""
    config = config_of(model)
    # Without its cache a model runs in PyTorch's dtypes, on backends that pack it otherwise too.
    entries = [entry for entry in competitors(precisions, device, chosen) if entry.precision in ("fp32", "bf16")]
    for new in _within(lengths, config.context - PROMPT):
        for cache in (True, False):
            yield Comparison(
                group="generate",
                name="generate, " + ("cached" if cache else "uncached"),
                device=device,
                entries=tuple(entries),
                start=functools.partial(_start_generate, model, new, cache, device),
                work=functools.partial(_tokens_only, new),
                sizes={"batch": 1, "tokens": new},
                model=model,
            )


def first_token(
    model: str, lengths: Sequence[int], precisions: Sequence[str], device: str = "cpu", chosen: Sequence[str] = ()
) -> Iterator[Comparison]:
    """From a prompt of each length to the first token chosen after it, in a process that has run before."""
    config = config_of(model)
    for tokens in _within(lengths, config.context):
        yield Comparison(
            group="latency",
            name="first token",
            device=device,
            entries=competitors(precisions, device, chosen),
            start=functools.partial(_start_generate, model, 1, True, device, tokens),
            work=functools.partial(_tokens_only, tokens),
            sizes={"batch": 1, "tokens": tokens},
            model=model,
        )


def _tokens_only(tokens: int, entry: Entry) -> Work:
    return Work(tokens=tokens)


def _start_generate(
    model: str, new: int, cache: bool, device: str, prompt: int = PROMPT
) -> Callable[[Entry], Contestant]:
    own = llm_of(model, Entry("pytorch", "fp32"), device)
    ids = torch.tensor([prompt_ids(prompt, own.config.vocab_size)], device=device)
    expected = own.generate(ids, max_new_tokens=new, temperature=0)

    def ready(entry: Entry) -> Contestant:
        llm = llm_of(model, entry, device)

        def call(_: None = None) -> Tensor:
            return llm.generate(ids, max_new_tokens=new, temperature=0, use_cache=cache, speculate=0)

        # Other precisions may choose other tokens; their logits are checked where they are decoded.
        checked = check_text(own, call(), expected) if entry.precision == "fp32" else None
        return Contestant(timed(call, lambda: None, device), checked)

    return ready


def check_text(own: LLM, found: Tensor, expected: Tensor) -> float:
    """How far apart the logits of two greedy texts' first different tokens are, in units of `NEAR_TIE`; 0 where the
    texts (1, T) are the same. `WrongResult` above 1."""
    different = (found != expected).nonzero()
    if len(different) == 0:
        return 0.0
    place = int(different[0, 1])
    with torch.inference_mode(), own.using_backend():
        logits = own.model(expected[:, :place])[0, -1]
    apart = float((logits[found[0, place]] - logits[expected[0, place]]).abs()) / NEAR_TIE
    if not apart <= 1:
        raise WrongResult(f"wrong, so not timed: token {place} differs from PyTorch's text, and is no near-tie")
    return round(apart, 4)


def _on_its_backend(llm: LLM, turn: Turn) -> Turn:
    def with_backend() -> float:
        with llm.using_backend():
            return turn()

    return with_backend


def _within(lengths: Sequence[int], most: int) -> list[int]:
    """The lengths that fit; the longest that does, where none of them would."""
    return [length for length in lengths if length <= most] or [most]
