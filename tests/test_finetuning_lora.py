"""Low-rank adapters: their formula, where they are, and what takes gradients."""

import functools
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS
from test_weights_adapter import GPT2, IDS, LLAMA
from torch.utils.checkpoint import checkpoint

import llmfast
from llmfast.adapting import activated, gated
from llmfast.finetuning import lora
from llmfast.models import GPT, Llama, llama
from llmfast.models.layers import Linear
from llmfast.training.weights import rounded
from llmfast.weights.checkpoint import stream
from llmfast.weights.loading import module_of, quantized_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("backend", ["pytorch", "auto"])
def test_a_layer_adds_the_scaled_product_before_its_activation(activation, backend):
    torch.manual_seed(0)
    layer = Linear(6, 10)
    layer.adapter = lora.LowRank(6, 10, 2, 1.5)
    torch.nn.init.normal_(layer.adapter.b)
    x = torch.randn(4, 6, requires_grad=True)
    merged = layer.weight + 1.5 * layer.adapter.b @ layer.adapter.a
    with llmfast.use_backend(backend):
        expected = llmfast.ops.linear(x, merged, layer.bias, activation)
        torch.testing.assert_close(layer(x, activation), expected)
        grads = [torch.autograd.grad(y.square().sum(), [x, layer.adapter.a], retain_graph=True) for y in
                 (expected, layer(x, activation))]  # fmt: skip
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("family", "config"), [(GPT, GPT2), (Llama, LLAMA)])
def test_only_adapters_take_gradients_and_at_first_they_change_nothing(family, config):
    torch.manual_seed(0)
    model = family(config).eval()
    with torch.no_grad():
        before = model(IDS)
    lora.put_in(model, lora.targets(config, "all"), 4, 8.0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), before)
    model.loss(IDS, IDS).backward()
    took = {name for name, p in model.named_parameters() if p.grad is not None}
    assert took == {name for name in model.state_dict() if ".adapter." in name}
    matrices = [p for p in config.parameters() if p.is_matrix and p.block is not None]
    assert len(took) == 2 * len(matrices)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(4 * sum(p.shape) for p in matrices)
    assert set(lora.pairs_of(model.state_dict())) == {p.name for p in matrices}
    restored = lora.state_of(lora.pairs_of(model.state_dict()))
    assert all(torch.equal(restored[name], model.state_dict()[name]) for name in took)


def test_a_linear_layer_makes_no_gradient_for_a_frozen_weight():
    """W's gradient is as much work as the layer itself."""
    if ("cpp", "cpu") not in BACKENDS:
        pytest.skip("the C++ kernels are not built")
    asked = []
    operator = torch.ops.llmfast.linear_backward.default
    layer = Linear(6, 10).requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    y = layer(x)

    class Recording(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function == operator:
                asked.append((tuple(args[2].shape), args[5:8]))
            return function(*args, **(kwargs or {}))

    with Recording():
        y.sum().backward()
    by_shape = {shape: tuple(needs) for shape, needs in asked}
    assert by_shape == {(10, 6): (True, False, False)}


def test_targets_are_roles_or_groups_of_them():
    roles = lambda names, config: [p.role for p in lora.targets(config, names) if p.block == 0]  # noqa: E731
    assert roles("attention", GPT2) == ["query_key_value", "attention_out"]
    assert roles("mlp", LLAMA) == ["gate", "up", "mlp_out"]
    assert roles("query, value", LLAMA) == ["query", "value"]
    with pytest.raises(ValueError, match="no layers 'query' to adapt; it has attention, mlp, all, query_key_value"):
        lora.targets(GPT2, "query")


def test_dropout_is_of_training_alone():
    torch.manual_seed(0)
    layer = lora.LowRank(50, 10, 4, 1.0, dropout=0.5)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(3, 50)

    nothing = SimpleNamespace(product=lambda x: torch.zeros(3, 10))

    layer.eval()
    assert torch.equal(layer(x, nothing), layer(x, nothing))
    layer.train()
    assert not torch.equal(layer(x, nothing), layer(x, nothing))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_gate_keeps_what_it_multiplies_and_no_more(activation):
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation), (gate, up))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = gated(gate, up, activation)
    assert torch.equal(found, activated(gate, activation) * up)
    assert {id(t) for t in kept} == {id(gate), id(up)}


@pytest.mark.parametrize(("family", "config"), [(GPT, GPT2), (Llama, LLAMA)])
def test_gradients_are_those_of_the_plain_formula_also_when_blocks_are_computed_again(family, config):
    """`added` makes its sums within the products; here they are made one after the other."""
    torch.manual_seed(0)
    model = family(config).eval()
    lora.put_in(model, lora.targets(config, "all"), 4, 8.0)
    for name, parameter in model.named_parameters():
        if ".adapter.b" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def gradients():
        model.zero_grad()
        model.loss(IDS, IDS).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    with pytest.MonkeyPatch.context() as patch:
        plain = lambda x, a, b, scale, layer: layer.product(x) + scale * (x @ a.t() @ b.t())  # noqa: E731
        patch.setattr(lora, "added", plain)
        patch.setattr(llama, "gated", lambda gate, up, activation: activated(gate, activation) * up)
        expected = gradients()
    for block in model.block_modules:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    again = gradients()
    assert found.keys() == expected.keys() == again.keys() and len(found) > 8
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "config"), [(GPT, GPT2), (Llama, LLAMA)])
def test_a_block_that_is_computed_again_is_so_once_and_keeps_its_input_alone(family, config):
    """Backward that asked for a layer's own graph computed the block again for each of its layers."""
    model = family(config)
    lora.put_in(model, lora.targets(config, "all"), 4, 8.0)
    kept = []
    for block in model.block_modules:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    layer = lora.layer_of(model, lora.targets(config, "all")[0].name)
    product = type(layer).product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(layer), "product", lambda self, x, *more: kept.append(weakref.ref(x)) or product(self, x, *more)
        )
        loss = model.loss(IDS, IDS)
        once = len(kept)
        assert not any(x() is not None for x in kept[1:-1])
        loss.backward()
    assert len(kept) <= 2 * once


@pytest.mark.parametrize("precision", ["int8", "int4", "q4_1"])
@pytest.mark.parametrize(("family", "config"), [(GPT, GPT2), (Llama, LLAMA)])
def test_adapters_beside_quantised_weights_learn_as_beside_the_floats_that_they_stand_for(
    precision, family, config, tmp_path
):
    torch.manual_seed(0)
    family(config).save_pretrained(tmp_path)
    source = stream(tmp_path)
    models = quantized_module(source, precision, torch.float32), module_of(source, torch.float32, precision)
    found = []
    for model in models:
        torch.manual_seed(1)
        lora.put_in(model, lora.targets(config, "all"), 4, 8.0)
        for name, parameter in model.named_parameters():
            if ".adapter.b" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        loss = model.loss(IDS, IDS)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    assert found[0].keys() == found[1].keys() and all(".adapter." in n or n == "loss" for n in found[0])
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-3, atol=1e-5)


def test_only_floats_are_rounded(tmp_path):
    torch.manual_seed(0)
    GPT(GPT2).save_pretrained(tmp_path)
    model = quantized_module(stream(tmp_path), "q4_1", torch.float32)
    before = {name: p.dtype for name, p in model.named_parameters()}
    rounded(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        part = name.rpartition(".")[2] in ("values", "scale", "minimum")
        assert parameter.dtype == (before[name] if part else torch.bfloat16), name
