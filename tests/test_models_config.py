"""GPTConfig: what it refuses, its presets, and its count of parameters."""

import dataclasses

import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import llmfast
from llmfast.models.gpt2 import PRESETS, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "8", True])
def test_a_size_that_is_not_a_positive_integer_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a positive integer"):
        GPTConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 0.0),
        ("layer_norm_epsilon", float("nan")),
        ("initializer_range", -0.02),
        ("embd_pdrop", 1.0),
        ("attn_pdrop", -0.1),
        ("resid_pdrop", float("nan")),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        GPTConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", ["gelu"]),
        ("layer_norm_epsilon", "small"),
        ("initializer_range", None),
        ("embd_pdrop", None),
        ("resid_pdrop", "0.1"),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        GPTConfig(**{field: value})


def test_a_head_count_that_does_not_divide_the_width_is_named_with_both_numbers():
    with pytest.raises(ValueError, match="n_head must divide n_embd, but 5 does not divide 768"):
        GPTConfig(n_head=5)


def test_a_config_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 3


@pytest.mark.parametrize(
    "name, millions", [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
)
def test_gpt2_presets_have_the_published_sizes(name, millions):
    config = GPTConfig.preset(name)
    assert round(config.num_parameters / 1e6) == millions
    assert (config.vocab_size, config.n_positions, config.head_dim) == (50257, 1024, 64)
    assert config.inner_dim == 4 * config.n_embd


def test_gpt2_has_exactly_the_published_number_of_parameters():
    assert GPTConfig.preset("gpt2").num_parameters == 124_439_808


def test_every_preset_is_valid_and_takes_overrides():
    for name in PRESETS:
        config = GPTConfig.preset(name, n_layer=1, n_positions=7)
        assert (config.n_layer, config.n_positions) == (1, 7)
        assert config.n_embd == PRESETS[name].n_embd


def test_an_override_is_validated():
    with pytest.raises(ValueError, match="n_head"):
        GPTConfig.preset("gpt2", n_head=7)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'gpt5'.*gpt2-medium"):
        GPTConfig.preset("gpt5")


@settings(max_examples=20)
@given(
    vocab_size=st.integers(1, 40),
    n_positions=st.integers(1, 20),
    n_head=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    n_layer=st.integers(1, 3),
    n_inner=st.none() | st.integers(1, 50),
    tied=st.booleans(),
)
def test_num_parameters_is_the_count_of_the_model(vocab_size, n_positions, n_head, head_dim, n_layer, n_inner, tied):
    config = tiny_config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_head * head_dim,
        n_head=n_head,
        n_layer=n_layer,
        n_inner=n_inner,
        tie_word_embeddings=tied,
    )
    assert config.head_dim == head_dim
    assert config.num_parameters == sum(p.numel() for p in llmfast.GPT(config).parameters())


@pytest.mark.parametrize(
    "name, activation", [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu")]
)
def test_activation_names_mean_what_hugging_face_means(name, activation):
    assert GPTConfig(activation_function=name).arithmetic().activation == activation
