"""The GPT as a module: its loss, its initial weights, dropout, gradients, training, and torch.compile."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fit, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import llmfast
from llmfast import GPT

pytestmark = pytest.mark.usefixtures("one_thread")


def make(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(tiny_config(**changes))


def plain_gpt(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """GPT-2's arithmetic once more, in float64 and in the plainest form."""
    config, w = model.config, {name: t.double() for name, t in model.state_dict().items()}
    T = ids.shape[1]

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + config.layer_norm_epsilon).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        if config.activation_function == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for layer in range(config.n_layer):
        h = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(config.n_embd, dim=-1)
        heads = []
        for i in range(config.n_head):
            part = slice(i * config.head_dim, (i + 1) * config.head_dim)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(config.head_dim)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, dim=-1), f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@settings(max_examples=25)
@given(
    vocab_size=st.integers(1, 30),
    n_head=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    n_layer=st.integers(1, 3),
    n_inner=st.none() | st.integers(1, 30),
    activation=st.sampled_from(["gelu", "gelu_new"]),
    tied=st.booleans(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 12),
)
def test_logits_are_those_of_the_plain_formulas(
    vocab_size, n_head, head_dim, n_layer, n_inner, activation, tied, batch, tokens
):
    model = make(
        vocab_size=vocab_size,
        n_head=n_head,
        n_embd=n_head * head_dim,
        n_layer=n_layer,
        n_inner=n_inner,
        activation_function=activation,
        tie_word_embeddings=tied,
        layer_norm_epsilon=1e-3,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(vocab_size, (batch, tokens))
    expected = plain_gpt(model, ids)
    with torch.inference_mode():
        logits = model(ids)
    assert logits.shape == (batch, tokens, vocab_size) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_every_backend_computes_the_same_model(place):
    backend, device = place
    model = make(n_embd=24, n_head=2).eval()
    ids = torch.randint(19, (2, 11))
    expected = plain_gpt(model, ids)
    with llmfast.use_backend(backend), torch.inference_mode():
        logits = model.to(device)(ids.to(device)).cpu()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_a_later_token_does_not_change_an_earlier_position():
    model = make().eval()
    ids = torch.randint(19, (1, 10))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 19
    with torch.inference_mode():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_loss_is_the_cross_entropy_of_the_logits_and_so_are_its_gradients(place):
    backend, device = place
    model = make().to(device)
    ids = torch.randint(19, (3, 9), device=device)
    targets = torch.randint(19, (3, 9), device=device)
    targets[0, :4] = -100
    with llmfast.use_backend(backend):
        loss = model.loss(ids, targets)
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with llmfast.use_backend("pytorch"):
        expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_gradient_reaches_every_parameter(tied):
    model = make(tie_word_embeddings=tied)
    ids = torch.arange(16).unsqueeze(0)  # every position of the context
    model.loss(ids, (ids + 1) % 19).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


def test_initial_weights_have_gpt2s_spread():
    model = make(vocab_size=400, n_positions=300, n_embd=64, n_head=4, n_layer=3, initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            parameter = parameter.detach()
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02  # 6 branches in 3 layers
            assert abs(float(parameter.std()) / std - 1) < 0.06, name
            assert abs(float(parameter.mean())) < 0.1 * std, name


def test_initial_weights_follow_the_seed():
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(first.transformer.wte.weight, again.transformer.wte.weight)
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)


def test_a_tied_head_is_the_embedding_and_stays_it_when_moved():
    model = make().to(torch.bfloat16)
    assert model.lm_head.weight is model.transformer.wte.weight
    untied = make(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight


@pytest.mark.parametrize("which", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_acts_in_training_only(which):
    model = make(**{which: 0.5})
    ids = torch.randint(19, (2, 12))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(ids), model(ids))
        still = model(ids)
        model.train()
        torch.manual_seed(0)
        first = model(ids)
        second = model(ids)
        torch.manual_seed(0)
        again = model(ids)
    assert not torch.allclose(first, still)
    assert not torch.allclose(first, second)
    assert torch.equal(first, again)  # the seed decides


def test_without_dropout_training_mode_computes_the_same():
    model = make()
    ids = torch.randint(19, (2, 12))
    with torch.no_grad():
        assert torch.equal(model.train()(ids), model.eval()(ids))


def test_more_tokens_than_the_context_are_an_error_naming_both():
    model = make()
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        model.loss(torch.zeros(1, 17, dtype=torch.int64), torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("shape, dtype", [((5,), torch.int64), ((1, 5), torch.float32), ((1, 5), torch.int32)])
def test_ids_of_the_wrong_shape_or_type_are_an_error(shape, dtype):
    with pytest.raises(ValueError, match=r"ids must be \(B, T\) int64"):
        make()(torch.zeros(shape, dtype=dtype))


def losses_of(backend: str, device: str, steps: int) -> list[float]:
    """A new model's losses while it learns two sequences."""
    model = make(initializer_range=0.02).to(device)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with llmfast.use_backend(backend):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model.loss(ids[:, :-1], ids[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_a_few_steps_reduce_the_loss(fast_place):
    losses = losses_of(*fast_place, steps=20)
    assert losses[0] == pytest.approx(math.log(19), rel=0.05)  # a new model knows nothing
    assert losses[-1] < 0.5 * losses[0]


def test_steps_have_the_losses_of_pytorch(place):
    assert losses_of(*place, steps=3) == pytest.approx(losses_of("pytorch", "cpu", steps=3), rel=1e-4)


def test_a_model_can_learn_a_sequence_by_heart():
    model = fit(make(), [[3, 1, 4, 1, 5, 9, 2, 6]], steps=80, lr=1e-2)
    with torch.inference_mode():
        assert model(torch.tensor([[3, 1, 4, 1, 5, 9, 2]])).argmax(-1).tolist() == [[1, 4, 1, 5, 9, 2, 6]]


@pytest.mark.slow
def test_the_compiled_model_equals_the_eager_one():
    torch.compiler.reset()
    model = make().eval()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    ids, targets = torch.randint(19, (2, 9)), torch.randint(19, (2, 9))
    with llmfast.use_backend("pytorch"):
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)
        compiled(ids).square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(ids).square().mean().backward()
        for ours, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)
        loss = torch.compile(model.loss, fullgraph=True, backend="inductor")
        torch.testing.assert_close(loss(ids, targets), model.loss(ids, targets), rtol=1e-5, atol=1e-6)
