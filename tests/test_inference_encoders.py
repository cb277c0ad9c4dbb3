"""Encoders on packed weights: the vectors of the module, to the bit the same in any company, in every precision."""

import copy

import pytest
import torch
from conftest import on_instruction_sets

import llmfast
from llmfast.backends import cpp
from llmfast.inference.decoders.native import NativeModel
from llmfast.inference.encoders import EagerEncoder, NativeEncoder
from llmfast.inference.pooling import Pooling
from llmfast.models.bert import Bert, BertConfig

if (_missing := cpp.why_not("linear", torch.device("cpu"), torch.float32)) is not None:
    pytest.skip(_missing, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Widths that are no multiple of a vector or a panel, heads that are none of a vector; and a wider one, of whole panels.
ODD = BertConfig(50, 42, 2, 3, 70, max_position_embeddings=700, initializer_range=0.3)
WIDE = BertConfig(50, 128, 2, 4, 256, "gelu_new", max_position_embeddings=700, initializer_range=0.2)
# The largest difference from the module of a vector of length 1; of rounded weights the least cosine.
TOLERANCE = 2e-6
LEAST_COSINE = {"bf16": 0.9999, "int8": 0.999}
LENGTHS = [601, 300, 97, 96, 40, 17, 16, 3, 1, 1]


def random_encoder(config):
    torch.manual_seed(2)
    model = Bert(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.3)
    return model


def packed(model, precision):
    return NativeEncoder(NativeModel(model.config, model.state_dict().items(), precision))


def texts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 50, (length,), generator=generator).tolist() for length in lengths]


def expected_vectors(model, rows, pooling):
    eager = EagerEncoder(model, torch.device("cpu"))
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        return torch.cat([eager.encode([row], pooling) for row in rows])


MODELS = {"odd": random_encoder(ODD), "wide": random_encoder(WIDE)}


@pytest.mark.parametrize("pooling", [Pooling("mean"), Pooling("first"), Pooling("last", normalised=False)])
@pytest.mark.parametrize("name", MODELS)
def test_the_vectors_are_those_of_the_module(name, pooling):
    rows = texts()
    expected = expected_vectors(MODELS[name], rows, pooling)
    found = packed(MODELS[name], "fp32").encode(rows, pooling)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.norm(dim=1).max()))


@pytest.mark.parametrize("name", MODELS)
def test_floats_that_are_split_are_as_exact_as_floats(name):
    """Beside the model in float64, at most twice as far from it as PyTorch's float32 is."""
    model, rows = MODELS[name], texts()
    exact = expected_vectors(copy.deepcopy(model).double(), rows, Pooling())
    plain = (expected_vectors(model, rows, Pooling()) - exact).norm()
    found = (packed(model, "fp32").encode(rows, Pooling()) - exact).norm()
    print(name, float(found), float(plain))
    assert found <= 2 * plain


@pytest.mark.parametrize("precision", LEAST_COSINE)
@pytest.mark.parametrize("name", MODELS)
def test_rounded_weights_give_nearly_the_same_vectors(name, precision):
    rows = texts()
    expected = expected_vectors(MODELS[name], rows, Pooling())
    cosines = (packed(MODELS[name], precision).encode(rows, Pooling()) * expected).sum(1)
    print(precision, cosines.min())
    assert cosines.min() > LEAST_COSINE[precision]
    assert cosines.max() < 1 - 1e-8, "it was not rounded"


@pytest.mark.parametrize("precision", ["fp32", *LEAST_COSINE])
@pytest.mark.parametrize("name", MODELS)
def test_a_text_has_the_same_bits_in_any_company_and_for_any_number_of_threads(name, precision, monkeypatch):
    encoder, rows = packed(MODELS[name], precision), texts()
    together = encoder.encode(rows, Pooling())
    for row, vector in zip(rows, together, strict=True):
        assert torch.equal(encoder.encode([row], Pooling())[0], vector)
    reordered = [rows[i] for i in (9, 3, 0, 6)]
    assert torch.equal(encoder.encode(reordered, Pooling()), together[[9, 3, 0, 6]])
    for threads in (1, 3):
        monkeypatch.setattr("llmfast.inference.encoders.thread_count", lambda threads=threads: threads)
        assert torch.equal(encoder.encode(rows, Pooling()), together)
        assert torch.equal(encoder.encode(rows[:1], Pooling()), together[:1])


def test_every_instruction_set_gives_the_same_vectors():
    program = """
from test_inference_encoders import *
for name in MODELS:
    test_the_vectors_are_those_of_the_module(name, Pooling())
    for precision in LEAST_COSINE:
        test_rounded_weights_give_nearly_the_same_vectors(name, precision)
"""
    on_instruction_sets(program, timeout=120)


@pytest.mark.parametrize(
    "ids, lengths, said",
    [
        ([1, 50], [2], "token id 50 is not in the vocabulary of 50"),
        ([1, -1], [2], "token id -1"),
        ([1, 2, 3], [2], "the texts have 2 tokens, ids 3"),
        ([1, 2, 3], [2, 2], "a text has 2 tokens, expected 1 to 700, and no more than there are ids"),
        ([1, 2], [2, 0], "a text has 0 tokens"),
        ([1] * 701, [701], "a text has 701 tokens"),
    ],
)
def test_ids_and_lengths_that_do_not_fit_are_named(ids, lengths, said):
    model = packed(MODELS["odd"], "fp32").model
    with pytest.raises(RuntimeError, match=said):
        torch.ops.llmfast.native_encode(model._number, torch.tensor(ids), lengths, "mean", 1)


def test_a_decoder_is_no_encoder_and_an_encoder_no_decoder(parrot):
    model = NativeModel(parrot.model.config, parrot.model.state_dict().items(), "fp32")
    with pytest.raises(RuntimeError, match="the model is a decoder, not an encoder"):
        torch.ops.llmfast.native_encode(model._number, torch.tensor([1]), [1], "mean", 1)
    encoder = packed(MODELS["odd"], "fp32").model
    with pytest.raises(RuntimeError, match="the model is an encoder, not a decoder"):
        torch.ops.llmfast.native_decoder(encoder._number, 1, 10, 10, "fp32")
