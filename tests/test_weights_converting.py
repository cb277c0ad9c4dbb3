"""`llmfast convert`: what is written, from what, and what is refused."""

import json

import gguf
import numpy as np
import pytest
import torch
from test_cli import run
from test_weights_gguf_checkpoint import random_model
from test_weights_gguf_llama_cpp import llama

import llmfast
from llmfast.models import from_pretrained
from llmfast.tokenizers import BPETokenizer, CharTokenizer
from llmfast.weights import gguf_writing
from llmfast.weights.checkpoint import stream
from llmfast.weights.converting import convert
from llmfast.weights.gguf import GGUFFile
from llmfast.weights.quantizing import quantize_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_with_its_tokenizer_becomes_a_file_and_a_directory_again(storyteller, storyteller_directory, tmp_path):
    file = tmp_path / "new" / "model.gguf"
    result = run("convert", str(storyteller_directory), "--to", "gguf", "-o", str(file))
    assert result.code == 0 and result.stdout == f"{file}, {file.stat().st_size:,} bytes\n", result.stderr
    said = GGUFFile(file).metadata
    assert said["general.name"] == storyteller_directory.name and said["tokenizer.ggml.pre"] == "gpt-2"
    assert (
        said["tokenizer.ggml.eos_token_id"] == said["tokenizer.ggml.bos_token_id"] == storyteller.tokenizer.end_of_text
    )
    expected = storyteller.generate("The cat", temperature=0, max_new_tokens=20)
    assert llmfast.load(file, precision="fp32").generate("The cat", temperature=0, max_new_tokens=20) == expected

    assert run("convert", str(file), "--to", "safetensors", "-o", str(tmp_path / "back")).code == 0
    again = llmfast.load(tmp_path / "back", precision="fp32")
    assert again.generate("The cat", temperature=0, max_new_tokens=20) == expected
    state = storyteller.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_a_file_made_of_a_file_keeps_its_vocabulary_and_names(storyteller_directory, tmp_path):
    convert(storyteller_directory, tmp_path / "one.gguf", "gguf")
    convert(tmp_path / "one.gguf", tmp_path / "two.gguf", "gguf", "q8_0")
    one, two = GGUFFile(tmp_path / "one.gguf").metadata, GGUFFile(tmp_path / "two.gguf").metadata
    assert one.keys() | {"general.quantization_version"} == two.keys()
    for key in one.keys() - {"general.file_type"}:
        assert (list(one[key]) if hasattr(one[key], "tolist") else one[key]) == (
            list(two[key]) if hasattr(two[key], "tolist") else two[key]
        ), key


@pytest.mark.parametrize(
    "kind, blocks, ends, file_type",
    [
        ("f32", "F32", "F32", 0),
        ("bf16", "BF16", "BF16", 32),
        ("q8_0", "Q8_0", "Q8_0", 7),
        ("q4_0", "Q4_0", "Q8_0", 2),
        ("q4_1", "Q4_1", "Q8_0", 3),
    ],
)
def test_the_types_of_a_file(tmp_path, kind, blocks, ends, file_type):
    model = random_model(llama(intermediate_size=40, num_hidden_layers=1), tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "gguf", kind)
    file = GGUFFile(tmp_path / "model.gguf")
    types = {name: tensor.type for name, tensor in file.tensors.items()}
    assert types["token_embd.weight"] == types["output.weight"] == ends
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_up.weight"] == blocks
    assert types["output_norm.weight"] == "F32"
    assert types["blk.0.ffn_down.weight"] == ("BF16" if kind == "bf16" else "F32")  # rows of 40 are no whole blocks
    assert file.metadata["general.file_type"] == file_type
    again = from_pretrained(tmp_path / "model.gguf").state_dict()
    for name, tensor in model.state_dict().items():
        worst = {"f32": 0, "bf16": 2**-8, "q8_0": 0.01, "q4_0": 0.15, "q4_1": 0.12}[kind] * float(tensor.abs().max())
        assert float((again[name] - tensor).abs().max()) <= worst, name


@pytest.mark.parametrize("kind, size, head", [("q8_0", 34, 2), ("q4_0", 18, 2), ("q4_1", 20, 4)])
def test_blocks_of_the_same_type_are_copied(tmp_path, kind, size, head):
    """Integers that do not reach as far as they could, which rounding again would stretch."""
    random_model(llama(intermediate_size=64, num_hidden_layers=1), tmp_path)
    convert(tmp_path, tmp_path / "one.gguf", "gguf", kind)
    tensor = GGUFFile(tmp_path / "one.gguf").tensors["blk.0.attn_q.weight"]
    assert tensor.type == kind.upper()
    file = np.memmap(tmp_path / "one.gguf", mode="r+")
    integers = file[tensor.start : tensor.start + tensor.nbytes].reshape(-1, size)[:, head:]
    integers[:] = integers & 0x33 | 0x44
    file.flush()
    convert(tmp_path / "one.gguf", tmp_path / "two.gguf", "gguf", kind)
    one, two = GGUFFile(tmp_path / "one.gguf").tensors, GGUFFile(tmp_path / "two.gguf").tensors
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].read(), two[name].read()) for name in one)


