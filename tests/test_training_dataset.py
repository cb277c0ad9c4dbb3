"""Batches are a function of data, seed, step and rank; shards are one stream, and known by their hash."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.training.dataset import IGNORED, TokenDataset, WindowLoader
from llmfast.training.manifest import Manifest, Shard, Split


def write_dataset(directory, shards, masks=None, dtype="uint16"):
    """A data set of one split, as `prepare` would leave it."""

    def written(name, array):
        np.save(directory / name, array)
        return hashlib.sha256((directory / name).read_bytes()).hexdigest()

    entries = []
    for i, tokens in enumerate(shards):
        tokens = np.asarray(tokens, dtype=dtype)
        entry = {"file": f"train-{i:05d}.npy", "tokens": len(tokens)}
        entry["sha256"] = written(entry["file"], tokens)
        if masks is not None:
            entry["mask_file"] = f"train-{i:05d}.mask.npy"
            entry["mask_sha256"] = written(entry["mask_file"], np.asarray(masks[i], dtype=bool))
        entries.append(Shard(**entry))
    split = Split(documents=1, bytes=1, tokens=sum(map(len, shards)), shards=tuple(entries))
    Manifest(dtype, "char", 100, None, {"train": split}, "document").write(directory)
    return directory


@pytest.fixture
def directory(tmp_path):
    return write_dataset(tmp_path, [range(10), range(10, 13), range(13, 40)])


# --- shards as one stream ---------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.data())
def test_a_window_is_the_same_however_the_stream_is_cut_into_shards(sizes, data):
    tokens = np.random.default_rng(0).integers(0, 1000, sum(sizes)).astype(np.uint16)
    mask = tokens % 3 > 0
    cuts = np.cumsum(sizes)[:-1]
    cut = TokenDataset(np.split(tokens, cuts), np.split(mask, cuts))
    start = data.draw(st.integers(0, len(tokens)))
    length = data.draw(st.integers(0, len(tokens) - start))
    whole = slice(start, start + length)
    assert cut.num_tokens == len(cut) == len(tokens)
    assert cut.window(start, length).tolist() == tokens[whole].tolist()
    assert cut.window(start, length).dtype == cut.targets(start, length).dtype == np.int64
    assert cut.targets(start, length).tolist() == np.where(mask, tokens.astype(int), IGNORED)[whole].tolist()


@pytest.mark.parametrize("start, length", [(-1, 2), (0, 41), (40, 1), (3, -1)])
def test_a_window_outside_the_stream_is_refused(directory, start, length):
    with pytest.raises(ValueError, match=f"tokens {start} to {start + length} are not in a data set of 40"):
        TokenDataset.open(directory).window(start, length)


def test_an_opened_data_set_is_mapped_and_knows_its_manifest(directory):
    dataset = TokenDataset.open(directory, "train")
    assert dataset.manifest == Manifest.read(directory)
    assert all(isinstance(shard, np.memmap) for shard in dataset._shards)
    assert dataset.window(0, 40).tolist() == list(range(40))


def test_masks_are_read_beside_their_shards(tmp_path):
    write_dataset(tmp_path, [[1, 2, 3], [4, 5]], masks=[[1, 0, 1], [0, 1]], dtype="uint32")
    dataset = TokenDataset.open(tmp_path)
    assert dataset.window(0, 5).tolist() == [1, 2, 3, 4, 5]
    assert dataset.targets(0, 5).tolist() == [1, -100, 3, -100, 5]
    dataset.verify()


@pytest.mark.parametrize("tokens", [[[1, 2]], [0.5], ["a"]])
def test_tokens_of_another_shape_or_type_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens must be integers of shape"):
        TokenDataset.from_tokens(tokens)


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"mask must be bool \(3,\)"):
        TokenDataset.from_tokens([1, 2, 3], np.array([True]))


# --- damage -----------------------------------------------------------------------------------------------------


def test_verify_names_the_one_shard_whose_bytes_have_changed(directory):
    TokenDataset.open(directory).verify()
    path = directory / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    dataset = TokenDataset.open(directory)  # sizes are right
    with pytest.raises(ValueError, match="train-00001.npy is corrupt") as error:
        dataset.verify()
    assert "train-00000" not in str(error.value) and "train-00002" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 100, 130])
def test_a_truncated_shard_is_found_when_it_is_opened(directory, keep):
    path = directory / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="train-00000.npy is damaged.*prepare the data again") as error:
        TokenDataset.open(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("array", [np.arange(9, dtype=np.uint16), np.arange(10, dtype=np.int64)])
def test_a_shard_of_another_size_or_type_is_found_when_it_is_opened(directory, array):
    np.save(directory / "train-00000.npy", array)
    with pytest.raises(ValueError, match="train-00000.npy.*should hold 10 values of type uint16"):
        TokenDataset.open(directory)


def test_a_missing_shard_is_named(directory):
    (directory / "train-00002.npy").unlink()
    with pytest.raises(FileNotFoundError, match="train-00002.npy is missing"):
        TokenDataset.open(directory)
    with pytest.raises(ValueError, match="train-00002.npy is missing"):
        Manifest.read(directory).verify(directory)


def test_a_directory_without_a_manifest_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no manifest.json in .*llmfast data prepare"):
        TokenDataset.open(tmp_path)


def test_a_split_that_is_not_there_is_named(directory):
    with pytest.raises(ValueError, match="no 'validation' split, only train"):
        TokenDataset.open(directory, "validation")


@pytest.mark.parametrize(
    "change",
    [
        {"splits": None},
        {"splits": {}},
        {"splits": {"train": {"documents": 1, "bytes": 1, "tokens": 5, "shards": []}}},
        {"dtype": "int8"},
        {"version": 2},
        {"surplus": 1},
    ],
    ids=str,
)
def test_a_damaged_manifest_is_a_value_error_naming_it(directory, change):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="manifest.json is not a manifest"):
        TokenDataset.open(directory)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="manifest.json is not a manifest"):
        TokenDataset.open(directory)


# --- windows ----------------------------------------------------------------------------------------------------


def counting(n: int) -> TokenDataset:
    """Every token is its own position, so that a batch tells where it was cut."""
    return TokenDataset.from_tokens(np.arange(n))


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 60), st.sampled_from([1, 2, 3, 4]), st.integers(0, 5), st.integers(0, 30))
def test_the_ranks_share_the_batch_that_one_process_sees(context, extra, world_size, seed, step):
    dataset = counting(context + 1 + extra)
    whole = WindowLoader(dataset, context, 12, seed).batch(step)
    parts = [WindowLoader(dataset, context, 12, seed, rank, world_size).batch(step) for rank in range(world_size)]
    for i in range(2):
        assert whole[i].dtype == torch.int64 and whole[i].shape == (12, context)
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 7), st.integers(0, 5))
def test_an_epoch_is_a_permutation_of_windows_that_share_no_target(context, extra, batch_size, seed):
    n = context + 1 + extra
    loader = WindowLoader(counting(n), context, batch_size, seed)
    count = loader.windows_per_epoch
    assert loader.steps_per_epoch == -(-count // batch_size)
    batches = [loader.batch(step) for step in range(2 * loader.steps_per_epoch)]
    ids, targets = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert torch.equal(targets, ids + 1) and torch.equal(ids, ids[:, :1] + torch.arange(context))
    for epoch in range(2):
        if (epoch + 1) * count <= len(ids):
            starts = ids[epoch * count : (epoch + 1) * count, 0].sort().values
            assert (starts.diff() == context).all()
            assert starts[0] >= 0 and starts[-1] + context < n
    assert count * context > n - 2 * context - 1  # little is left out


def test_every_token_is_a_target_in_some_epoch_and_offsets_differ():
    loader = WindowLoader(counting(47), context=8, batch_size=5, seed=3)
    starts = {int(loader._starts(epoch).min()) for epoch in range(60)}
    seen = {int(t) for step in range(60) for t in loader.batch(step)[1].flatten()}
    assert len(starts) > 8 and seen == set(range(1, 47))


def test_a_batch_does_not_depend_on_what_was_asked_before():
    fresh = [WindowLoader(counting(100), 7, 6, seed=1).batch(step) for step in range(12)]
    loader = WindowLoader(counting(100), 7, 6, seed=1)
    for step in [11, 0, 5, 5, 11, 3, 8]:
        assert all(torch.equal(a, b) for a, b in zip(loader.batch(step), fresh[step], strict=True))


def test_the_seed_and_the_epoch_decide_the_order():
    orders = [WindowLoader(counting(200), 4, 40, seed).batch(step)[0][:, 0] for seed, step in [(0, 0), (1, 0), (0, 3)]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_masked_tokens_are_no_targets_but_are_seen():
    mask = np.arange(30) % 2 == 0
    ids, targets = WindowLoader(TokenDataset.from_tokens(np.arange(30), mask), 6, 4).batch(0)
    following = ids + 1
    assert torch.equal(targets, torch.where(following % 2 == 0, following, -100))


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_data_too_short_for_a_window_names_both_lengths(tokens):
    with pytest.raises(ValueError, match=f"has {tokens} tokens; one window of context 8 takes 9"):
        WindowLoader(counting(tokens), context=8, batch_size=1)
    WindowLoader(counting(9), context=8, batch_size=1).batch(5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 6, "world_size": 4}, "6 sequences can't be shared by 4 ranks"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "2 ranks, of which this is 2"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 1, "seed": -1}, "seed at least 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowLoader(counting(50), context=4, **arguments)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step must be at least 0"):
        WindowLoader(counting(50), 4, 2).batch(-1)
