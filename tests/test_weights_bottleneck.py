"""Bottleneck adapters in files: what is read is what was written, runs, and is refused where it can't."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models_bottleneck import adapted
from test_weights_adapter import FAMILIES, IDS, changed, logits, random_adapter

import llmfast
from llmfast.finetuning.merging import merge
from llmfast.finetuning.run import finetune
from llmfast.models import Bottlenecks
from llmfast.weights.adapter import CONFIG, WEIGHTS, write_adapter
from llmfast.weights.bottleneck import read_bottlenecks, write_bottlenecks
from llmfast.weights.checkpoint import stream
from llmfast.weights.converting import convert
from llmfast.weights.quantizing import quantize_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FAMILIES)
def written(request, tmp_path):
    """A model with bottlenecks, the directory of the model without, and that of the bottlenecks."""
    family, config = FAMILIES[request.param]
    model = adapted(family, config)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".adapter." in name}
    plain = family(config)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.save_pretrained(tmp_path / "base")
    write_bottlenecks(tmp_path / "a", Bottlenecks(str(tmp_path / "base"), 5, state))
    return model, tmp_path / "base", tmp_path / "a"


def test_what_is_read_is_what_was_written(written):
    model, base, path = written
    found = read_bottlenecks(path, model.config)
    assert (found.base, found.size, found.score) == (str(base), 5, None)
    assert found.state.keys() == {name for name in model.state_dict() if ".adapter." in name}
    for name, tensor in found.state.items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("backend", ["auto", "pytorch"])
def test_it_runs_by_its_own_name_and_beside_the_model(written, backend):
    model, base, path = written
    for arguments in ({"name": path}, {"name": base, "adapter": path}):
        llm = llmfast.load(**arguments, backend=backend, precision="fp32", device="cpu")
        torch.testing.assert_close(logits(llm.model), logits(model), rtol=1e-4, atol=1e-4)
        expected = IDS[:1]
        for _ in range(4):
            with torch.no_grad():
                expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert llm.generate(IDS[:1], max_new_tokens=4, temperature=0).tolist() == expected.tolist()
    rounded = llmfast.load(path, precision="int8", device="cpu", backend=backend)
    plain = llmfast.models.from_pretrained(base)
    assert (logits(rounded.model) - logits(model)).abs().mean() < 0.1 * (logits(plain) - logits(model)).abs().mean()


def test_what_would_lose_them_is_refused(written, tmp_path):
    model, base, path = written
    for lose in (
        lambda: merge(path, tmp_path / "whole"),
        lambda: quantize_checkpoint(path, tmp_path / "whole", "int8"),
        lambda: convert(path, tmp_path / "whole.gguf", "gguf"),
        lambda: list(stream(path)),
    ):
        with pytest.raises(ValueError, match=r"has bottleneck adapters, which can't be merged, converted or quantised"):
            lose()
    with pytest.raises(ValueError, match="has adapters beside its weights"):
        llmfast.load(path, device="cpu").save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists() and not (tmp_path / "whole.gguf").exists()
    with pytest.raises(ValueError, match="only LORA is read here"):
        llmfast.load(base, device="cpu").add_adapter("a", path)
    write_adapter(tmp_path / "b", random_adapter(model, path), model.config)
    with pytest.raises(ValueError, match="adapts a model that has bottlenecks"):
        llmfast.load(tmp_path / "b")
    (tmp_path / "text.txt").write_text("anything")
    with pytest.raises(ValueError, match="tune the model that they are for"):
        finetune(path, tmp_path / "text.txt", tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size must be up to"),
        ({"bottleneck_size": True}, "bottleneck_size must be up to"),
        ({"bottleneck_size": 6}, "wrongly shaped"),
        ({"non_linearity": "tanh"}, "non_linearity is 'tanh', and only gelu"),
        ({"peft_type": "IA3"}, "its peft_type is 'IA3'"),
    ],
)
def test_what_is_not_computed_is_an_error_that_names_it(written, changes, message):
    _, _, path = written
    changed(path, **changes)
    with pytest.raises(ValueError, match=message):
        llmfast.load(path, device="cpu")


def test_damaged_files_are_named(written):
    model, _, path = written
    tensors = load_file(path / WEIGHTS)
    name = next(iter(tensors))
    for wrong, message in (
        ({n: t for n, t in tensors.items() if n != name}, "missing"),
        (tensors | {"base_model.model.other.adapter.up.bias": torch.zeros(3)}, "not of this model"),
        (tensors | {name: torch.full_like(tensors[name], torch.inf)}, "infinities or NaN"),
        (tensors | {name: tensors[name].int()}, "of the wrong type"),
    ):
        save_file(wrong, path / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            read_bottlenecks(path, model.config)
    (path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        read_bottlenecks(path, model.config)
    assert json.loads((path / CONFIG).read_text())["bottleneck_size"] == 5
