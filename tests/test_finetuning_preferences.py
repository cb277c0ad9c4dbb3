"""Preferences: the loss against its formula, what counts, and that a preference is learned."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_weights_adapter import GPT2

from llmfast.finetuning import lora, preferences
from llmfast.finetuning.examples import Example, padded
from llmfast.finetuning.run import finetune
from llmfast.models import GPT
from llmfast.training.dataset import IGNORED

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(prompt, chosen, rejected):
    made = []
    for answer in (chosen, rejected):
        ids = torch.tensor([*prompt, *answer], dtype=torch.int32).numpy()
        targets = ids[1:].copy()
        targets[: len(prompt) - 1] = IGNORED
        made.append(Example(ids[:-1], targets))
    return tuple(made)


PAIRS = [pair([1, 2, 3], [4, 5], [6, 7, 8, 9]), pair([9, 8], [7], [5])]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPT2).eval()
    lora.put_in(model, lora.targets(GPT2, "all"), 4, 8.0)
    return model


def test_the_loss_is_that_of_the_paper(model):
    ids, targets = padded([example for each in PAIRS for example in each], 0)
    assert float(preferences.loss(model, ids, targets, 0.5)) == pytest.approx(torch.log(torch.tensor(2.0)).item())
    with torch.no_grad():
        before = [row_log_probability(model, example) for each in PAIRS for example in each]
    for name, parameter in model.named_parameters():
        if ".adapter.b" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    after = [row_log_probability(model, example) for each in PAIRS for example in each]
    gained = [a - b for a, b in zip(after, before, strict=True)]
    expected = sum(-F.logsigmoid(0.5 * (gained[2 * i] - gained[2 * i + 1])) for i in range(2)) / 2
    found = preferences.loss(model, ids, targets, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    adapters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(torch.autograd.grad(found, adapters), torch.autograd.grad(expected, adapters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    figures = preferences.figures(model, PAIRS, 0.5, 0)
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-4)
    margins = [float(gained[2 * i] - gained[2 * i + 1]) for i in range(2)]
    assert figures["accuracy"] == sum(m > 0 for m in margins) / 2
    assert figures["margin"] == pytest.approx(0.5 * sum(margins) / 2, rel=1e-3)


def row_log_probability(model, example):
    logits = model(torch.tensor(example.ids[None]).long())[0].float().log_softmax(-1)
    targets = torch.tensor(example.targets).long()
    rows = (targets != IGNORED).nonzero().squeeze(1)
    return logits[rows, targets[rows]].sum()


def test_switching_off_gives_the_model_back(model):
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids)
    for name, parameter in model.named_parameters():
        if ".adapter.b" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(model(ids), before)
    with lora.switched_off(model):
        assert torch.equal(model(ids), before)
    assert not torch.allclose(model(ids), before)


def test_of_an_answer_in_turns_the_last_counts():
    example = Example(torch.arange(8).int().numpy(), torch.tensor([-100, 2, 3, -100, -100, 6, 7, -100]).int().numpy())
    assert preferences.last_turn(example).targets.tolist() == [-100, -100, -100, -100, -100, 6, 7, -100]


@pytest.mark.parametrize(("form", "method"), [("text", "lora"), ("chat", "lora"), ("chat", "adapter")])
def test_a_preference_is_learned(form, method, storyteller_directory, tmp_path):
    rows = []
    for i in range(40):
        good, bad = f"The sun was warm {i % 3}.", f"The dog was big {i % 3}."
        if form == "chat":
            good, bad = ([{"role": "assistant", "content": text}] for text in (good, bad))
        rows.append({"prompt": f"Tell me number {i}: ", "chosen": good, "rejected": bad})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    changes = {"precision": "fp32", "device": "cpu", "lr": 3e-3, "epochs": 4.0, "batch_size": 8, "rank": 4, "test": 0.1}
    changes["method"] = method
    finetune(storyteller_directory, tmp_path / "a.jsonl", tmp_path / "out", changes=changes, quiet=True)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["before"]["test"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert found["after"]["test"]["accuracy"] == 1.0 and found["after"]["test"]["loss"] < 0.4
    with pytest.raises(ValueError, match="preferences are learned by adapters"):
        finetune(storyteller_directory, tmp_path / "a.jsonl", tmp_path / "b", changes={"method": "full"}, quiet=True)


def test_what_is_wrong_with_a_pair_is_said(storyteller, tmp_path):
    for fields, message in (
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "x", "chosen": "a", "rejected": ""}, "completion is empty"),
        ({"prompt": "x", "chosen": "a", "rejected": None}, "completion must be text"),
        ({"prompt": [], "chosen": [{"role": "assistant", "content": "a"}], "rejected": []}, "no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            preferences.encode(fields, storyteller.tokenizer, None, "", "line 1")
