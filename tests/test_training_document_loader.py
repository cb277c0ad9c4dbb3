"""Batches of documents: every row is a document or its end, an epoch shows each once, and ranks share the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.training.dataset import TokenDataset
from llmfast.training.document_loader import DocumentLoader

END = 9999
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def corpus(sizes: list[int], mask=None) -> tuple[TokenDataset, list[list[int]]]:
    """Documents whose tokens tell where they are from: document i holds 100 · i, 100 · i + 1, …"""
    documents = [[100 * i + j for j in range(size)] for i, size in enumerate(sizes)]
    return TokenDataset.from_tokens([token for document in documents for token in (*document, END)], mask), documents


def rows_of(ids: torch.Tensor, targets: torch.Tensor) -> list[list[int]]:
    """The sequences behind a batch; everything after the last target must be padding."""
    rows = []
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        length = target.index(-100) if -100 in target else len(target)
        assert set(target[length:]) <= {-100} and set(row[length:]) <= {END}
        assert row[1:length] == target[: max(0, length - 1)]
        rows.append([*row[:length], *target[length - 1 : length]] if length else [])
    return rows


@settings(max_examples=60)
@given(SIZES, st.integers(4, 40), st.integers(1, 200), st.integers(0, 99))
def test_an_epoch_shows_every_document_once_or_its_end(sizes, context, more, seed):
    dataset, documents = corpus(sizes)
    loader = DocumentLoader(dataset, context, 2 * (context + 1) + more, seed, end_of_text=END)
    for epoch in range(2):
        seen = []
        for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
            ids, targets = loader.batch(step)
            assert ids.dtype == targets.dtype == torch.int64 and ids.shape == targets.shape
            assert len(ids) > 0 and ids.shape[1] <= context
            for row in rows_of(ids, targets):
                document = documents[next(token for token in row if token != END) // 100]
                starts = [[END, *document, END], *([*document[i:], END] for i in range(len(document) // 2 + 1))]
                assert row in [sequence[: context + 1] for sequence in starts]
                seen.append(document)
        assert sorted(seen) == documents


def test_little_of_a_batch_is_padding_where_pools_meet_too():
    sizes = np.random.default_rng(0).integers(5, 60, 5000).tolist()  # of five pools
    dataset = TokenDataset.from_tokens([token for size in sizes for token in (*range(size), END)])
    loader = DocumentLoader(dataset, 64, 1280, end_of_text=END)
    for step in range(loader.steps_per_epoch):
        assert loader.batch(step)[0].numel() < 1.5 * 1280


@settings(max_examples=60)
@given(SIZES, st.integers(4, 20), st.sampled_from([2, 3, 4]), st.integers(0, 30))
def test_the_ranks_share_the_batch_that_one_process_sees(sizes, context, world_size, step):
    dataset, _ = corpus(sizes)
    loaders = [DocumentLoader(dataset, context, 100, 1, rank, world_size, END) for rank in range(world_size)]
    whole = DocumentLoader(dataset, context, 100, 1, end_of_text=END).batch(step)
    parts = [loader.batch(step) for loader in loaders]
    assert len({part[0].shape for part in parts}) == 1
    for i in range(2):
        together = torch.cat([part[i] for part in parts])
        assert torch.equal(together[: len(whole[i])], whole[i])
    padding = torch.cat([part[1] for part in parts])[len(whole[1]) :]
    assert len(padding) < world_size * len(parts[0][1]) and (padding == -100).all()


def test_batches_hold_about_as_many_tokens_as_asked_and_little_padding():
    dataset, _ = corpus([5 + i % 40 for i in range(90)] * 30)
    loader = DocumentLoader(dataset, 100, 500, end_of_text=END)
    batches = [loader.batch(step) for step in range(loader.steps_per_epoch)]
    sizes = [ids.numel() for ids, _ in batches]
    assert sum(350 <= size <= 650 for size in sizes) > 0.9 * len(sizes)
    assert sum(int((targets == -100).sum()) for _, targets in batches) < 0.1 * sum(sizes)


def test_half_of_the_rows_start_from_nothing():
    dataset, _ = corpus([4] * 2000)
    loader = DocumentLoader(dataset, 10, 600, end_of_text=END)
    firsts = torch.cat([loader.batch(step)[0][:, 0] for step in range(loader.steps_per_epoch)])
    assert 0.45 < (firsts == END).float().mean() < 0.55


def test_a_batch_does_not_depend_on_what_was_asked_before_but_on_seed_and_epoch():
    dataset, _ = corpus([3 + i % 20 for i in range(99)])
    fresh = [DocumentLoader(dataset, 20, 100, 1, end_of_text=END).batch(step) for step in range(40)]
    loader = DocumentLoader(dataset, 20, 100, 1, end_of_text=END)
    for step in [39, 0, 20, 39, 1]:
        assert all(torch.equal(a, b) for a, b in zip(loader.batch(step), fresh[step], strict=True))
    other = DocumentLoader(dataset, 20, 100, 2, end_of_text=END)
    assert not torch.equal(other.batch(0)[0], fresh[0][0])
    assert not torch.equal(fresh[loader.steps_per_epoch][0], fresh[0][0])


def test_masked_tokens_are_no_targets():
    mask = np.array([False, False, True, True])
    dataset, _ = corpus([3], mask)
    seen = set()
    for step in range(20):
        ids, targets = DocumentLoader(dataset, 8, 18, end_of_text=END).batch(step)
        seen.add(tuple(targets[0].tolist()))
        assert ids[0].tolist()[-1] == 2
    assert seen <= {(-100, -100, 2, END), (-100, 2, END), (2, END)} and len(seen) > 1


def test_a_document_that_was_cut_has_no_end_and_empty_ones_are_left_out():
    dataset = TokenDataset.from_tokens([END, 1, 2, END, END, 3, 4, 5])
    ids, targets = DocumentLoader(dataset, 8, 100, end_of_text=END).batch(0)
    ends = sorted(row[row != -100][-1].item() for row in targets)
    assert ends == [5, END] and len(ids) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"end_of_text": None}, "have no end-of-text"),
        ({"batch_tokens": 17}, "two of the longest rows, 18 tokens, got 17"),
        ({"rank": 1}, "rank below world_size"),
        ({"seed": -1}, "seed at least 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    good = {"context": 8, "batch_tokens": 100, "end_of_text": END}
    with pytest.raises(ValueError, match=message):
        DocumentLoader(corpus([3])[0], **good | arguments)
    with pytest.raises(ValueError, match="no document"):
        DocumentLoader(TokenDataset.from_tokens([END, END]), 8, 100, end_of_text=END)
