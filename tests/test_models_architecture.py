"""What an architecture states of itself is what its module has, for every family."""

import pytest
import torch

from llmfast.models import FAMILIES, PRESETS, GPTConfig, LlamaConfig, config_from_document, create
from llmfast.models.architecture import MATRICES

TINY = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
SHAPES = {
    "gpt2": GPTConfig(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=3),
    "gpt2 untied, narrow": GPTConfig(
        vocab_size=40, n_positions=16, n_embd=24, n_layer=1, n_head=3, n_inner=5, tie_word_embeddings=False
    ),
    "llama": LlamaConfig(**TINY),
    "llama with biases, tied": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2": LlamaConfig(**TINY, model_type="qwen2"),
    "qwen3": LlamaConfig(**TINY, model_type="qwen3", head_dim=8),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_statement_is_the_modules_parameters(config):
    model = create(config)
    stated = {parameter.name: parameter.shape for parameter in config.parameters()}
    assert stated == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert config.num_parameters == sum(tensor.numel() for tensor in model.parameters())
    assert len(model.block_modules) == config.blocks
    names = {name for name, _ in model.named_parameters()}
    assert config.head_name in names and model.get_parameter(config.head_name) is model.lm_head.weight


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_roles_and_blocks_say_where_a_parameter_stands(config):
    for parameter in config.parameters():
        inside = ".h." in parameter.name or ".layers." in parameter.name
        assert (parameter.block is not None) == inside
        assert not inside or f".{parameter.block}." in parameter.name
        assert parameter.is_matrix == (parameter.role in MATRICES and parameter.name.endswith(".weight"))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_document_gives_the_same_configuration_again(config):
    assert config_from_document(config.to_document()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_documents(name):
    assert config_from_document(PRESETS[name].to_document()) == PRESETS[name]


def test_operations_count_every_product_of_a_token_once():
    config = SHAPES["llama"]
    model = create(config)
    products = 0
    for name, tensor in model.named_parameters():
        products += tensor.numel() if tensor.ndim == 2 and "embed_tokens" not in name else 0
    attention = config.blocks * 2 * 7 * config.heads * config.head_dim  # scores and values of 7 keys
    assert config.flops_per_token(7) == 2 * (products + attention)


def test_an_unknown_family_is_named_beside_those_that_run():
    with pytest.raises(ValueError, match="describes a 'mamba' model; the families that run are gpt2, llama"):
        config_from_document({"model_type": "mamba"})
    assert set(FAMILIES) >= {"gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"}


def test_frequencies_stay_exact_when_the_model_is_rounded():
    from llmfast.models.layers import RotaryTable

    table = RotaryTable(SHAPES["llama"].rope.rotary(8, 32))
    before = table(torch.tensor([[500]]))
    after = table.to(torch.bfloat16)(torch.tensor([[500]]))
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before, after, strict=True))
