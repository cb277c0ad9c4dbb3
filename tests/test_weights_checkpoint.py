"""Checkpoints: Hugging Face's files in and out, with transformers as the judge, and every kind of damage named."""

import contextlib
import ctypes
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import assert_same_greedy, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import llmfast
from llmfast import GPT
from llmfast.quantization.formats import QuantizedWeight, quantize
from llmfast.quantization.plan import PRECISIONS, plan
from llmfast.weights import checkpoint
from llmfast.weights.config_file import record_quality
from llmfast.weights.quantizing import quantize_checkpoint
from llmfast.weights.saving import save

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

pytestmark = pytest.mark.usefixtures("one_thread")


def hugging_face_model(seed: int = 0, **changes):
    """A randomly initialised transformers GPT-2 whose biases and norms are not at their trivial start either."""
    shape = {"vocab_size": 19, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**shape | {"bos_token_id": 0, "eos_token_id": 0} | changes)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def assert_same_logits(actual: torch.Tensor, theirs, ids: torch.Tensor) -> None:
    """To float32 rounding, judged against transformers in float64."""
    with torch.inference_mode():
        expected = theirs.double()(ids).logits
        theirs.float()
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.fixture
def saved(tmp_path):
    """A small model of ours, saved, with its directory."""
    torch.manual_seed(0)
    model = GPT(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def same_weights(first: GPT, second: GPT) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())


def edit_config(directory, **changes) -> None:
    document = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def edit_weights(directory, change) -> None:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")


# --- with transformers ------------------------------------------------------------------------------------------


SHAPES = [
    {},
    {"n_embd": 15, "n_head": 5, "n_inner": 17, "vocab_size": 23, "n_layer": 1},
    {"activation_function": "gelu", "tie_word_embeddings": False},
    {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-2},
    {"n_embd": 64, "n_head": 1, "n_inner": 33, "tie_word_embeddings": False, "n_positions": 9},
    {"n_embd": 7, "n_head": 7, "n_layer": 3, "vocab_size": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_model_of_transformers_loads_and_computes_the_same(shape, place, tmp_path):
    backend, device = place
    theirs = hugging_face_model(**shape)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(theirs.config.vocab_size, (2, 9))
    with llmfast.use_backend(backend), torch.inference_mode():
        logits = GPT.from_pretrained(tmp_path).to(device)(ids.to(device))
    assert_same_logits(logits, theirs, ids)


@settings(max_examples=12)
@given(
    head=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    n_inner=st.none() | st.integers(1, 40),
    n_layer=st.integers(1, 3),
    activation=st.sampled_from(["gelu", "gelu_new"]),
    tied=st.booleans(),
    tokens=st.integers(1, 16),
)
def test_there_and_back(tmp_path_factory, head, n_inner, n_layer, activation, tied, tokens):
    """transformers -> llmfast -> transformers: no name is missing or unexpected, and the weights are the same bits."""
    directory = tmp_path_factory.mktemp("there")
    theirs = hugging_face_model(
        n_embd=head[0] * head[1],
        n_head=head[0],
        n_inner=n_inner,
        n_layer=n_layer,
        activation_function=activation,
        tie_word_embeddings=tied,
    )
    theirs.save_pretrained(directory)
    ours = GPT.from_pretrained(directory)
    ours.save_pretrained(directory / "back")
    again, report = transformers.GPT2LMHeadModel.from_pretrained(directory / "back", output_loading_info=True)
    assert not any(report.values()), report
    original = theirs.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.state_dict().items())
    ids = torch.randint(19, (1, tokens))
    with torch.inference_mode():
        assert_same_logits(ours(ids), again.eval(), ids)


def test_a_saved_file_looks_like_transformers_own(saved, tmp_path):
    """The same names, shapes and dtypes in the file, and the same settings in config.json."""
    model, directory = saved
    again = transformers.GPT2LMHeadModel.from_pretrained(directory)
    again.save_pretrained(tmp_path / "theirs")

    def described(path):
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}

    assert described(directory) == described(tmp_path / "theirs")
    ours = json.loads((directory / "config.json").read_text())
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {k: v for k, v in ours.items() if v is not None}.items() <= theirs.items()
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_bfloat16_is_saved_and_read_as_such(saved, tmp_path):
    model, _ = saved
    half = GPT(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path / "half")
    tensors = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    again, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "half", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()) and again.dtype == torch.bfloat16
    assert same_weights(half, GPT.from_pretrained(tmp_path / "half", dtype=torch.bfloat16))
    wide = GPT.from_pretrained(tmp_path / "half")
    assert wide.dtype == torch.float32
    assert all(torch.equal(t.float(), wide.state_dict()[name]) for name, t in half.state_dict().items())


