"""Scoring tokens that are given: which context each sees, and the same numbers however they are batched and run."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import llmfast
from llmfast.backends import cpp
from llmfast.inference import scoring
from llmfast.inference.decoders import EagerReader, NativeDecoder, NativeModel, NativeReader
from llmfast.inference.scoring import Window, batches, half_overlapping, predictions, windows

pytestmark = pytest.mark.usefixtures("one_thread")
NO_KERNELS = cpp.why_not("linear", torch.device("cpu"), torch.float32)

SEQUENCES = st.lists(st.lists(st.integers(0, 18), min_size=2, max_size=40), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def model() -> llmfast.GPT:
    torch.manual_seed(0)
    return llmfast.GPT(tiny_config(n_positions=8, initializer_range=0.5)).eval()


@pytest.fixture(scope="module")
def eager(model) -> EagerReader:
    return EagerReader(model)


@pytest.fixture(scope="module")
def native(packed) -> NativeReader:
    return NativeReader(packed)


@pytest.fixture(scope="module")
def packed(model) -> NativeModel:
    if NO_KERNELS is not None:
        pytest.skip(NO_KERNELS)
    return NativeModel(model.config, model.state_dict().items(), "fp32")


def direct(model: llmfast.GPT, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and logits of a window's predicted tokens, alone and with PyTorch's ops."""
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        logits = model(torch.tensor([list(window.ids[:-1])]))[0][window.first - 1 :].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(window.ids[window.first :])[:, None])[:, 0].float(), logits


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_predict_every_token_once_from_as_much_as_they_promise(length, context, data):
    stride = data.draw(st.integers(1, context))
    sequence = list(range(length))
    predicted = []
    for window in windows(sequence, context, stride):
        assert 1 <= window.first < len(window.ids) <= context + 1
        assert list(window.ids) == sequence[window.ids[0] : window.ids[0] + len(window.ids)]  # neighbours
        for seen in range(window.first, len(window.ids)):
            token = window.ids[seen]
            assert min(token, context - stride + 1) <= seen <= context
            predicted.append(token)
    assert predicted == sequence[1:]


def test_blocks_are_the_default_and_share_no_context():
    assert [(list(w.ids), w.first) for w in windows(range(8), 3)] == [([0, 1, 2, 3], 1), ([3, 4, 5, 6], 1), ([6, 7], 1)]
    assert [(list(w.ids), w.first) for w in windows(range(6), 3, 2)] == [([0, 1, 2, 3], 1), ([2, 3, 4, 5], 2)]


@pytest.mark.parametrize("context", [1, 2, 3, 8, 512])
def test_half_a_context_is_what_half_overlapping_gives(context):
    assert context - half_overlapping(context) + 1 == max(1, context // 2)


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_a_stride_outside_the_context_is_named(stride):
    with pytest.raises(ValueError, match=f"from 1 to the context of 8 tokens, got {stride}"):
        windows([1, 2, 3], 8, stride)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 100))
def test_batches_hold_everything_once_and_stay_small(lengths, tokens):
    made = list(batches(lengths, tokens))
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens


@pytest.mark.parametrize("reader", ["eager", "native"])
@settings(max_examples=30)
@given(SEQUENCES, st.sampled_from([1, 3, 8]), st.sampled_from([1, 20, 8192]), st.sampled_from([19, 60, 1 << 24]))
def test_predictions_are_those_of_each_window_alone(
    model, reader, request, sequences, stride, tokens_per_batch, at_once
):
    pieces = [window for sequence in sequences for window in windows(sequence, 8, stride)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "LOGITS_AT_ONCE", at_once)  # down to one row of logits at a time
        results = dict(predictions(request.getfixturevalue(reader), pieces, tokens_per_batch))
    assert sorted(results) == list(range(len(pieces)))
    for index, window in enumerate(pieces):
        expected, logits = direct(model, window)
        torch.testing.assert_close(results[index].log_probabilities, expected, rtol=1e-4, atol=1e-4)
        top = logits.topk(2).values
        certain = (top[:, 0] - top[:, 1]) > 1e-3
        best = logits.argmax(-1) == torch.tensor(window.ids[window.first :])
        assert torch.equal(results[index].likeliest[certain], best[certain])


def test_every_backend_says_the_same(model, place):
    backend, device = place
    moved = llmfast.GPT(model.config).to(device).eval()
    moved.load_state_dict(model.state_dict())
    pieces = windows([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 8, 4)
    with llmfast.use_backend(backend):
        results = dict(predictions(EagerReader(moved), pieces))
    for index, window in enumerate(pieces):
        torch.testing.assert_close(
            results[index].log_probabilities, direct(model, window)[0], rtol=1e-4, atol=1e-4, check_device=True
        )


def test_progress_counts_predicted_tokens(model):
    heard = []
    pieces = windows(list(range(19)), 8, 4)
    list(predictions(EagerReader(model), pieces, 16, lambda done, total: heard.append((done, total))))
    assert [total for _, total in heard] == [18] * len(heard) and heard[-1][0] == 18 and len(heard) > 1
    assert sorted(heard) == heard


def test_a_model_in_training_is_scored_without_dropout_and_left_in_training():
    torch.manual_seed(0)
    model = llmfast.GPT(tiny_config(resid_pdrop=0.5, embd_pdrop=0.5)).train()
    twice = [
        [p.log_probabilities for _, p in predictions(EagerReader(model), windows([1, 2, 3], 16))] for _ in range(2)
    ]
    assert torch.equal(twice[0][0], twice[1][0]) and model.training


@given(st.lists(st.lists(st.integers(0, 18), min_size=1, max_size=8), min_size=1, max_size=6), st.data())
@settings(max_examples=30)
def test_the_native_decoder_reads_as_it_steps(packed, sequences, data):
    skip = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]
    decoder = NativeDecoder(packed, len(sequences), 8)
    read = torch.cat([*decoder.read(sequences, skip, data.draw(st.integers(1, 9)))])
    assert decoder.lengths == [len(sequence) for sequence in sequences]
    expected = []
    for sequence, count in zip(sequences, skip, strict=True):
        alone = NativeDecoder(packed, 1, 8)
        logits = [alone.prefill([sequence[:1]])] + [alone.step(torch.tensor([token])) for token in sequence[1:]]
        expected += logits[count:]
    torch.testing.assert_close(read, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_decoder_reads_its_number_of_sequences(packed):
    with pytest.raises(ValueError, match="2 sequences of at least one token"):
        list(NativeDecoder(packed, 2).read([[1], []], [0, 0]))
