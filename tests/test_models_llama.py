"""The Llama family against transformers: every `model_type` and every switch, on tiny models with random weights."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import BACKENDS

import llmfast
from llmfast.models import GPT, Llama, LlamaConfig, from_pretrained
from llmfast.models.rotary import RotarySettings

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    vocab_size=67, hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    pad_token_id=None, attn_implementation="eager",
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64, "attention_factor": 1.1,
    "short_factor": [1.0, 1.5, 2.0, 8.0], "long_factor": [1.0, 1.5, 2.0, 8.0],
}  # fmt: skip
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama, one key head, tied": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama, as many key heads": ("Llama", dict(num_key_value_heads=4)),
    "llama, biases everywhere": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, head_dim of its own": ("Llama", dict(head_dim=12)),
    "llama, gelu, epsilon": ("Llama", dict(hidden_act="gelu_pytorch_tanh", rms_norm_eps=0.1)),
    "llama, theta": ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0})),
    "llama, linear": (
        "Llama",
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}),
    ),
    "llama, dynamic": ("Llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0})),
    "llama 3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama, yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama, yarn by hand": (
        "Llama",
        dict(rope_parameters=YARN | {"attention_factor": 0.7, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}),
    ),
    "llama, yarn, mscale": ("Llama", dict(rope_parameters=YARN | {"mscale": 0.8, "mscale_all_dim": 0.4})),
    "llama, longrope": ("Llama", dict(rope_parameters=LONGROPE)),
    "mistral, no window": ("Mistral", dict(sliding_window=None)),
    "mistral, window": ("Mistral", dict(sliding_window=7, head_dim=10)),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows above": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(head_dim=10)),
    "qwen3, biases, windows by type": (
        "Qwen3",
        dict(
            head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=2)),
    "smollm3, still layers by hand, windows": (
        "SmolLM3",
        dict(no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=5, attention_bias=True),
    ),
    "granite": (
        "Granite",
        dict(
            embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.6, logits_scaling=2.5,
            attention_bias=True, mlp_bias=True,
        ),
    ),
}  # fmt: skip


def theirs(name: str):
    """A transformers model with random weights, its norms' and biases' too."""
    family, changes = MODELS[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "bias" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The same models as directories in Hugging Face's layout, made when they are asked for."""
    made: dict[str, tuple] = {}

    def directory(name: str):
        if name not in made:
            model = theirs(name)
            made[name] = (model, tmp_path_factory.mktemp("model"))
            model.save_pretrained(made[name][1])
        return made[name]

    return directory


FAST = [(backend, device) for backend, device in BACKENDS if backend != "triton" or device != "cpu"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", FAST, ids="-".join)
def test_logits_are_those_of_transformers(directories, name, place):
    expected, directory = directories(name)
    backend, device = place
    ids = torch.randint(67, (2, 40), generator=torch.Generator().manual_seed(1))
    model = from_pretrained(directory).to(device)
    with torch.no_grad(), llmfast.use_backend(backend):
        found = model(ids.to(device)).cpu()
        assert relative(found, expected(ids).logits) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_transformers_cached_and_not_batched_and_alone(directories, name):
    """Past a sliding window, and for prompts of different lengths."""
    expected, directory = directories(name)
    llm = llmfast.load(directory, backend="pytorch", precision="fp32")
    prompts = [[5, 9, 3], [11, 4, 60, 2, 8, 33, 17, 21, 6, 40, 41], [7]]
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            whole = expected.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False,
                pad_token_id=0, eos_token_id=-1,
            )  # fmt: skip
        rows.append(whole[0].tolist())
        for use_cache in (True, False):
            found = llm.generate(torch.tensor(prompt), max_new_tokens=16, temperature=0, use_cache=use_cache)
            assert same_text(found.tolist(), rows[-1], expected), (prompt, use_cache)
    decoder = llm.decoder(batch=len(prompts))
    with llm.using_backend():
        logits = decoder.prefill(prompts)
        batch = [list(prompt) for prompt in prompts]
        for _ in range(16):
            tokens = logits.argmax(-1)
            for row, token in zip(batch, tokens.tolist(), strict=True):
                row.append(token)
            logits = decoder.step(tokens)
    assert all(same_text(found, row, expected) for found, row in zip(batch, rows, strict=True))