def test_by_default_no_number_changes(tmp_path):
    random_model(llama(), tmp_path / "f32")
    convert(tmp_path / "f32", tmp_path / "f32.gguf", "gguf")
    from_pretrained(tmp_path / "f32", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "bf16.gguf", "gguf")
    convert(tmp_path / "bf16.gguf", tmp_path / "again", "safetensors")
    assert stream(tmp_path / "bf16.gguf").precision_of("model.embed_tokens.weight") == "bfloat16"
    for first, second in (("f32", "f32.gguf"), ("bf16", "bf16.gguf"), ("bf16", "again")):
        state = from_pretrained(tmp_path / first).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in from_pretrained(tmp_path / second).state_dict().items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_quantised_model_is_written_as_the_floats_that_it_stands_for(tmp_path):
    random_model(llama(), tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "small", "int4")
    convert(tmp_path / "small", tmp_path / "small.gguf", "gguf")
    state = from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(t, state[n]) for n, t in from_pretrained(tmp_path / "small.gguf").state_dict().items())


def test_a_gguf_file_of_floats_is_quantised_with_its_tokenizer(storyteller_directory, tmp_path):
    convert(storyteller_directory, tmp_path / "model.gguf", "gguf")
    quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "small", "int8")
    quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "small", "int8", overwrite=True)
    assert llmfast.load(tmp_path / "small").generate("The cat", temperature=0, max_new_tokens=4).startswith("The cat")
    assert json.loads(run("info", str(tmp_path / "model.gguf"), "--json").stdout)["parameters"] > 0


@pytest.mark.parametrize("kind", ["char", None])
def test_a_tokenizer_that_llama_cpp_does_not_have_is_left_out_and_that_is_said(tmp_path, kind):
    tokenizer = CharTokenizer.train(["abc"])
    random_model(llama(vocab_size=tokenizer.vocab_size), tmp_path)
    if kind is not None:
        tokenizer.save(tmp_path)
    result = run("convert", str(tmp_path), "--to", "gguf", "-o", str(tmp_path / "model.gguf"))
    assert result.code == 0 and "llama.cpp" in result.stderr and "on token ids only" in result.stderr
    assert GGUFFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.model"] == "no_vocab"
    assert llmfast.load(tmp_path / "model.gguf").tokenizer is None


def test_rows_without_a_token_get_names_that_no_text_has(tmp_path):
    tokenizer = BPETokenizer.train(["the cat sat on the mat"], 262, special_tokens=["<|user|>"])
    random_model(llama(vocab_size=tokenizer.vocab_size + 3), tmp_path)
    tokenizer.save(tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "gguf")
    said = GGUFFile(tmp_path / "model.gguf").metadata
    tokens, types = said["tokenizer.ggml.tokens"].tolist(), said["tokenizer.ggml.token_type"].tolist()
    n = tokenizer.vocab_size
    assert tokens[n:] == [f"[unused {i}]" for i in range(n, n + 3)] and types[n:] == [5, 5, 5]
    assert {tokens[i] for i, kind in enumerate(types) if kind == 3} == {"<|endoftext|>", "<|user|>"}
    again = llmfast.load(tmp_path / "model.gguf").tokenizer
    assert again.encode("the cat <|user|> naïve ☃") == tokenizer.encode("the cat <|user|> naïve ☃")
    assert again.encode("<|user|>", allow_special=True) == tokenizer.encode("<|user|>", allow_special=True)


def test_what_can_not_be_converted_says_why_and_changes_nothing(storyteller_directory, tmp_path):
    target = tmp_path / "model.gguf"
    target.write_bytes(b"mine")
    (tmp_path / "there").mkdir()
    for arguments, complaint in [
        (("gguf", "-o", str(target)), "is there already: name another file, or pass --overwrite"),
        (("gguf", "-o", str(tmp_path / "there")), "is a directory: name a file, such as"),
        (("gguf", "-o", str(storyteller_directory)), "is the model to convert: name another place"),
        (("safetensors", "-o", str(target)), "is a file: name a directory for the model"),
        (("safetensors", "-o", str(tmp_path / "new"), "--type", "q8_0"), "written as f32 or bf16, not q8_0"),
        (("safetensors", "-o", str(storyteller_directory)), "is the model to convert"),
    ]:
        result = run("convert", str(storyteller_directory), "--to", *arguments)
        assert result.code == 2 and complaint in result.stderr and result.stderr.count("\n") == 1, arguments
    assert target.read_bytes() == b"mine" and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="a model is converted to gguf or safetensors, not to 'onnx'"):
        convert(storyteller_directory, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="type must be f32, bf16, q8_0, q4_0, q4_1, got 'q6_k'"):
        convert(storyteller_directory, tmp_path / "x", "gguf", "q6_k")
    assert run("convert", str(storyteller_directory), "--to", "gguf", "-o", str(target), "--overwrite").code == 0


def test_a_crash_leaves_the_old_file(storyteller_directory, tmp_path, monkeypatch):
    target = tmp_path / "model.gguf"
    convert(storyteller_directory, target, "gguf")
    before = target.read_bytes()
    monkeypatch.setattr(gguf_writing, "_in_blocks", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert(storyteller_directory, target, "gguf", "bf16", overwrite=True)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_the_package_reads_what_is_written(tmp_path):
    random_model(llama(), tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    expected = {name: tensor.nbytes for name, tensor in GGUFFile(tmp_path / "model.gguf").tensors.items()}
    assert {tensor.name: tensor.n_bytes for tensor in reader.tensors} == expected
    assert reader.fields["llama.rope.freq_base"].contents() == 10000.0
