"""Models in GGUF files: every family there and back, what is stored is what runs, and damage is named."""

import dataclasses
import re
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import nmse, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights_gguf import padded, string, value
from test_weights_gguf_llama_cpp import MODELS, llama

import llmfast
from llmfast.models import LlamaConfig, create, from_pretrained
from llmfast.models.rotary import RotarySettings
from llmfast.quantization.formats import QuantizedWeight
from llmfast.quantization.plan import plan
from llmfast.weights import gguf_names
from llmfast.weights.checkpoint import stream
from llmfast.weights.converting import convert
from llmfast.weights.gguf import GGUFFile
from llmfast.weights.loading import module_of

pytestmark = pytest.mark.usefixtures("one_thread")


def random_model(config, directory: Path):
    """A model whose norms and biases are not at their trivial start either, saved."""
    torch.manual_seed(0)
    model = create(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model


def as_gguf(config, directory: Path, kind: str = "f32") -> Path:
    random_model(config, directory)
    convert(directory, directory / "model.gguf", "gguf", kind)
    return directory / "model.gguf"


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:llama.cpp would not compute the window")
def test_every_family_comes_back_as_it_was(name, tmp_path):
    """The same bits of every weight, in Hugging Face's order again, and a configuration that computes the same."""
    file = as_gguf(MODELS[name], tmp_path)
    ours, again = from_pretrained(tmp_path), from_pretrained(file)
    assert type(again) is type(ours)
    state = ours.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        assert nmse(again(ids), ours(ids)) < 1e-12
    convert(file, tmp_path / "back", "safetensors")
    assert from_pretrained(tmp_path / "back").config == again.config


@settings(max_examples=15)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1), (2, 1)]),
    pairs=st.integers(1, 5),
    kind=st.sampled_from(["llama", "qwen2", "qwen3", "granite"]),
    tied=st.booleans(),
)
def test_shapes_of_all_kinds_come_back(tmp_path_factory, heads, pairs, kind, tied):
    directory = tmp_path_factory.mktemp("shapes")
    config = llama(
        kind, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=2 * pairs, hidden_size=20,
        intermediate_size=7, num_hidden_layers=1, vocab_size=11, tie_word_embeddings=tied,
    )  # fmt: skip
    again = from_pretrained(as_gguf(config, directory))
    state = from_pretrained(directory).state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_a_head_that_is_stored_twice_is_tied_only_if_it_is_the_same(tmp_path):
    file = as_gguf(tiny_config(tie_word_embeddings=False), tmp_path)
    assert not stream(file).config.tie_word_embeddings
    model = from_pretrained(tmp_path)
    model.lm_head.weight.data.copy_(model.token_embedding.weight)
    model.save_pretrained(tmp_path)
    convert(tmp_path, file, "gguf", overwrite=True)
    assert stream(file).config.tie_word_embeddings


def test_llama_3s_scaling_travels_as_factors_that_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    file = as_gguf(MODELS["llama 3"], tmp_path)
    assert "rope_freqs.weight" in GGUFFile(file).tensors
    convert(file, tmp_path / "back", "safetensors")
    ids = torch.arange(30).unsqueeze(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        assert nmse(theirs(ids).logits, from_pretrained(tmp_path)(ids)) < 1e-10


# --- what is stored is what runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, form", [("q8_0", "q8_0"), ("q4_0", "q4_1"), ("q4_1", "q4_1")])
def test_blocks_run_as_they_are_stored(tmp_path, kind, form):
    file = as_gguf(llama(head_dim=16), tmp_path, kind)
    source = stream(file)
    assert source.precision == source.recommended_precision() == form
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is rounded
        weights = dict(source.tensors(source.quantization.weights))
    for parameter in source.config.parameters():
        tensor = theirs[gguf_names.tensor_name(parameter)]
        expected = torch.from_numpy(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type))
        if parameter.role in ("query", "key"):  # neighbouring channels are halves of a head here
            heads = 4 if parameter.role == "query" else 2
            expected = expected.view(heads, 8, 2, -1).transpose(1, 2).reshape(expected.shape)
        weight = weights[parameter.name]
        assert isinstance(weight, QuantizedWeight) == parameter.is_matrix
        found = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        assert torch.equal(found, expected.view(found.shape)), parameter.name
    llm = llmfast.load(file)
    assert llm.precision == form
    ids = torch.arange(12)
    expected = llmfast.load(file, backend="pytorch", precision="fp32").score(ids).total
    assert llm.score(ids).total == pytest.approx(expected, abs=0.2)
    assert llmfast.load(file, precision="int4").precision == "int4"  # quantised anew on request


