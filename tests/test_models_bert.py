"""BERT encoders: the statement is the module's, and the hidden states are those of transformers."""

import json

import pytest
import torch

import llmfast
from llmfast.models import BertConfig, config_from_document
from llmfast.models.architecture import MATRICES
from llmfast.models.bert import Bert
from llmfast.weights.checkpoint import stream
from llmfast.weights.loading import encoder_of

transformers = pytest.importorskip("transformers")
TINY = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
TINY |= {"intermediate_size": 40, "max_position_embeddings": 20, "initializer_range": 0.5}
LENGTHS = [11, 4, 1]


@pytest.fixture(scope="module", params=["gelu", "gelu_new"])
def theirs(request, tmp_path_factory):
    """A random BERT of transformers', with a pooler and, under the other activation, the heads of its training."""
    torch.manual_seed(3)
    config = transformers.BertConfig(**TINY, hidden_act=request.param)
    kind = transformers.BertModel if request.param == "gelu" else transformers.BertForMaskedLM
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.3)
    directory = tmp_path_factory.mktemp("bert")
    model.save_pretrained(directory)
    return getattr(model, "bert", model), directory


def test_the_statement_is_the_modules_parameters():
    config = BertConfig(**TINY)
    model = Bert(config)
    assert {p.name: p.shape for p in config.parameters()} == {n: tuple(t.shape) for n, t in model.named_parameters()}
    assert config.num_parameters == sum(t.numel() for t in model.parameters())
    assert config_from_document(config.to_document()) == config
    for parameter in config.parameters():
        assert (parameter.block is not None) == (".layer." in parameter.name)
        assert parameter.is_matrix == (parameter.role in MATRICES and parameter.name.endswith(".weight"))
    products = sum(p.size for p in config.parameters() if p.is_matrix and p.block is not None)
    assert config.flops_per_token(7) == 2 * (products + config.blocks * 2 * 7 * 24)


def test_hidden_states_are_those_of_transformers(theirs, place):
    model, directory = theirs
    backend, device = place
    ours = encoder_of(stream(directory), torch.float32).to(device)
    torch.manual_seed(0)
    ids = torch.randint(0, 60, (3, max(LENGTHS)))
    there = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad(), llmfast.use_backend(backend):
        expected = model(ids, attention_mask=there.long()).last_hidden_state
        found = ours(ids.to(device), torch.tensor(LENGTHS, device=device)).cpu()
        whole = ours(ids[:1].to(device)).cpu()
    torch.testing.assert_close(found[there], expected[there], rtol=0, atol=2e-5)
    torch.testing.assert_close(whole, expected[:1], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type to 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "relu"}, "hidden_act must be one of gelu"),
        ({"num_attention_heads": 5}, "5 does not divide 24"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
    ],
)
def test_what_is_not_computed_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        config_from_document({"model_type": "bert"} | TINY | changes)


def test_ids_that_do_not_fit_are_named():
    model = Bert(BertConfig(**TINY))
    with pytest.raises(ValueError, match="21 tokens do not fit the context of 20"):
        model(torch.zeros(1, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match="int64"):
        model(torch.zeros(4))


def test_an_encoder_writes_no_text(theirs):
    _, directory = theirs
    with pytest.raises(ValueError, match="encoder, which turns text into vectors"):
        llmfast.load(directory)
    with pytest.raises(ValueError, match="is an encoder, not a LanguageModel"):
        llmfast.models.from_pretrained(directory)


def test_a_tensor_that_is_missing_or_surplus_is_named(theirs, tmp_path):
    _, directory = theirs
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"missing bert\.encoder\.layer\.2"):
        stream(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"surplus bert\.encoder\.layer\.1"):
        stream(tmp_path)
