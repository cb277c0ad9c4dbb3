"""The native decoder on the Llama family: every switch, held to a forward pass written here from the formulas."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
import torch
from conftest import on_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inference_native import AS_STORED, TOLERANCE, needs_cpp, rounded, tokens
from torch import Tensor
from torch.nn import functional as F

from llmfast.inference.decoders import NativeDecoder, NativeModel, native
from llmfast.inference.decoders.native import BLOCK_ROWS, PRECISIONS
from llmfast.models.llama import LlamaConfig
from llmfast.models.rotary import RotarySettings
from llmfast.quantization.formats import FORMATS, QuantizedWeight, quantize
from llmfast.quantization.plan import PRECISIONS as QUANTIZED
from llmfast.quantization.plan import plan

pytestmark = [needs_cpp, pytest.mark.usefixtures("one_torch_thread")]

BASE = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=600,
)
SWITCHES = {
    "llama": dict(),
    "one key head, untied": dict(num_key_value_heads=1, tie_word_embeddings=False, vocab_size=77),
    "as many key heads": dict(num_key_value_heads=6, tie_word_embeddings=True),
    "every bias": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=20, num_attention_heads=4),
    "mistral": dict(model_type="mistral", sliding_window=11),
    "windows here and there": dict(
        model_type="smollm3", num_hidden_layers=4, sliding_window=19, window_blocks=(1, 2), no_rope_blocks=(1, 3)
    ),
    "granite": dict(
        model_type="granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=2.5,
    ),
    "partial, stretched": dict(
        head_dim=24,
        rope=RotarySettings(
            rope_theta=500.0, rope_type="yarn", factor=4.0, partial_rotary_factor=0.75, attention_factor=1.3
        ),
    ),
    "gelu": dict(hidden_act="gelu"),
    "heads of 128": dict(head_dim=128, num_hidden_layers=1),
    "nine groups, two blocks of q4_k": dict(hidden_size=288, intermediate_size=300, num_hidden_layers=1),
    "heads of 2": dict(head_dim=2, intermediate_size=7, hidden_size=10, vocab_size=5),
}
WHOLE_ROWS = {"int8"}  # formats whose activations have one scale a row


def config_of(switch: str) -> LlamaConfig:
    return LlamaConfig(**(BASE | SWITCHES[switch]))


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights by name; the head is scaled so that the logits vary by about 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for parameter in config.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[1] if len(parameter.shape) == 2 else 10
        weights[parameter.name] = noise / math.sqrt(fan_in) + ("norm" in parameter.name)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    ids = [i % config.vocab_size for i in range(20)]
    for _ in range(4):  # a tied head changes the embeddings, too
        weights[head] /= Reference(config, weights, {}).logits(ids).std()
    return weights


class Reference:
    """The forward pass in float32 on weights as a precision keeps them, with its rounding of activations."""

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor], formats: dict[str, str], cache: str = "fp32"):
        self.config, self.formats, self.cache = config, formats, cache
        self.weights = {name: self._stored(weight, formats.get(name)) for name, weight in weights.items()}

    @staticmethod
    def _stored(weight: Tensor, form: str | None) -> Tensor:
        if form in FORMATS:
            return quantize(weight, form).dequantize()
        return weight.bfloat16().float() if form == "bf16" else weight

    def product(self, x: Tensor, name: str, twice: Collection[str] = ()) -> Tensor:
        """Activations of the formats in `twice` are rounded a second time, the second time what the first left over."""
        form = self.formats.get(f"{name}.weight", "fp32")
        first = rounded(x, form)
        x = first + rounded(x - first, form) if form in twice else first
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def turned(self, x: Tensor) -> Tensor:
        """(heads, T, D), each channel of the first half of what turns with its fellow in the second."""
        rotary = self.config.arithmetic().rotary
        assert rotary is not None
        half = len(rotary.inverse_frequencies)
        angles = torch.arange(x.shape[1])[:, None].float() * rotary.inverse_frequencies
        cos, sin = angles.cos() * rotary.factor, angles.sin() * rotary.factor
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def attention(self, x: Tensor, block: int) -> Tensor:
        config, at = self.config, f"model.layers.{block}.self_attn"
        T, D, group = len(x), config.head_dim, config.num_attention_heads // config.key_heads
        q, k, v = (self.product(x, f"{at}.{part}_proj", AS_STORED).view(T, -1, D).transpose(0, 1) for part in "qkv")
        if config.model_type == "qwen3":
            q, k = self.norm(q, f"{at}.q_norm"), self.norm(k, f"{at}.k_norm")
        if block not in config.no_rope_blocks:
            q, k = self.turned(q), self.turned(k)
        k, v = (rounded(x, self.cache).repeat_interleave(group, dim=0) for x in (k, v))
        scale = 1 / math.sqrt(D) if config.attention_multiplier is None else config.attention_multiplier
        distance = torch.arange(T)[:, None] - torch.arange(T)
        windowed = config.window_blocks is None or block in config.window_blocks
        window = config.sliding_window if windowed and config.sliding_window else T
        scores = (q @ k.transpose(1, 2) * scale).masked_fill((distance < 0) | (distance >= window), -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        return self.product(attended, f"{at}.o_proj", WHOLE_ROWS)

    def mlp(self, x: Tensor, block: int) -> Tensor:
        at = f"model.layers.{block}.mlp"
        act = {"silu": F.silu, "gelu": F.gelu}[self.config.hidden_act]
        gated = act(self.product(x, f"{at}.gate_proj")) * self.product(x, f"{at}.up_proj")
        return self.product(gated, f"{at}.down_proj", WHOLE_ROWS)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        config = self.config
        x = self.weights["model.embed_tokens.weight"][ids] * config.embedding_multiplier
        for block in range(config.num_hidden_layers):
            at = f"model.layers.{block}"
            x = x + self.attention(self.norm(x, f"{at}.input_layernorm"), block) * config.residual_multiplier
            x = x + self.mlp(self.norm(x, f"{at}.post_attention_layernorm"), block) * config.residual_multiplier
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return self.product(self.norm(x, "model.norm"), head, WHOLE_ROWS | AS_STORED) / config.logits_scaling


def packed(switch: str, precision: str = "fp32") -> tuple[NativeModel, Reference]:
    config = config_of(switch)
    weights = random_weights(config)
    model = NativeModel(config, weights.items(), precision)
    return model, Reference(config, weights, model.formats)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_gives_the_logits_of_the_formulas(switch, precision):
    model, reference = packed(switch, precision)
    ids = tokens(44, model.config.vocab_size)
    expected = reference.logits(ids)
    decoder = NativeDecoder(model, 1, 64, cache_precision="fp32")
    atol = TOLERANCE[precision]
    torch.testing.assert_close(decoder.prefill([ids[:34]])[0], expected[33], rtol=0, atol=atol)
    for position in range(34, 44):
        logits = decoder.step(torch.tensor(ids[position : position + 1]))[0]
        torch.testing.assert_close(logits, expected[position], rtol=0, atol=atol)
    decoder.rewind(34)
    torch.testing.assert_close(decoder.step_block(torch.tensor(ids[34:])), expected[34:], rtol=0, atol=atol)


@pytest.mark.parametrize("cache", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("switch", ["llama", "qwen3", "mistral", "windows here and there"])
@pytest.mark.parametrize("length", [1, 16, 17, 255, 256, 257, 520])
def test_prompts_and_caches_of_any_length(switch, length, cache):
    config = config_of(switch)
    weights = random_weights(config)
    reference, ids = Reference(config, weights, {}, cache), tokens(length + 3)
    decoder = NativeDecoder(NativeModel(config, weights.items(), "fp32"), 1, cache_precision=cache)
    atol = {"fp32": 3e-5, "bf16": 3e-3, "int8": 0.02}[cache]
    logits = [decoder.prefill([ids[:length]])[0]]
    logits += [decoder.step(torch.tensor([ids[length + i]]))[0] for i in range(3)]
    torch.testing.assert_close(torch.stack(logits), reference.logits(ids)[length - 1 :], rtol=0, atol=atol)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 255, 256, 257, 300])
def test_windows_end_anywhere_in_a_run_of_keys(window):
    config = LlamaConfig(**(BASE | dict(model_type="mistral", sliding_window=window)))
    weights = random_weights(config)
    model, ids = NativeModel(config, weights.items(), "fp32"), tokens(330)
    expected = Reference(config, weights, {}).logits(ids)
    decoder = NativeDecoder(model, 1)
    torch.testing.assert_close(decoder.prefill([ids[:310]])[0], expected[309], rtol=0, atol=3e-5)
    torch.testing.assert_close(decoder.step_block(torch.tensor(ids[310:326])), expected[310:326], rtol=0, atol=3e-5)
    for position in range(326, 330):
        logits = decoder.step(torch.tensor(ids[position : position + 1]))[0]
        torch.testing.assert_close(logits, expected[position], rtol=0, atol=3e-5)


COMPANY = {
    (switch, precision): packed(switch, precision)[0]
    for switch in ("llama", "qwen3", "windows here and there")
    for precision in ("fp32", "bf16", "int8", "int4", "q8_0", "q4_1", "q4_k")
}


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=6),
    model=st.sampled_from(list(COMPANY)),
    cache=st.sampled_from(["fp32", "bf16", "int8"]),
    steps=st.integers(0, 4),
)
def test_a_sequence_has_the_same_bits_in_any_company(lengths, model, cache, steps):
    """Decoding; prompts share a step as far as there is room, and their tiles differ with it."""
    weights = COMPANY[model]
    prompts = [tokens(n, seed=n) for n in lengths]
    together = NativeDecoder(weights, len(prompts), 100, cache)
    together.prefill(prompts)
    alone = [NativeDecoder(weights, 1, 100, cache) for _ in prompts]
    for decoder, prompt in zip(alone, prompts, strict=True):
        decoder.prefill([prompt])
    for step in range(steps):
        ids = torch.tensor(tokens(len(prompts), seed=step))
        batch = together.step(ids)
        for row, decoder in enumerate(alone):
            assert torch.equal(batch[row], decoder.step(ids[row : row + 1])[0])


@pytest.mark.parametrize("cache", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("model", COMPANY)
def test_a_block_of_tokens_has_the_bits_of_single_steps(model, cache):
    weights = COMPANY[model]
    single, block = (NativeDecoder(weights, 1, cache_precision=cache) for _ in range(2))
    prompt, ids = tokens(250), torch.tensor(tokens(BLOCK_ROWS, seed=1))
    single.prefill([prompt])
    block.prefill([prompt])
    one_by_one = torch.cat([single.step(ids[i : i + 1]) for i in range(BLOCK_ROWS)])
    assert torch.equal(block.step_block(ids), one_by_one)
    block.rewind(255)
    assert torch.equal(block.step(ids[5:6])[0], one_by_one[5])


@pytest.mark.parametrize("cache", ["bf16", "int8"])
@pytest.mark.parametrize("model", COMPANY)
def test_the_number_of_threads_changes_no_bit(model, cache, monkeypatch):
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "thread_count", lambda threads=threads: threads)
        decoder = NativeDecoder(COMPANY[model], 1, cache_precision=cache)
        logits = [decoder.prefill([tokens(300)]), decoder.step(torch.tensor([7])), decoder.step_block(torch.arange(9))]
        results.append(torch.cat(logits))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("precision", QUANTIZED)
def test_quantised_weights_are_taken_as_they_are(precision):
    config = config_of("qwen3")
    weights = random_weights(config)
    model = NativeModel(config, weights.items(), precision)
    given = {name: quantize(weights[name], form) for name, form in model.formats.items()}
    again = NativeModel(config, (weights | given).items(), precision)
    ids = [tokens(20)]
    assert torch.equal(NativeDecoder(model, 1).prefill(ids), NativeDecoder(again, 1).prefill(ids))


def test_minus_128_is_a_number_of_q8_0():
    """No rounding gives it, but a file may hold it."""
    config = config_of("llama")
    weights = random_weights(config)
    name = "model.layers.0.mlp.down_proj.weight"
    parts = dict(quantize(weights[name], "q8_0").parts)
    parts["values"] = torch.where(parts["values"] < -100, -128, parts["values"])
    given = weights | {name: QuantizedWeight("q8_0", tuple(weights[name].shape), parts)}
    model = NativeModel(config, given.items(), "q8_0")
    reference = Reference(config, weights, model.formats)
    reference.weights[name] = given[name].dequantize()
    assert (parts["values"] == -128).any()
    logits = NativeDecoder(model, 1, cache_precision="fp32").prefill([tokens(20)])[0]
    torch.testing.assert_close(logits, reference.logits(tokens(20))[19], rtol=0, atol=0.05)


MIXTURES = {
    "in groups": {"q_proj": "q4_k", "k_proj": "q4_1", "v_proj": "q8_0", "o_proj": "int4", "down_proj": "q8_0"},
    "two of three": {"v_proj": "q8_0", "gate_proj": "q4_1", "up_proj": "q4_1"},
    "not all in groups": {"q_proj": "int8", "gate_proj": "q8_0", "up_proj": "int8"},
    "with floats": {"k_proj": "bf16", "up_proj": "fp32", "q_proj": "q8_0"},
    "gate and up": {"gate_proj": "q8_0"},
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("switch", ["every bias", "qwen3", "heads of 128", "heads of 2"])
def test_weights_that_share_a_matrix_may_have_formats_of_their_own(switch, mixture):
    """As a file has them: without a rounding beyond its own, whatever the matrix is kept in."""
    config = config_of(switch)
    formats = {
        name: next((form for part, form in MIXTURES[mixture].items() if part in name), form)
        for name, form in plan(config, "q4_k").items()
    }
    weights = {name: weight.bfloat16().float() for name, weight in random_weights(config).items()}
    model = NativeModel(config, weights.items(), "q4_k", formats)
    reference = Reference(config, weights, formats)
    reference.formats = model.formats  # how activations are rounded
    ids = tokens(40, config.vocab_size)
    expected = reference.logits(ids)
    decoder = NativeDecoder(model, 1, 64, cache_precision="fp32")
    prompt, rest = decoder.prefill([ids[:30]])[0], decoder.step_block(torch.tensor(ids[30:]))
    torch.testing.assert_close(torch.cat([prompt[None], rest]), expected[29:], rtol=0, atol=0.05)
    given = {name: quantize(weights[name], form) for name, form in formats.items() if form in FORMATS}
    again = NativeDecoder(NativeModel(config, (weights | given).items(), "q4_k", formats), 1, cache_precision="fp32")
    assert torch.equal(again.prefill([ids[:30]])[0], prompt)


def test_every_instruction_set_gives_the_same_logits():
    program = """
import torch
from test_inference_native_llama import *
for switch in SWITCHES:  # what a format does is the same under every switch, sizes apart
    sizes = switch in ("llama", "heads of 128", "heads of 2")
    every = switch in ("qwen3", "nine groups, two blocks of q4_k")
    for precision in PRECISIONS if every else ("fp32", "int8", "q4_1") if sizes else ("fp32",):
        test_every_switch_gives_the_logits_of_the_formulas(switch, precision)
for mixture in MIXTURES:
    test_weights_that_share_a_matrix_may_have_formats_of_their_own("qwen3", mixture)
for switch in ("llama", "qwen3", "windows here and there"):
    for cache in ("fp32", "bf16", "int8"):
        test_prompts_and_caches_of_any_length(switch, 300, cache)
"""
    on_instruction_sets(program, timeout=300, own=False)