def test_greedy_text_is_that_of_transformers(storyteller, storyteller_directory, fast_place):
    backend, device = fast_place
    theirs = transformers.GPT2LMHeadModel.from_pretrained(storyteller_directory).eval()
    theirs.generation_config.eos_token_id = None  # ids run to max_new_tokens
    llm = llmfast.load(storyteller_directory, backend=backend, device=device, precision="fp32")
    for text in ("Once upon a time", "The dog", "She saw", "x"):
        ids = torch.tensor([storyteller.tokenizer.encode(text)])
        expected = theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist()
        actual = llm.generate(ids, max_new_tokens=40, temperature=0)[0].tolist()
        assert_same_greedy(expected, actual, storyteller.model, ids.shape[1], f"{text!r} with {backend}")


def test_settings_of_config_json_arrive(tmp_path):
    theirs = hugging_face_model(layer_norm_epsilon=1e-3, embd_pdrop=0.3, resid_pdrop=0.2, attn_pdrop=0.05, n_inner=20)
    theirs.save_pretrained(tmp_path)
    config = GPT.from_pretrained(tmp_path).config
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.3, 0.2, 0.05)
    assert config.layer_norm_epsilon == 1e-3
    assert (config.n_inner, config.bos_token_id, config.eos_token_id, config.n_positions) == (20, 0, 0, 16)


# --- the shapes a checkpoint comes in ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "no-buffers"])
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_old_names_and_masks_are_read(saved, tmp_path, kind, prefix, buffers):
    model, directory = saved
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    if buffers:
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(16, 16, dtype=torch.uint8).tril()[None, None]
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if not prefix:
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(directory / "config.json", old)
    (torch.save if kind.endswith("bin") else safetensors.torch.save_file)(tensors, old / kind)
    assert same_weights(model, GPT.from_pretrained(old))


