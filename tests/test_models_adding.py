"""An architecture in one file outside of the package is known everywhere (docs/add-an-architecture.md)."""

import sys
from pathlib import Path

import pytest
import torch
from training_runs import SMALL, TEXT, losses

import llmfast
from llmfast.models import FAMILIES
from llmfast.training.configuration import configure
from llmfast.training.run import train
from llmfast.weights.quantizing import quantize_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def family():
    sys.path.insert(0, str(EXAMPLES))
    import my_architecture

    yield my_architecture
    sys.path.remove(str(EXAMPLES))
    del FAMILIES["parallel"]


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    torch.manual_seed(0)
    config = family.ParallelConfig(vocab_size=50, width=32, blocks=2, heads=2, inner_dim=64, context=40)
    model = family.Parallel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    directory = tmp_path_factory.mktemp("parallel")
    model.save_pretrained(directory)
    return model, directory


def test_its_statement_is_its_modules(saved):
    model, _ = saved
    assert {p.name: p.shape for p in model.config.parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }


def test_it_is_read_and_generates_cached_uncached_and_past_its_context(saved):
    model, directory = saved
    llm = llmfast.load(directory, precision="fp32")
    ids = torch.tensor([3, 1, 4, 1, 5])
    text = llm.generate(ids, max_new_tokens=30, temperature=0)
    assert torch.equal(text, llm.generate(ids, max_new_tokens=30, temperature=0, use_cache=False))
    with torch.no_grad():
        assert int(model(text[None, :-1])[0, -1].argmax()) == int(text[-1])
    with pytest.warns(UserWarning, match="outgrew the context"):
        assert len(llm.generate(ids, max_new_tokens=50, temperature=0)) == 55


def test_it_trains_and_resumes_to_the_bit(family, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    changes = SMALL | {"family": "parallel", "dropout": 0.0, "schedule": "constant"}
    whole = train([tmp_path / "text.txt"], tmp_path / "whole", configure(changes=changes), quiet=True)
    train([tmp_path / "text.txt"], tmp_path / "out", configure(changes=changes | {"steps": 12}), quiet=True)
    train([], tmp_path / "out", changes={"steps": 30}, resume=True, quiet=True)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole") and whole.loss < losses(tmp_path / "whole")[0] - 0.5
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1] and llmfast.load(tmp_path / "out").config.model_types == ("parallel",)
    with pytest.raises(ValueError, match="parallel has no dropout"):
        train([tmp_path / "text.txt"], tmp_path / "no", configure(changes=changes | {"dropout": 0.1}), quiet=True)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_it_is_quantised_from_loading_and_from_a_file_alike(saved, tmp_path, precision):
    _, directory = saved
    quantize_checkpoint(directory, tmp_path / "small", precision)
    ids = torch.tensor([3, 1, 4, 1, 5])
    at_loading, from_file = (llmfast.load(d, precision=precision) for d in (directory, tmp_path / "small"))
    assert at_loading.precision == from_file.precision == precision
    assert torch.equal(*(llm.generate(ids, max_new_tokens=12, temperature=0) for llm in (at_loading, from_file)))


def test_it_learns(family):
    torch.manual_seed(1)
    config = family.ParallelConfig(vocab_size=20, width=32, blocks=1, heads=2, inner_dim=64, context=16)
    model = family.Parallel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(16).repeat(2, 1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
