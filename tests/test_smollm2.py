"""The real model: SmolLM2-135M-Instruct's GGUF file, against transformers and llama.cpp on the same weights."""

import gguf
import numpy as np
import pytest
import torch
from conftest import nmse
from test_weights_gguf_llama_cpp import judge

import llmfast
from llmfast.models import from_pretrained
from llmfast.weights.checkpoint import stream
from llmfast.weights.converting import convert

pytestmark = pytest.mark.slow

# Text, numbers, and a chat's control tokens.
IDS = [
    1,
    4093,
    198,
    1780,
    314,
    260,
    3575,
    282,
    4649,
    47,
    2,
    198,
    1,
    520,
    9531,
    198,
    504,
    3575,
    282,
    4649,
    314,
    7042,
    30,
    2,
]


@pytest.fixture(scope="module")
def logits(smollm2) -> torch.Tensor:
    """(T, V) of ours, in float32, by PyTorch's operators."""
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        return from_pretrained(smollm2)(torch.tensor([IDS]))[0]


def test_logits_are_those_of_transformers_on_weights_that_the_package_dequantises(smollm2, logits):
    transformers = pytest.importorskip("transformers")
    reader = gguf.GGUFReader(smollm2)
    floats = {t.name: torch.from_numpy(gguf.quants.dequantize(np.array(t.data), t.tensor_type)) for t in reader.tensors}
    state = {
        "model.embed_tokens.weight": floats["token_embd.weight"],
        "model.norm.weight": floats["output_norm.weight"],
    }
    for block in range(30):
        theirs, ours = f"model.layers.{block}", f"blk.{block}"
        for part, heads in (("q", 9), ("k", 3)):
            weight = floats[f"{ours}.attn_{part}.weight"]
            halves = weight.view(heads, 32, 2, 576).transpose(1, 2).reshape(weight.shape)
            state[f"{theirs}.self_attn.{part}_proj.weight"] = halves
        state[f"{theirs}.self_attn.v_proj.weight"] = floats[f"{ours}.attn_v.weight"]
        state[f"{theirs}.self_attn.o_proj.weight"] = floats[f"{ours}.attn_output.weight"]
        for part in ("gate", "up", "down"):
            state[f"{theirs}.mlp.{part}_proj.weight"] = floats[f"{ours}.ffn_{part}.weight"]
        state[f"{theirs}.input_layernorm.weight"] = floats[f"{ours}.attn_norm.weight"]
        state[f"{theirs}.post_attention_layernorm.weight"] = floats[f"{ours}.ffn_norm.weight"]
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are in no file
    missing, surplus = model.load_state_dict(state, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not surplus
    model.tie_weights()
    with torch.inference_mode():
        assert nmse(logits, model.eval()(torch.tensor([IDS])).logits[0]) < 1e-6


def test_logits_and_tokens_are_those_of_llama_cpp_on_its_float32_form(smollm2, logits, tmp_path):
    convert(smollm2, tmp_path / "f32.gguf", "gguf", "f32")
    text = "Hello, world! It's 2024: naïve ☃ 日本語\n\n  and 12345 <|im_end|> more."
    theirs = judge(tmp_path, [{"file": str(tmp_path / "f32.gguf"), "ids": IDS, "new": 0, "text": text}])
    assert nmse(logits, torch.from_numpy(theirs["logits.0"])) < 1e-6
    assert theirs["tokens.0"].tolist() == llmfast.load(smollm2).tokenizer.encode(text)


def test_the_file_is_what_runs(smollm2, logits):
    source = stream(smollm2)
    assert source.precision == "q4_1" and source.precision_of("model.embed_tokens.weight") == "q8_0"
    llm = llmfast.load(smollm2)
    assert llm.precision == "q4_1"
    assert "Paris" in llm.generate("The capital of France is", temperature=0, max_new_tokens=8)
    decoder = llm.decoder(batch=1, capacity=64)
    with llm.using_backend():
        found = decoder.prefill([IDS])[0]
    assert nmse(found, logits[-1]) < 1e-2  # activations have 8 bits where it runs natively
