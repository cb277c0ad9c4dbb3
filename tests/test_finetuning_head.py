"""What a classifier reads of a text, whatever stands beside it in a batch, and the head that it begins with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llmfast.finetuning import head
from llmfast.training.dataset import IGNORED


class Echo(nn.Module):
    """A model whose hidden state of a token is made of the token's number alone."""

    def __init__(self, width=5):
        super().__init__()
        self.table = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
        self.device = torch.device("cpu")

    def hidden(self, ids):
        return self.table[ids]


def padded(texts, classes):
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    for row, (text, which) in enumerate(zip(texts, classes, strict=True)):
        ids[row, : len(text)] = torch.tensor(text)
        targets[row, len(text) - 1] = which
    return ids, targets


@given(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 3))
def test_features_are_the_last_state_and_the_mean_of_the_text_alone(texts, empty):
    model = Echo()
    ids, targets = padded(texts, range(len(texts)))
    ids = torch.cat([torch.full((empty, ids.shape[1]), 7), ids])  # rows of no text stand before, as ranks pad theirs
    targets = torch.cat([torch.full((empty, ids.shape[1]), IGNORED), targets])
    last = torch.stack([model.table[text[-1]] for text in texts])
    mean = torch.stack([model.table[text].mean(0) for text in texts])
    for pooling, expected in (("last", last), ("mean", mean), ("both", torch.cat([last, mean], dim=1))):
        found, classes = head.features(model, ids, targets, pooling)
        torch.testing.assert_close(found, expected)
        assert classes.tolist() == list(range(len(texts)))


def test_features_of_several_batches_are_those_of_one():
    texts, model = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 9]], Echo()
    whole = head.features_of(model, [padded(texts, [0, 1, 2, 3])], "both")
    parts = head.features_of(model, [padded(texts[:1], [0]), padded(texts[1:], [1, 2, 3])], "both")
    torch.testing.assert_close(parts, whole)
    assert whole[0].shape == (4, 10) and whole[0].dtype == torch.float32


@pytest.mark.parametrize("count", (1, 9, 10, 11, 20, 99))
def test_a_head_is_fitted_on_texts_of_the_whole_file(count, monkeypatch):
    monkeypatch.setattr(head, "MOST_FITTED", 10)
    chosen = head.some_of(list(range(count)))
    assert min(count, 5) <= len(chosen) <= 10 and chosen[0] == 0 and chosen[-1] >= 0.8 * (count - 1)


def toy(n=400, scale=(1.0, 100.0, 0.01), seed=0):
    """Three classes told by two features of very different size; the third is noise."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(n) % 3
    centre = torch.tensor([[0.0, 2.0, 0.0], [2.0, -1.0, 0.0], [-2.0, -1.0, 0.0]])
    return (centre[classes] + 0.5 * torch.randn(n, 3, generator=generator)) * torch.tensor(scale), classes


def test_a_fitted_head_is_where_the_gradient_vanishes():
    x, classes = toy()
    fitted = head.fitted(x, classes, 3, 0.05)
    size = x.square().mean(dim=0).sqrt()
    scaled = (fitted * size).requires_grad_()
    objective = nn.functional.cross_entropy(x / size @ scaled.t(), classes) + 0.05 / 2 * scaled.square().sum()
    (gradient,) = torch.autograd.grad(objective, scaled)
    assert gradient.abs().max() < 1e-4
    unseen, truth = toy(seed=1)
    assert ((unseen @ fitted.t()).argmax(dim=1) == truth).float().mean() > 0.97


def test_a_fitted_head_does_not_depend_on_the_size_of_a_feature():
    x, classes = toy()
    factors = torch.tensor([3.0, 0.001, 50.0])
    torch.testing.assert_close(
        head.fitted(x * factors, classes, 3, 0.05) * factors, head.fitted(x, classes, 3, 0.05), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("constant", (0.0, 1.0))
def test_a_feature_that_never_changes_is_no_trouble(constant):
    x, classes = toy()
    x[:, 2] = constant
    fitted = head.fitted(x, classes, 3, 0.05)
    assert fitted.isfinite().all() and ((x @ fitted.t()).argmax(dim=1) == classes).float().mean() > 0.97
    assert head.fitted(x[:1], classes[:1], 3, 0.05).isfinite().all()


def test_the_penalty_is_the_one_that_serves_what_is_held_out():
    generator = torch.Generator().manual_seed(2)
    classes = torch.arange(40) % 2
    noise = torch.randn(40, 200, generator=generator)  # more features than texts: whatever is fitted is chance
    other = torch.randn(200, 200, generator=generator), torch.arange(200) % 2
    chosen = head.best_fitted((noise, classes), other, 2)
    torch.testing.assert_close(chosen, head.fitted(noise, classes, 2, max(head.PENALTIES)))
    train, held_out = toy(), toy(seed=1)
    chosen = head.best_fitted(train, held_out, 3)
    torch.testing.assert_close(chosen, head.fitted(*train, 3, min(head.PENALTIES)))
    middle = head.PENALTIES[len(head.PENALTIES) // 2]
    torch.testing.assert_close(head.best_fitted(train, None, 3), head.fitted(*train, 3, middle))
