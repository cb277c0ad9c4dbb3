"""From logits to tokens: which tokens are kept, which is chosen, and how often."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmfast.backends import cpp
from llmfast.inference.decoders import native
from llmfast.inference.sampling import (
    Sampler,
    SamplingSettings,
    apply_repetition_penalty,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
    row_generators,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NO_KERNELS = cpp.why_not("linear", torch.device("cpu"), torch.float32)
# Quarters are exact in float32, and tie now and then.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=12)


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [{i for i, value in enumerate(row) if value > -math.inf} for row in logits.tolist()]


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_the_k_largest_and_what_ties_with_the_last_of_them(values, k):
    threshold = sorted(values, reverse=True)[min(k, len(values)) - 1]
    result = keep_top_k(torch.tensor([values]), k)
    assert kept(result) == [{i for i, value in enumerate(values) if value >= threshold}]
    assert all(result[0, i] == values[i] for i in kept(result)[0])


@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_that_reaches_p(values, p):
    probability = softmax(values)
    expected, total = set(), 0.0
    for i in sorted(range(len(values)), key=lambda i: (-values[i], i)):
        assume(abs(total - p) > 1e-5)  # where rounding decides
        if total >= p:
            break
        expected.add(i)
        total += probability[i]
    assert kept(keep_top_p(torch.tensor([values]), p)) == [expected]


def test_top_p_needs_no_further_token_once_p_is_reached_exactly():
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [{0, 1}]


def test_top_p_of_one_keeps_even_tokens_too_unlikely_for_float32():
    logits = torch.tensor([[0.0, -100.0, -50.0, -30.0]])
    assert kept(keep_top_p(logits, 1.0)) == [{0, 1, 2, 3}]


@given(LOGITS, st.floats(0.0, 1.0))
def test_min_p_keeps_tokens_at_least_that_fraction_as_likely_as_the_likeliest(values, min_p):
    ratios = [math.exp(value - max(values)) for value in values]
    assume(all(abs(ratio - min_p) > 1e-5 * min_p for ratio in ratios if ratio < 1))
    assert kept(keep_min_p(torch.tensor([values]), min_p)) == [{i for i, ratio in enumerate(ratios) if ratio >= min_p}]


@given(LOGITS, LOGITS, st.integers(1, 5), st.floats(0.05, 0.95))
def test_rows_are_filtered_independently(first, second, k, p):
    width = min(len(first), len(second))
    rows = torch.tensor([first[:width], second[:width]])
    for keep in (lambda x: keep_top_k(x, k), lambda x: keep_top_p(x, p), lambda x: keep_min_p(x, p)):
        assert torch.equal(keep(rows), torch.cat([keep(rows[:1]), keep(rows[1:])]))


@given(LOGITS, st.floats(0.1, 5.0), st.data())
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens(values, penalty, data):
    marks = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    expected = [
        (value / penalty if value > 0 else value * penalty) if mark else value
        for value, mark in zip(values, marks, strict=True)
    ]
    result = apply_repetition_penalty(torch.tensor([values]), torch.tensor([marks]), penalty)
    torch.testing.assert_close(result, torch.tensor([expected]))


@given(st.lists(LOGITS.filter(lambda v: len(v) == 4), min_size=1, max_size=3))
def test_temperature_zero_takes_the_largest_logit(rows):
    logits = torch.tensor(rows)
    chosen = next_token(logits, SamplingSettings(temperature=0))
    assert chosen.shape == (len(rows),) and chosen.dtype == torch.int64
    assert all(row[i] == max(row) for row, i in zip(rows, chosen.tolist(), strict=True))


def test_a_penalty_can_change_the_greedy_choice():
    logits, seen = torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([[True, False, False]])
    assert next_token(logits, SamplingSettings(temperature=0, repetition_penalty=2.0), seen=seen).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-42, 1e-50, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.9, -5.0], [80.0, -80.0, 79.0, 0.0]])
    settings = SamplingSettings(temperature=temperature)
    assert next_token(logits, settings, [generator(0), generator(1)]).tolist() == [1, 0]


def test_a_huge_temperature_is_uniform():
    logits = torch.tensor([[10.0, 0.0, -10.0, 3.0]]).expand(4000, 4)
    torch.manual_seed(0)
    counts = next_token(logits, SamplingSettings(temperature=1e9)).bincount(minlength=4)
    assert ((counts - 1000).abs() < 150).all()


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=0.5),
        SamplingSettings(temperature=2.0, top_k=4),
        SamplingSettings(temperature=1.0, top_p=0.8),
        SamplingSettings(temperature=1.0, min_p=0.2),
        SamplingSettings(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability_says(settings):
    values, n = [1.0, 0.5, 0.0, -0.5, -1.0, 2.0], 20000
    scaled = [value / settings.temperature for value in values]
    allowed = set(range(len(values)))
    if settings.top_k:
        allowed = set(sorted(allowed, key=lambda i: -values[i])[: settings.top_k])
    if settings.top_p:
        probability, total, nucleus = softmax([scaled[i] for i in sorted(allowed)]), 0.0, set()
        of = dict(zip(sorted(allowed), probability, strict=True))
        for i in sorted(allowed, key=lambda i: -scaled[i]):
            if total < settings.top_p:
                nucleus.add(i)
            total += of[i]
        allowed = nucleus
    if settings.min_p:
        allowed = {i for i in allowed if math.exp(scaled[i] - max(scaled)) >= settings.min_p}
    probability = softmax([scaled[i] for i in sorted(allowed)])
    expected = dict(zip(sorted(allowed), probability, strict=True))

    torch.manual_seed(1)
    drawn = next_token(torch.tensor([values]).expand(n, len(values)), settings).bincount(minlength=len(values))
    assert {i for i, count in enumerate(drawn.tolist()) if count} == allowed
    chi_square = sum((int(drawn[i]) - n * p) ** 2 / (n * p) for i, p in expected.items())
    assert chi_square < 20.5  # 5 degrees of freedom: one run in a thousand is beyond, and the seed is fixed


QUARTERS = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0]])


@pytest.mark.parametrize(
    "uniform, token",
    [(0.0, 1), (0.2499, 1), (0.25, 2), (0.4999, 2), (0.5, 4), (1 - 2**-53, 4)],
)
def test_a_number_at_the_end_of_a_tokens_share_draws_the_next_token(uniform, token):
    """Shares are half open, [begin, end), and a token without one is never drawn."""
    assert draw(QUARTERS, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
@pytest.mark.parametrize("uniform", [0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53])
def test_the_native_sampler_draws_the_same_token_at_the_ends_of_shares(uniform):
    expected = draw(QUARTERS, torch.tensor([uniform], dtype=torch.float64))
    number = torch.tensor([uniform], dtype=torch.float64)
    logits = torch.where(QUARTERS > 0, QUARTERS.log(), -200.0)  # whose probability float32 rounds to zero
    assert torch.equal(torch.ops.llmfast.sample(logits, 6, 1.0, 0, 1.0, 0.0, number, None), expected)


def test_each_row_draws_from_its_own_generator():
    logits = torch.randn(3, 50, generator=generator(5))
    settings = SamplingSettings(temperature=1.5)
    together = [next_token(logits, settings, [generator(i) for i in range(3)]) for _ in range(2)]
    alone = [next_token(logits[i : i + 1], settings, [generator(i)]) for i in range(3)]
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[0], torch.cat(alone))


def test_different_seeds_give_different_tokens():
    logits = torch.zeros(1, 1000)
    tokens = {int(next_token(logits, SamplingSettings(temperature=1.0), [generator(seed)])) for seed in range(20)}
    assert len(tokens) > 10


def test_logits_are_not_changed():
    logits = torch.randn(2, 9)
    before = logits.clone()
    settings = SamplingSettings(0.7, top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    next_token(logits, settings, seen=torch.ones(2, 9, dtype=torch.bool))
    assert torch.equal(logits, before)


@settings(max_examples=50)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    st.floats(0, 1e6),
    st.none() | st.integers(1, 10),
    st.none() | st.floats(0, 1, exclude_min=True),
    st.none() | st.floats(0, 1),
)
def test_any_valid_settings_choose_a_token(values, temperature, top_k, top_p, min_p):
    chosen = next_token(torch.tensor([values]), SamplingSettings(temperature, top_k, top_p, min_p), [generator(0)])
    assert 0 <= int(chosen) < len(values)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
    ],
)
def test_an_invalid_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingSettings(**{name: value})


def test_a_sampler_draws_from_its_seed_and_remembers_what_was_seen():
    settings = SamplingSettings(temperature=1.0, repetition_penalty=5.0)
    logits = torch.randn(2, 60, generator=generator(3)).abs()
    rows, device = [[1, 2], [2]], torch.device("cpu")
    samplers = [Sampler.of(settings, 50, seed, rows, device) for seed in (7, 7, 8)]
    first, again, other = ([sampler.choose(logits).tolist() for _ in range(8)] for sampler in samplers)
    assert first == again != other
    expected = torch.zeros(2, 50, dtype=torch.bool)  # of the vocabulary, not of the padded logits
    for number, row in enumerate(rows):
        expected[number, [*row, *(tokens[number] for tokens in first)]] = True
    assert torch.equal(samplers[0].seen, expected)
    assert Sampler.of(SamplingSettings(temperature=1.0), 50, 7, rows, device).seen is None
    greedy = Sampler.of(SamplingSettings(temperature=0), 50, 7, rows, device)
    assert greedy.generators is None and greedy.choose(logits).tolist() == logits[:, :50].argmax(-1).tolist()


def test_rows_draw_from_seeds_of_their_own_up_to_the_largest():
    first, second = row_generators(2**63 - 1, 2)
    assert first.initial_seed() == 2**63 - 1 and second.initial_seed() == 0
    torch.manual_seed(1)
    drawn = [row_generators(None, 1)[0].initial_seed() for _ in range(2)]
    torch.manual_seed(1)
    assert drawn[0] != drawn[1] and drawn[0] == row_generators(None, 1)[0].initial_seed()


def test_what_is_not_said_is_the_default():
    assert SamplingSettings() == SamplingSettings(0.8, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0)


def test_a_min_p_of_one_keeps_all_that_are_as_likely_as_the_likeliest():
    assert kept(keep_min_p(torch.tensor([[2.0, 2.0, 1.0]]), 1.0)) == [{0, 1}]


def test_a_penalty_without_tokens_to_punish_changes_nothing():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert next_token(logits, SamplingSettings(0, repetition_penalty=9.0)).tolist() == [1]


@pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
@given(
    size=st.integers(1, 150),
    chosen_by=st.sampled_from(
        [dict(temperature=0), dict(temperature=0.3), dict(top_k=4), dict(top_p=0.6), dict(min_p=0.2, top_k=9)]
    ),
    seed=st.integers(0, 1000),
)
def test_the_native_sampler_obeys_a_mask(size, chosen_by, seed):
    """What a mask leaves out has no chance; the rest is drawn as `sampling.choose` draws it."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, size + 7, generator=draw) * 4
    allowed = torch.rand(2, size, generator=draw) < 0.3
    allowed[:, seed % size] = True
    bits = np.zeros((2, -(-size // 32) * 32), dtype=bool)
    bits[:, :size] = allowed.numpy()
    masks = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    chosen_by = SamplingSettings(**chosen_by)
    tokens = native.next_token(logits, chosen_by, row_generators(seed, 2), size, masks)
    expected = next_token(
        logits[:, :size].masked_fill(~allowed, torch.finfo(torch.float32).min), chosen_by, row_generators(seed, 2)
    )
    assert torch.equal(tokens, expected)
    assert allowed.gather(1, tokens.unsqueeze(1)).all()


@pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
def test_the_native_sampler_says_what_it_cannot_take():
    logits, none = torch.zeros(1, 40), torch.zeros(1, 2, dtype=torch.int32)
    for temperature, uniform in ((0.0, None), (0.5, torch.zeros(1, dtype=torch.float64))):
        assert torch.ops.llmfast.sample(logits, 40, temperature, 0, 1.0, 0.0, uniform, none).tolist() == [-1]
    with pytest.raises(RuntimeError, match="masks has shape"):
        torch.ops.llmfast.sample(logits, 40, 0.0, 0, 1.0, 0.0, None, none[:, :1])
    with pytest.raises(RuntimeError, match="numbers to draw with"):
        torch.ops.llmfast.sample(logits, 40, 0.5, 0, 1.0, 0.0, None, None)
