"""Dropout: how many are dropped, what is left of the others, and the gradient through both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.models.dropout import Dropout

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_place_is_dropped_as_often_as_asked(dtype, p):
    torch.manual_seed(0)
    drop, draws, places = Dropout(p), 4000, 64
    dropped = (drop(torch.ones(draws, places, dtype=dtype)) == 0).double()
    deviation = (p * (1 - p) / draws) ** 0.5
    assert (dropped.mean(0) - p).abs().max() < 5 * deviation
    together = (dropped - p).T @ (dropped - p) / draws / (p * (1 - p))  # no place knows of another
    assert (together - torch.eye(places).double()).fill_diagonal_(0).abs().max() < 6 / draws**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_is_scaled_so_that_the_mean_stays(dtype):
    x = torch.randn(3, 5, 7, dtype=dtype)
    torch.manual_seed(1)
    y = Dropout(0.25)(x)
    kept = y != 0
    assert 0 < kept.sum() < x.numel()
    torch.testing.assert_close(y[kept], x[kept] * (4 / 3), rtol=2 * torch.finfo(dtype).eps, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES), st.booleans())
def test_any_shape_and_any_strides(shape, dtype, turned):
    x = torch.ones(shape, dtype=dtype)
    x = x.mT if turned and x.dim() >= 2 else x
    before = x.clone()
    y = Dropout(0.5)(x)
    assert y.shape == x.shape and y.dtype == dtype and torch.equal(x, before)
    assert ((y == 0) | (y == 2)).all()


def test_the_gradient_goes_where_the_value_came_from_and_can_be_differentiated_again():
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    y = Dropout(0.5)(x)
    (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, torch.where(y != 0, 8 * x, 0))
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, torch.where(y != 0, 8.0, 0.0).double())


def test_the_seed_decides_and_evaluation_drops_nothing():
    drop, x = Dropout(0.5), torch.randn(100)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first) and not torch.equal(first, second)
    assert drop.eval()(x) is x and Dropout(0.0)(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(100))


def test_what_is_dropped_is_zero_whatever_it_was():
    y = Dropout(0.5)(torch.full((100,), float("nan")))
    assert (y == 0).any() and ((y == 0) | y.isnan()).all()
