"""Bottleneck adapters: their formula, where they are, and that they change nothing at first."""

import functools

import pytest
import torch
from test_weights_adapter import GPT2, IDS, LLAMA
from torch.utils.checkpoint import checkpoint

from llmfast.finetuning import lora
from llmfast.models import GPT, Llama, bottleneck
from llmfast.models.layers import Linear

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = pytest.mark.parametrize(("family", "config"), [(GPT, GPT2), (Llama, LLAMA)])


def adapted(family, config, places="all", size=5):
    """A random model whose bottlenecks do something."""
    torch.manual_seed(0)
    model = family(config).eval().requires_grad_(False)
    bottleneck.put_in(model, bottleneck.places(config, places), size)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_narrow_network_follows_the_layer():
    torch.manual_seed(0)
    layer, x = Linear(6, 10), torch.randn(4, 6)
    after = layer.adapter = bottleneck.Bottleneck(10, 3)
    y = x @ layer.weight.t() + layer.bias
    torch.testing.assert_close(layer(x), y)  # nothing is added at first
    for parameter in after.parameters():
        torch.nn.init.normal_(parameter)
    inner = torch.nn.functional.gelu(y @ after.down.weight.t() + after.down.bias)
    torch.testing.assert_close(layer(x), y + inner @ after.up.weight.t() + after.up.bias)


@FAMILIES
def test_only_bottlenecks_take_gradients_and_without_them_the_model_is_what_it_was(family, config):
    torch.manual_seed(0)
    with torch.no_grad():
        before = family(config).eval()(IDS)
    model = adapted(family, config)
    model.loss(IDS, IDS).backward()
    took = {name for name, p in model.named_parameters() if p.grad is not None}
    assert took == {name for name in model.state_dict() if ".adapter." in name}
    assert len(took) == 4 * 2 * config.blocks  # of two halves of each block
    with torch.no_grad():
        assert (model(IDS) - before).abs().max() > 0.1
        with lora.switched_off(model):
            torch.testing.assert_close(model(IDS), before)


@FAMILIES
def test_places_are_the_ends_of_the_halves_of_a_block(family, config):
    roles = [[p.role for p in bottleneck.places(config, names) if p.block == 1] for names in bottleneck.PLACES]
    assert roles == [["attention_out"], ["mlp_out"], ["attention_out", "mlp_out"]]
    with pytest.raises(ValueError, match="bottlenecks follow attention, mlp, all, not 'query'"):
        bottleneck.places(config, "query")


@FAMILIES
def test_shapes_are_those_of_the_modules(family, config):
    model, size = adapted(family, config), 5
    state = {name: tuple(t.shape) for name, t in model.state_dict().items() if ".adapter." in name}
    stated = {
        p.name.removesuffix(".weight") + end: shape
        for p in bottleneck.places(config)
        for end, shape in bottleneck.shapes(p, size).items()
    }
    assert state == stated


@FAMILIES
def test_gradients_are_the_same_when_blocks_are_computed_again(family, config):
    model = adapted(family, config)

    def gradients():
        model.zero_grad()
        model.loss(IDS, IDS).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    for block in model.block_modules:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
