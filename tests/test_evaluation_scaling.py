"""Scaling laws: known constants come back from synthetic runs, and the picture is one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.evaluation.scaling import ScalingLaw, ScalingPoint, fit
from llmfast.evaluation.scaling_figure import draw

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (50_000, 150_000, 450_000, 1_350_000)
LENGTHS = (100_000, 400_000, 1_600_000)
LAW = ScalingLaw(E=1.2, A=30.0, alpha=0.35, B=200.0, beta=0.4)


def runs_of(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> list[ScalingPoint]:
    generator = torch.Generator().manual_seed(seed)
    runs = [ScalingPoint(n, d, law.loss(n, d)) for n in SIZES for d in LENGTHS]
    factors = (noise * torch.randn(len(runs), generator=generator)).exp().tolist()
    return [ScalingPoint(run.parameters, run.tokens, run.loss * f) for run, f in zip(runs, factors, strict=True)]


@settings(max_examples=4)
@given(st.floats(0.3, 2.5), st.floats(0.2, 0.8), st.floats(0.2, 0.8), st.floats(0.3, 1.5), st.floats(0.3, 1.5))
def test_known_constants_come_back(E, alpha, beta, of_size, of_length):
    law = ScalingLaw(E, of_size * SIZES[1] ** alpha, alpha, of_length * LENGTHS[1] ** beta, beta)
    found = fit(runs_of(law), resamples=0).law
    assert found.alpha == pytest.approx(alpha, rel=0.02) and found.beta == pytest.approx(beta, rel=0.02)
    assert abs(found.E / E - 1) < 0.02
    for run in runs_of(law):
        assert found.loss(run.parameters, run.tokens) == pytest.approx(run.loss, rel=1e-4)
    # Beyond the runs, too.
    assert found.loss(2e7, 3e7) == pytest.approx(law.loss(2e7, 3e7), rel=0.02)


def test_noise_widens_the_intervals_which_hold_the_truth():
    narrow, wide = (fit(runs_of(LAW, noise), resamples=12) for noise in (0.0005, 0.01))
    for quantity in (lambda law: law.alpha, lambda law: law.beta, lambda law: law.E):
        widths = [high - low for low, high in (narrow.interval(quantity), wide.interval(quantity))]
        assert widths[0] < widths[1]
        low, high = narrow.interval(quantity, share=1.0)
        assert low - widths[0] <= quantity(LAW) <= high + widths[0]
    assert len(wide.samples) == 12


def test_the_same_seed_gives_the_same_samples():
    first, second = (fit(runs_of(LAW, 0.01), resamples=2, seed=1).samples for _ in range(2))
    assert first == second and len(set(first)) == 2


def test_one_run_gone_wrong_hardly_moves_the_law():
    runs = runs_of(LAW)
    runs[5] = ScalingPoint(runs[5].parameters, runs[5].tokens, 1.3 * runs[5].loss)
    found = fit(runs, resamples=0).law
    assert found.alpha == pytest.approx(LAW.alpha, rel=0.05) and found.beta == pytest.approx(LAW.beta, rel=0.05)


def test_the_best_division_of_compute_is_the_best():
    for compute in (1e12, 1e15):
        parameters, tokens = LAW.optimal(compute)
        assert 6 * parameters * tokens == pytest.approx(compute)
        best = LAW.loss(parameters, tokens)
        for factor in (0.5, 0.9, 1.1, 2):
            assert LAW.loss(parameters * factor, tokens / factor) > best


def test_as_many_runs_as_constants_have_no_uncertainty_to_state():
    runs = [
        ScalingPoint(n, d, LAW.loss(n, d)) for n, d in zip(SIZES[:3] + SIZES[:2], LENGTHS + LENGTHS[1:], strict=True)
    ]
    found = fit(runs, resamples=5)
    assert found.samples == () and all(map(math.isnan, found.interval(lambda law: law.E)))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (runs_of(LAW)[:4], "got 4 runs, 2 sizes, 3 numbers of tokens"),
        (runs_of(LAW)[:6], "got 6 runs, 2 sizes, 3 numbers of tokens"),
        ([*runs_of(LAW), ScalingPoint(1, 1, math.nan)], "a loss above 0"),
    ],
)
def test_too_little_to_fit_is_named(runs, message):
    with pytest.raises(ValueError, match=message):
        fit(runs)


def test_progress_reaches_its_end():
    heard: list[tuple[int, int]] = []
    fit(runs_of(LAW, 0.001), resamples=2, progress=lambda done, total: heard.append((done, total)))
    assert heard[-1][0] == heard[-1][1] and heard == sorted(heard)


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    runs = runs_of(LAW, 0.002)
    draw(runs, fit(runs, resamples=2), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["scaling.png"]