def same_text(found: list[int], expected: list[int], model) -> bool:
    """Equal, or different first where the two likeliest tokens' logits lie within 1e-4."""
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    if at is None:
        return True
    with torch.no_grad():
        top = model(torch.tensor([expected[:at]])).logits[0, -1].topk(2)
    return bool(top.values[0] - top.values[1] < 1e-4) and {found[at], expected[at]} == set(top.indices.tolist())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written_and_agrees(directories, name, tmp_path):
    expected, directory = directories(name)
    model = from_pretrained(directory)
    model.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(again) is type(expected)
    ids = torch.randint(67, (1, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected(ids).logits)
    assert from_pretrained(tmp_path).config == model.config


def document(**changes) -> dict:
    sizes = {name: value for name, value in SIZES.items() if name != "attn_implementation"}
    return sizes | {"model_type": "llama"} | changes


def test_old_and_new_spellings_of_rotary_positions_mean_the_same():
    new = LlamaConfig.from_document(document(rope_parameters=LLAMA3))
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    old = LlamaConfig.from_document(document(rope_theta=500.0, rope_scaling=scaling))
    oldest = {**scaling, "type": scaling["rope_type"]}
    del oldest["rope_type"]
    assert new == old == LlamaConfig.from_document(document(rope_theta=500.0, rope_scaling=oldest))
    assert new.rope.rope_type == "llama3" and new.rope.rope_theta == 500.0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attn_logit_softcapping": 50.0}, "sets attn_logit_softcapping to 50.0"),
        ({"rope_interleaved": True}, "sets rope_interleaved to True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "sets quantization_config"),
        ({"sliding_window": 8}, "sets sliding_window to 8, which llama does not compute"),
        ({"residual_multiplier": 0.5}, "sets residual_multiplier to 0.5, which llama does not compute"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type must be one of default, linear"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' needs short_factor"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0, 1.0, 2.0, 8.0]}}, "other factors for long texts"),
        ({"rope_scaling": LONGROPE | {"short_factor": "1234"}}, "short_factor must be a list of positive numbers"),
        ({"rope_scaling": LONGROPE, "head_dim": 16}, "short_factor must have 8 numbers, got 4"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 3}}, "sets alpha to 3"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set for all layers"),
        ({"num_key_value_heads": 3}, "3 does not divide 4"),
        ({"hidden_size": 30}, "4 does not divide 30"),
        ({"head_dim": 7}, "an even number of channels, got 7"),
        ({"vocab_size": None}, "does not say vocab_size"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["?"]}, "layer_types must be 4"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must be one number for each of 4"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        LlamaConfig.from_document(document(**changes))


def test_settings_that_change_nothing_are_read_past():
    real = document(
        architectures=["LlamaForCausalLM"], is_llama_config=True, pretraining_tp=1, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, torch_dtype="bfloat16", transformers_version="4.42.3", use_cache=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    )  # fmt: skip
    assert LlamaConfig.from_document(real).rope == RotarySettings(rope_theta=100000)


def test_several_end_tokens(directories, tmp_path):
    config = LlamaConfig.from_document(document(eos_token_id=[2, 5]))
    assert config.end_tokens == (2, 5)
    assert LlamaConfig.from_document(json.loads(json.dumps(config.to_document()))).end_tokens == (2, 5)


def test_a_preset_with_another_width_keeps_its_rule_for_heads():
    assert LlamaConfig.preset("smollm2-135m", hidden_size=1152).head_dim == 128
    assert LlamaConfig.preset("qwen3-0.6b", hidden_size=512).head_dim == 128


def test_a_class_refuses_another_family(directories):
    _, directory = directories("llama")
    assert isinstance(Llama.from_pretrained(directory), Llama)
    with pytest.raises(ValueError, match="is a Llama, not a GPT: read it by llmfast.models.from_pretrained"):
        GPT.from_pretrained(directory)


def test_gradients_reach_every_parameter(directories):
    _, directory = directories("qwen3, biases, windows by type")
    model = from_pretrained(directory)
    ids = torch.randint(67, (2, 12), generator=torch.Generator().manual_seed(3))
    with llmfast.use_backend("pytorch"):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