def requantised(file: Path, kind: str) -> Path:
    """The same model with the matrices of its blocks in another type of the package's, or random blocks of it."""
    reader, path = gguf.GGUFReader(file), file.with_name(f"{kind}.gguf")
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        floats = np.array(tensor.data)
        if tensor.name.startswith("blk") and floats.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quants.quantize(floats, type_), raw_dtype=type_)
        else:
            writer.add_tensor(tensor.name, floats)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_other_blocks_are_rounded_to_8_bits_and_the_cost_is_said(tmp_path, kind):
    file = requantised(as_gguf(llama(), tmp_path), kind)
    source = stream(file)
    assert source.precision == "q8_0"
    with pytest.warns(UserWarning, match=rf"{kind}.gguf: its {kind.lower()} weights are rounded to q8_0") as said:
        rounded = dict(source.tensors(source.quantization.weights))
    exact = dict(source)  # as floats nothing is rounded, nor said
    assert len(said) == 1
    lost = whole = 0.0
    for name in source.quantization.weights:
        lost += float((rounded[name].dequantize() - exact[name]).double().square().sum())
        whole += float(exact[name].double().square().sum())
    stated = float(re.search(r"changes them by ([\d.]+)%", str(said[0].message))[1])
    assert 0.1 < stated < 1 and stated == pytest.approx(100 * (lost / whole) ** 0.5, abs=0.006)
    with pytest.warns(UserWarning, match="rounded to q8_0"):
        assert llmfast.load(file).precision == "q8_0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module_of(source, torch.float32)
        module_of(source, torch.float32, "int4")  # asked for


def test_a_model_of_floats_runs_as_floats(tmp_path):
    source = stream(as_gguf(llama(), tmp_path, "bf16"))
    assert source.precision is None and source.quantization is None and source.recommended_precision() is None
    assert {source.precision_of(name) for name in source.sizes} == {"bfloat16", "float32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever asks for 4 bits knows that they round
        weights = dict(source.tensors(plan(source.config, "int4")))
    assert sum(isinstance(weight, QuantizedWeight) for weight in weights.values()) == 2 + 4 * 7


# --- damage ---------------------------------------------------------------------------------------------------------


def edited(file: Path, changes: dict, without: tuple[str, ...] = (), name: str = "edited.gguf", tensors=None) -> Path:
    """The same file with values changed, added, or left out (None), and tensors left out or changed."""
    reader, path = gguf.GGUFReader(file), file.with_name(name)
    values = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} | changes
    writer = gguf.GGUFWriter(path, values.pop("general.architecture") or "")
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for key, content in values.items():
        if isinstance(content, list):
            writer.add_array(key, content)
        elif content is not None:
            writer.add_key_value(key, content, gguf.GGUFValueType[kinds[type(content)]])
    for tensor in reader.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, (tensors or {}).get(tensor.name, np.array(tensor.data)))
    for key in (tensors or {}).keys() - {tensor.name for tensor in reader.tensors}:
        writer.add_tensor(key, tensors[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return as_gguf(llama(num_hidden_layers=1), tmp_path_factory.mktemp("small"))


COMPLAINTS = [
    ({"general.architecture": "mamba"}, "it holds a 'mamba' model; the architectures that run are gpt2, llama"),
    ({"split.count": 3}, "it is one of 3 files that are a model together"),
    ({"llama.block_count": None}, "it does not say llama.block_count"),
    ({"llama.block_count": 3_000_000_000}, "tensors, too few for 3000000000 blocks"),
    ({"llama.block_count": 2}, "missing blk.1.attn_k.weight"),
    ({"llama.block_count": "1"}, "num_hidden_layers must be a positive integer, got '1'"),
    ({"llama.block_count": 0}, "num_hidden_layers must be a positive integer, got 0"),
    ({"llama.embedding_length": 80}, "wrongly shaped: token_embd.weight is .67, 64., not .67, 80."),
    ({"llama.attention.head_count": 0}, "num_attention_heads must be a positive integer"),
    ({"llama.attention.head_count_kv": 3}, "3 does not divide 4"),
    ({"llama.attention.head_count": [4, 8]}, "num_attention_heads must be a positive integer, got .4, 8."),
    ({"llama.attention.value_length": 8}, "heads of 16 channels with attention.value_length 8"),
    ({"llama.rope.dimension_count": 8}, "heads of 16 channels with rope.dimension_count 8"),
    ({"llama.expert_count": 8}, "it sets llama.expert_count to 8, which is not computed here"),
    ({"llama.attention.sliding_window": 8}, "it sets llama.attention.sliding_window to 8"),
    ({"llama.attention.causal": False}, "it sets llama.attention.causal to False"),
    ({"llama.attention.causal": True}, None),
    ({"llama.expert_count": 0}, None),
    ({"llama.rope.scaling.type": "longrope"}, "scales rotary positions by 'longrope'"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, None),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor to 0.5"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -2.0}, "factor must be a positive number"),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps must be a positive number"),
    ({"llama.vocab_size": 5}, None),  # the embedding says it
    ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id must be a token id or None"),
]


@pytest.mark.parametrize("changes, complaint", COMPLAINTS, ids=str)
def test_a_setting_that_is_missing_wrong_or_not_computed_is_named(small, changes, complaint):
    path = edited(small, changes)
    if complaint is None:
        stream(path)
        return
    with pytest.raises(ValueError, match=complaint) as error:
        stream(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_surplus_wrongly_shaped_and_unreadable_tensors_are_named_in_one_error(small):
    path = edited(
        small,
        {},
        without=("blk.0.ffn_norm.weight",),
        tensors={
            "blk.0.ffn_gate_exps.weight": np.zeros((2, 3), np.float32),
            "output_norm.weight": np.zeros(7, np.float32),
            "blk.0.attn_norm.weight": np.zeros(64, np.int8),
        },
    )
    with pytest.raises(ValueError) as error:
        stream(path)
    for part in (
        "does not fit its metadata: missing blk.0.ffn_norm.weight; surplus blk.0.ffn_gate_exps.weight; wrongly shaped: "
        "output_norm.weight is (7,), not (64,); of a type that is not read: blk.0.attn_norm.weight is I8",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "tensors, complaint",
    [
        ({"rope_freqs.weight": np.ones(7, np.float32)}, r"rope_freqs.weight is F32 \(7,\), not F32 \(8,\)"),
        ({"rope_freqs.weight": np.ones(8, np.float16)}, r"rope_freqs.weight is F16 \(8,\)"),
        ({"rope_freqs.weight": np.zeros(8, np.float32)}, "short_factor must be a list of positive numbers"),
        ({"token_embd.weight": np.zeros(8, np.float32)}, "it has no token_embd.weight"),
    ],
)
def test_tensors_that_the_configuration_needs_are_checked(small, tensors, complaint):
    with pytest.raises(ValueError, match=complaint):
        stream(edited(small, {}, tensors=tensors))


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_model_is_read_or_a_value_error(small, data):
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 2200))
        content[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.none() | st.integers(0, len(content)))
    path = small.with_name("damaged.gguf")
    path.write_bytes(content[:end])
    try:
        source = stream(path)
        assert sum(source.sizes.values()) <= len(content)
        for _ in source:
            pass
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_a_string_of_a_megabyte_is_not_repeated(tmp_path):
    path = tmp_path / "long.gguf"
    content = value("general.architecture", 8, string("x" * (1 << 20)))
    path.write_bytes(padded(b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + content))
    with pytest.raises(ValueError) as error:
        stream(path)
    assert len(str(error.value)) < 400