def test_a_tied_head_that_is_stored_too_is_accepted_and_a_different_one_refused(saved):
    model, directory = saved
    embedding = model.transformer.wte.weight.detach()
    edit_weights(directory, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    again = GPT.from_pretrained(directory)
    assert again.lm_head.weight is again.transformer.wte.weight
    edit_weights(directory, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        GPT.from_pretrained(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_a_single_file_takes_the_config_beside_it(saved, name):
    model, directory = saved
    if name.endswith("bin"):
        torch.save(safetensors.torch.load_file(directory / "model.safetensors"), directory / name)
    assert same_weights(model, GPT.from_pretrained(directory / name))
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        GPT.from_pretrained(directory / name)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_sharded_checkpoint_is_read_by_its_index(saved, kind):
    model, directory = saved
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, stem, suffix = sorted(tensors), *kind.split(".")
    shards = {f"{stem}-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save = torch.save if suffix == "bin" else safetensors.torch.save_file
        save({name: tensors[name] for name in part}, directory / file)
    index = directory / f"{kind}.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    assert same_weights(model, GPT.from_pretrained(directory))

    gone = sorted(shards)[1]
    (directory / gone).unlink()
    with pytest.raises(FileNotFoundError, match=gone):
        GPT.from_pretrained(directory)
    for damaged in ("{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["b"]}}', "{}"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match="index.json is not a valid index"):
            GPT.from_pretrained(directory)


def test_what_transformers_shards_is_read(tmp_path):
    theirs = hugging_face_model(n_embd=48, n_layer=3)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    ids = torch.randint(19, (1, 9))
    with torch.inference_mode():
        assert_same_logits(GPT.from_pretrained(tmp_path)(ids), theirs, ids)


def test_a_loaded_model_is_ready_to_run_and_to_train(saved):
    _, directory = saved
    model = GPT.from_pretrained(directory)
    assert not model.training
    model.train().loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # writable, and the file is not touched
    assert not same_weights(model, GPT.from_pretrained(directory))


# --- saving -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_travels_along(storyteller, storyteller_directory, tmp_path):
    model = GPT.from_pretrained(storyteller_directory)
    model.save_pretrained(tmp_path / "copy")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (storyteller_directory / name).read_bytes()
    copy = llmfast.load(tmp_path / "copy", precision="fp32", device="cpu")
    assert copy.generate("The dog", temperature=0) == storyteller.generate("The dog", temperature=0)


def test_a_single_files_tokenizer_travels_along_too(storyteller_directory, tmp_path):
    GPT.from_pretrained(storyteller_directory / "model.safetensors").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "merges.txt").exists()


def test_a_model_without_a_tokenizer_writes_only_itself(saved):
    _, directory = saved
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_over_the_directory_it_came_from(saved):
    _, directory = saved
    model = GPT.from_pretrained(directory)
    with torch.no_grad():
        model.transformer.wpe.weight.add_(1.0)
    model.save_pretrained(directory)
    assert same_weights(model, GPT.from_pretrained(directory))


def test_metadata_stands_in_the_file(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "noted", steps=5, data="stories")
    with safetensors.safe_open(tmp_path / "noted" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "steps": "5", "data": "stories"}


def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch):
    model, directory = saved
    before = {p.name: p.read_bytes() for p in directory.iterdir()}

    def full(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr("llmfast.weights.files.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        GPT(tiny_config(n_layer=1)).save_pretrained(directory)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(directory.parent / "new")
    assert list((directory.parent / "new").iterdir()) == []


# --- what does not fit ------------------------------------------------------------------------------------------


def test_missing_surplus_and_wrongly_shaped_tensors_are_named_in_one_error(saved):
    _, directory = saved

    def spoil(tensors):
        del tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.7.surprise"] = torch.zeros(3)
        tensors["transformer.wpe.weight"] = torch.zeros(16, 13)
        tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(48, 12)  # the wrong way round

    edit_weights(directory, spoil)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(directory)
    message = str(error.value)
    assert "missing transformer.h.1.ln_2.bias" in message
    assert "surplus transformer.h.7.surprise" in message
    assert "transformer.wpe.weight is (16, 13), not (16, 12)" in message
    assert "transformer.h.0.mlp.c_fc.weight" in message
    assert str(directory) in message and "\n" not in message


def test_many_wrong_tensors_are_counted_not_listed(saved):
    _, directory = saved
    edit_config(directory, n_layer=4)
    with pytest.raises(ValueError, match="missing .* and 20 more") as error:
        GPT.from_pretrained(directory)
    assert len(str(error.value)) < 600


def test_a_config_of_another_width_does_not_fit(saved):
    _, directory = saved
    edit_config(directory, n_embd=24)
    with pytest.raises(ValueError, match="wrongly shaped: transformer.wte.weight"):
        GPT.from_pretrained(directory)


def test_an_untied_head_that_is_missing_is_named(saved):
    _, directory = saved
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        GPT.from_pretrained(directory)


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_a_value_error_naming_it(tmp_path_factory, kind, data):
    directory = tmp_path_factory.mktemp("damaged")
    model = GPT(tiny_config(n_layer=1, n_embd=4, n_head=1, vocab_size=3, n_positions=2))
    model.save_pretrained(directory)
    if kind.endswith("bin"):
        torch.save(safetensors.torch.load_file(directory / "model.safetensors"), directory / kind)
        (directory / "model.safetensors").unlink()
    whole = (directory / kind).read_bytes()
    keep = data.draw(st.integers(0, len(whole) - 1))
    (directory / kind).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=kind) as error:
        GPT.from_pretrained(directory)
    assert "\n" not in str(error.value)


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_headers_never_raise_anything_but_value_error(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("flipped")
    GPT(tiny_config(n_layer=1, n_embd=4, n_head=1, vocab_size=3, n_positions=2)).save_pretrained(directory)
    content = bytearray((directory / "model.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + header - 1))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(content)
    try:
        GPT.from_pretrained(directory)  # a flip may hit a blank, or the metadata
    except ValueError as error:
        assert str(directory) in str(error)


@pytest.mark.parametrize("content", [[1, 2], {"weights": "none"}, {"a": {"b": torch.ones(1)}}])
def test_a_bin_file_that_holds_something_else_is_refused(saved, content):
    _, directory = saved
    torch.save(content, directory / "other.bin")
    with pytest.raises(ValueError, match="other.bin should hold a dictionary of tensors"):
        GPT.from_pretrained(directory / "other.bin")


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_bin_file_can_not_run_code(saved, capsys):
    _, directory = saved
    torch.save({"a": Payload()}, directory / "evil.bin")
    with pytest.raises(ValueError, match="evil.bin"):
        GPT.from_pretrained(directory / "evil.bin")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"gpt2"', b"\xff\xfe\x00"], ids=repr)
def test_a_config_that_is_not_a_json_object_is_named(saved, text):
    _, directory = saved
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        GPT.from_pretrained(directory)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"n_head": 5}, "n_head must divide n_embd"),
        ({"n_embd": "12"}, "n_embd must be a positive integer"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon"),
        ({"resid_pdrop": 2}, "resid_pdrop"),
        ({"model_type": "mamba"}, "'mamba' model; the families that run are gpt2, llama"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_a_config_that_can_not_be_computed_names_the_setting_and_the_file(saved, changes, complaint):
    _, directory = saved
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=complaint) as error:
        GPT.from_pretrained(directory)
    assert str(directory / "config.json") in str(error.value)


def test_an_old_config_with_n_ctx_and_no_model_type_is_read(saved):
    model, directory = saved
    edit_config(directory, model_type=None, n_positions=None, n_ctx=16)
    assert GPT.from_pretrained(directory).config.n_positions == 16


def test_what_is_not_there_is_a_file_not_found_error(saved, tmp_path):
    _, directory = saved
    with pytest.raises(FileNotFoundError, match="no model at"):
        checkpoint.load(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*model.safetensors or pytorch_model.bin"):
        GPT.from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        GPT.from_pretrained(directory)


# --- a tensor at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_stream_gives_what_load_gives_the_largest_first_and_the_tied_head_once(saved, kind):
    model, directory = saved
    if kind.endswith("bin"):
        torch.save(safetensors.torch.load_file(directory / "model.safetensors"), directory / kind)
        (directory / "model.safetensors").unlink()
    source = checkpoint.stream(directory)
    assert (source.config, source.precision, source.directory) == (model.config, None, directory)
    state = model.state_dict()
    streamed = dict(source)
    assert streamed.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in streamed.items())
    sizes = [tensor.nbytes for tensor in streamed.values()]
    assert sizes == sorted(sizes, reverse=True) == list(source.sizes.values())
    assert {source.precision_of(name) for name in streamed} == {"float32"}
    assert dict(source).keys() == streamed.keys()  # and again


def test_an_untied_head_is_streamed_as_well(tmp_path):
    model = GPT(tiny_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(dict(checkpoint.stream(tmp_path))["lm_head.weight"], model.lm_head.weight)


def test_a_stream_of_shards(tmp_path):
    theirs = hugging_face_model(n_embd=48, n_layer=3)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    _, whole = checkpoint.load(tmp_path)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in checkpoint.stream(tmp_path))


def test_a_stream_complains_before_it_reads(saved, monkeypatch):
    _, directory = saved
    edit_weights(directory, lambda tensors: tensors.pop("transformer.wpe.weight"))
    monkeypatch.setattr(checkpoint.Stored, "read", lambda *_: pytest.fail("it read a tensor"))
    with pytest.raises(ValueError, match="missing transformer.wpe.weight"):
        checkpoint.stream(directory)


def test_a_file_that_is_gone_in_the_middle_of_a_stream_is_a_value_error(saved):
    _, directory = saved
    source = iter(checkpoint.stream(directory))
    next(source)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        next(source)


def resident_bytes(files: Path) -> int:
    """The memory in use and the pages of files in a folder; not code, which the system drops and reads again."""
    with contextlib.suppress(AttributeError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back now, not in the midst of what is measured
    resident = 0
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        kind = "Rss" if str(files) in mapping.partition("\n")[0] else "Anonymous"
        resident += 1024 * int(re.search(rf"^{kind}:\s+(\d+) kB", mapping, re.MULTILINE)[1])
    return resident


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("precision, stored_head", [(None, False), (None, True), ("int8", False)])
def test_a_stream_holds_one_tensor_in_memory(tmp_path, precision, stored_head):
    config = tiny_config(vocab_size=20_000, n_embd=256, n_head=2, n_layer=10)
    state = {parameter.name: torch.ones(parameter.shape) for parameter in config.parameters()}
    if precision is not None:
        state |= {name: quantize(state[name], stored) for name, stored in plan(config, precision).items()}
    save(tmp_path, config, state, precision=precision)
    del state
    if stored_head:
        edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    source = checkpoint.stream(tmp_path)
    before, most = resident_bytes(tmp_path), 0
    for _, weight in source:
        parts = [weight.values, weight.scale] if isinstance(weight, QuantizedWeight) else [weight]
        for part in parts:
            part.max()  # touches every page
        most = max(most, resident_bytes(tmp_path) - before)
        del weight, parts, part
    left = resident_bytes(tmp_path) - before
    largest, total, slack = max(source.sizes.values()), sum(source.sizes.values()), 3_000_000
    assert most < largest + slack < total, f"{most:,} of {total:,} bytes in memory, the largest {largest:,}"
    assert left < slack


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_integers_where_floats_belong_are_refused(saved, kind):
    """As in a quantised file whose config.json lost its note."""
    _, directory = saved
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.int8)
    (torch.save if kind.endswith("bin") else safetensors.torch.save_file)(tensors, directory / kind)
    with pytest.raises(ValueError, match="of the wrong type: transformer.wte.weight is int8, not float64 or float32"):
        GPT.from_pretrained(directory / kind)


def test_a_tensor_under_both_of_its_names_is_refused(saved):
    _, directory = saved
    edit_weights(directory, lambda tensors: tensors.update({"wpe.weight": tensors["transformer.wpe.weight"] + 1}))
    with pytest.raises(ValueError, match="stored twice: transformer.wpe.weight"):
        GPT.from_pretrained(directory)


# --- quantised --------------------------------------------------------------------------------------------------


QUANTISED_SHAPES = [
    {},
    {"n_embd": 15, "n_head": 5, "n_inner": 33},
    {"tie_word_embeddings": False, "n_embd": 64, "n_head": 4},
]


@pytest.mark.parametrize("shape", QUANTISED_SHAPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_model_is_read_as_it_was_written(saved, tmp_path, precision, shape):
    torch.manual_seed(0)
    model = GPT(tiny_config(**shape)).eval()
    model.save_pretrained(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "small", precision)
    source = checkpoint.stream(tmp_path / "small")
    assert source.config == model.config
    assert source.precision == source.quantization.precision == precision
    assert source.quantization.weights == plan(model.config, precision)
    state, streamed = model.state_dict(), dict(source)
    assert streamed.keys() == {name for name, _ in model.named_parameters()}
    for name, weight in streamed.items():
        if name in plan(model.config, precision):
            expected = quantize(state[name], plan(model.config, precision)[name])
            assert (weight.precision, weight.shape) == (expected.precision, expected.shape)
            assert torch.equal(weight.values, expected.values) and torch.equal(weight.scale, expected.scale)
            assert source.precision_of(name) == expected.precision
            state[name].copy_(expected.dequantize())
        else:
            assert torch.equal(weight, state[name])
            assert source.precision_of(name) == "float32"
        assert source.sizes[name] == weight.nbytes
    assert same_weights(model, GPT.from_pretrained(tmp_path / "small"))  # which holds the rounded weights by now


@pytest.fixture
def small(saved):
    """The small model quantised by the mixed plan, the directory of it."""
    _, directory = saved
    quantize_checkpoint(directory, directory.parent / "small", "int4")
    return directory.parent / "small"


def test_the_layout_of_a_quantised_file(small):
    """Integers and scales lie the model's way round, not transposed; the rest is as in any other checkpoint."""
    tensors = safetensors.torch.load_file(small / "model.safetensors")
    described = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if ".h.1." not in name}
    assert described["transformer.wte.weight"] == ((19, 12), torch.int8)
    assert described["transformer.wte.weight_scale"] == ((19,), torch.float32)
    assert described["transformer.h.0.attn.c_attn.weight"] == ((36, 16), torch.uint8)
    assert described["transformer.h.0.attn.c_attn.weight_scale"] == ((36, 1), torch.bfloat16)
    assert described["transformer.h.0.mlp.c_proj.weight"] == ((12, 32), torch.uint8)
    assert described["transformer.h.0.mlp.c_proj.weight_scale"] == ((12, 2), torch.bfloat16)
    assert described["transformer.wpe.weight"] == ((16, 12), torch.float32)
    assert described["transformer.h.0.attn.c_attn.bias"] == ((36,), torch.float32)
    document = json.loads((small / "config.json").read_text())
    assert document["dtype"] == "float32"
    note = document["llmfast_quantization"]
    assert note.keys() == {"precision", "group_size", "weights"}
    assert (note["precision"], note["group_size"]) == ("int4", 32)
    assert note["weights"]["transformer.wte.weight"] == "int8"
    assert note["weights"]["transformer.h.1.mlp.c_fc.weight"] == "int4"


def test_transformers_reads_the_config_but_not_the_weights_of_a_quantised_model(small, capfd):
    config = transformers.GPT2Config.from_pretrained(small)
    assert (config.n_embd, config.n_layer, config.vocab_size) == (12, 2, 19)
    with pytest.raises(RuntimeError, match="size|shape"):
        transformers.GPT2LMHeadModel.from_pretrained(small)


def test_a_dequantised_model_is_saved_as_an_ordinary_one(small, tmp_path):
    model = GPT.from_pretrained(small)
    model.save_pretrained(tmp_path / "again")
    assert checkpoint.stream(tmp_path / "again").quantization is None
    again, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    assert same_weights(model, GPT.from_pretrained(tmp_path / "again"))


def test_what_is_not_quantised_keeps_its_dtype(saved, tmp_path):
    model, _ = saved
    half = GPT(model.config).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    quantize_checkpoint(tmp_path / "half", tmp_path / "small", "int8")
    weights = dict(checkpoint.stream(tmp_path / "small"))
    assert weights["transformer.wpe.weight"].dtype == weights["transformer.ln_f.bias"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    assert GPT.from_pretrained(tmp_path / "small").dtype == torch.float32
    assert GPT.from_pretrained(tmp_path / "small", dtype=torch.bfloat16).dtype == torch.bfloat16


def quantised_note(change):
    """Changes what config.json says of the quantisation."""

    def spoil(directory):
        document = json.loads((directory / "config.json").read_text())
        change(document["llmfast_quantization"])
        (directory / "config.json").write_text(json.dumps(document))

    return spoil


def quantised_tensors(change):
    return lambda directory: edit_weights(directory, change)


WTE, C_FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"
DAMAGE = {
    "no scale": (quantised_tensors(lambda t: t.pop(f"{WTE}_scale")), f"missing {WTE}_scale"),
    "no values": (quantised_tensors(lambda t: t.pop(WTE)), f"missing {WTE}"),
    "values of another dtype": (
        quantised_tensors(lambda t: t.update({WTE: t[WTE].to(torch.uint8)})),
        f"of the wrong type: {WTE} is uint8, not int8",
    ),
    "floats for values": (
        quantised_tensors(lambda t: t.update({WTE: t[WTE].float()})),
        f"of the wrong type: {WTE} is float32, not int8",
    ),
    "scale of another dtype": (
        quantised_tensors(lambda t: t.update({f"{C_FC}_scale": t[f"{C_FC}_scale"].float()})),
        f"of the wrong type: {C_FC}_scale is float32, not bfloat16",
    ),
    "values the wrong way round": (
        quantised_tensors(lambda t: t.update({C_FC: t[C_FC].t().contiguous()})),
        rf"wrongly shaped: {C_FC} is \(16, 48\), not \(48, 16\)",
    ),
    "scale of another shape": (
        quantised_tensors(lambda t: t.update({f"{WTE}_scale": t[f"{WTE}_scale"][:-1]})),
        rf"wrongly shaped: {WTE}_scale is \(18,\), not \(19,\)",
    ),
    "a scale of a float": (
        quantised_tensors(lambda t: t.update({"transformer.wpe.weight_scale": torch.ones(16)})),
        "surplus transformer.wpe.weight_scale",
    ),
    "NaN for a scale": (quantised_tensors(lambda t: t[f"{WTE}_scale"].fill_(float("nan"))), f"{WTE}: .*NaN"),
    "an infinite scale": (quantised_tensors(lambda t: t[f"{C_FC}_scale"].fill_(float("inf"))), f"{C_FC}: .*NaN"),
    "-128": (quantised_tensors(lambda t: t[WTE].fill_(-128)), f"{WTE}: the values hold -128"),
    "no note": (lambda d: edit_config(d, llmfast_quantization=None), rf"surplus .*{WTE} is int8, not float64"),
    "not an object": (lambda d: edit_config(d, llmfast_quantization=5), "llmfast_quantization is not understood: .* 5"),
    "unknown precision": (quantised_note(lambda n: n.update(precision="int2")), "config.json: .*not 'int2'"),
    "unknown format": (quantised_note(lambda n: n["weights"].update({WTE: "fp8"})), f"stores {WTE} as 'fp8'"),
    "another format": (quantised_note(lambda n: n["weights"].update({WTE: "int4"})), f"{WTE} is int8, not uint8"),
    "another group size": (quantised_note(lambda n: n.update(group_size=64)), "group_size must be 32, not 64"),
    "a weight left out": (quantised_note(lambda n: n["weights"].pop(C_FC)), f"surplus {C_FC}_scale"),
    "a weight that is not there": (
        quantised_note(lambda n: n["weights"].update({"transformer.h.9.mlp.c_fc.weight": "int8"})),
        "names transformer.h.9.mlp.c_fc.weight, which is not a matrix of this model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_quantised_model_is_one_clear_error(small, damage):
    spoil, complaint = DAMAGE[damage]
    spoil(small)
    with pytest.raises(ValueError, match=complaint) as error:
        GPT.from_pretrained(small)
    assert str(small) in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_headers_of_quantised_files_never_raise_anything_but_value_error(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("flipped")
    GPT(tiny_config(n_layer=1, n_embd=4, n_head=1, vocab_size=3)).save_pretrained(directory / "whole")
    quantize_checkpoint(directory / "whole", directory / "small", "int4")
    file = directory / "small" / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(ValueError):  # a flip may hit a blank, or the metadata
        GPT.from_pretrained(directory / "small")


@pytest.mark.parametrize("kind", ["directory", "file", "bin", "transformers"])
def test_every_kind_of_checkpoint_is_quantised(saved, tmp_path, kind):
    model, source = saved
    if kind == "transformers":
        hugging_face_model().save_pretrained(source)
        model = GPT.from_pretrained(source)
    elif kind == "bin":
        torch.save(safetensors.torch.load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    elif kind == "file":
        source = source / "model.safetensors"
    seen = []
    parts = quantize_checkpoint(source, tmp_path / "deep" / "small", "int8", progress=lambda *step: seen.append(step))
    loaded = GPT.from_pretrained(tmp_path / "deep" / "small").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=float(tensor.abs().max()) / 250)
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert sum(part.bytes_before for part in parts) == total
    assert sum(part.bytes_after for part in parts) == sum(checkpoint.stream(tmp_path / "deep" / "small").sizes.values())
    kinds = ["token embedding", "query key value", "attention out", "mlp in", "mlp out"]
    assert sorted(part.kind for part in parts) == sorted([*kinds, "the rest"])
    for part in parts:
        assert part.precision == ("float32" if part.kind == "the rest" else "int8")
        assert part.tensors == {"token embedding": 1, "the rest": 19}.get(part.kind, 2)
        assert (0 < part.relative_error < 0.01) == (part.kind != "the rest")


def test_a_tokenizer_and_a_card_come_along(storyteller_directory, tmp_path):
    shutil.copytree(storyteller_directory, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("# A model\n")
    (tmp_path / "source" / "training.json").write_text("{}")
    quantize_checkpoint(tmp_path / "source", tmp_path / "small", "int4")
    card = (tmp_path / "small" / "README.md").read_text()
    assert card.startswith("# A model\n") and "llmfast quantize --precision int4" in card
    names = {p.name for p in (tmp_path / "source").iterdir()} - {"training.json"}
    assert {p.name for p in (tmp_path / "small").iterdir()} == names
    assert llmfast.load(tmp_path / "small").generate("The dog", 5).startswith("The dog")


def test_a_quantised_model_is_not_quantised_again(small, tmp_path):
    with pytest.raises(ValueError, match=r"small is quantised already \(int4\)"):
        quantize_checkpoint(small, tmp_path / "smaller", "int8")
    assert not (tmp_path / "smaller").exists()


def test_a_model_is_never_overwritten_by_its_own_quantisation(saved):
    _, directory = saved
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    for source, target in [
        (directory, directory),
        (directory / "model.safetensors", directory),
        (directory, directory.parent / "elsewhere" / ".." / directory.name),
    ]:
        with pytest.raises(ValueError, match="holds the model to quantise"):
            quantize_checkpoint(source, target, "int8", overwrite=True)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_another_model_is_overwritten_only_on_demand_and_leaves_nothing(saved, storyteller_directory, tmp_path):
    _, source = saved  # without a tokenizer
    shutil.copytree(storyteller_directory, tmp_path / "other")
    for extra in ("README.md", "training.json", "notes.txt"):
        (tmp_path / "other" / extra).write_text("{}")
    with pytest.raises(ValueError, match="other holds a model already: .*overwrite=True"):
        quantize_checkpoint(source, tmp_path / "other", "int8")
    llmfast.load(tmp_path / "other")  # unharmed
    quantize_checkpoint(source, tmp_path / "other", "int8", overwrite=True)
    assert checkpoint.stream(tmp_path / "other").quantization.precision == "int8"
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_a_target_that_holds_something_else_is_kept_as_it_is(saved, tmp_path):
    _, source = saved
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ValueError, match="file is a file: name a directory"):
        quantize_checkpoint(source, tmp_path / "file", "int8", overwrite=True)
    assert (tmp_path / "file").read_text() == "keep"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("keep")
    quantize_checkpoint(source, tmp_path / "folder", "int8")
    assert (tmp_path / "folder" / "notes.txt").read_text() == "keep"


def test_weights_that_are_no_numbers_are_named_and_nothing_is_written(saved, tmp_path):
    _, source = saved
    edit_weights(source, lambda tensors: tensors[C_FC][3].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{C_FC}: the weight holds infinities or NaN"):
        quantize_checkpoint(source, tmp_path / "small", "int4")
    assert not (tmp_path / "small").exists()


def test_what_can_not_be_quantised_says_why(saved, tmp_path):
    _, source = saved
    with pytest.raises(FileNotFoundError, match="no model at"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "small", "int8")
    with pytest.raises(ValueError, match="precision must be int8, .*, int4-all, .*got 'int3'"):
        quantize_checkpoint(source, tmp_path / "small", "int3")
    assert not (tmp_path / "small").exists()


def test_quantised_weights_and_the_name_of_their_plan_are_saved_together(saved, tmp_path):
    model, _ = saved
    state = model.state_dict()
    rounded = state | {"transformer.wte.weight": quantize(state["transformer.wte.weight"], "int8")}
    with pytest.raises(ValueError, match="precision is None, and 1 of the weights are quantised"):
        save(tmp_path / "small", model.config, rounded)
    with pytest.raises(ValueError, match="precision is 'int8', and 0 of the weights"):
        save(tmp_path / "small", model.config, state, precision="int8")
    assert not (tmp_path / "small").exists()
    save(tmp_path / "small", model.config, rounded, precision="int8")  # not all that the plan names
    assert checkpoint.stream(tmp_path / "small").quantization.weights == {"transformer.wte.weight": "int8"}
    assert torch.equal(
        dict(checkpoint.stream(tmp_path / "small"))["transformer.wpe.weight"], state["transformer.wpe.weight"]
    )


def test_the_quality_of_a_quantised_model_is_recorded_with_it(small, saved):
    quality = {"stories": {"loss_change": 0.01, "top1_agreement": 0.95}}
    before = checkpoint.stream(small)
    record_quality(small, quality)
    after = checkpoint.stream(small)
    assert after.quantization.quality == quality
    assert (after.config, after.quantization.weights) == (before.config, before.quantization.weights)
    with pytest.raises(ValueError, match="is not quantised"):
        record_quality(saved[1], quality)