# --- what llama.cpp does not compute is not written -----------------------------------------------------------------

YARN = dict(rope_type="yarn", factor=4.0)
REFUSED = [
    (tiny_config(activation_function="gelu"), "activation_function 'gelu' in a gpt2 model"),
    (llama(hidden_act="gelu"), "hidden_act 'gelu' in a llama model"),
    (llama(rope=RotarySettings(partial_rotary_factor=0.5)), "partial_rotary_factor 0.5"),
    (llama(rope=RotarySettings(**YARN, mscale=0.8, mscale_all_dim=0.4)), "yarn with mscale"),
    (llama(rope=RotarySettings(**YARN, beta_slow=0.5)), "beta_slow"),
    (llama("qwen3", attention_bias=True), "attention_bias in a qwen3 model"),
    (llama("smollm3", mlp_bias=True, no_rope_blocks=(3,)), "mlp_bias in a smollm3 model"),
    (llama("smollm3", no_rope_blocks=(1,)), "left out of other blocks than every fourth"),
]


@pytest.mark.parametrize("config, complaint", REFUSED, ids=lambda part: part if isinstance(part, str) else "")
def test_what_llama_cpp_does_not_compute_is_not_written(tmp_path, config, complaint):
    random_model(config, tmp_path)
    with pytest.raises(ValueError, match=f"llama.cpp does not compute .*{complaint}"):
        convert(tmp_path, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_window_cuts_the_context_and_that_is_said(tmp_path):
    random_model(llama("mistral", sliding_window=24), tmp_path)
    with pytest.warns(UserWarning, match="the file has a context of 24 instead of 64"):
        convert(tmp_path, tmp_path / "model.gguf", "gguf")
    assert stream(tmp_path / "model.gguf").config.context == 24


def test_every_field_of_a_configuration_has_a_place_in_a_file_or_a_reason():
    """A field that is added to `LlamaConfig` has to be thought of here too: written, refused or without effect."""
    written = {*gguf_names.LLAMA.values(), *gguf_names.GRANITE.values()} - {"rope_theta"}
    otherwise = {"model_type", "vocab_size", "tie_word_embeddings", "rope", "bos_token_id", "eos_token_id"}
    refused = {"hidden_act", "attention_bias", "mlp_bias", "no_rope_blocks", "sliding_window", "window_blocks"}
    no_effect = {"initializer_range", "attention_dropout"}
    assert {field.name for field in dataclasses.fields(LlamaConfig)} == written | otherwise | refused | no_effect
