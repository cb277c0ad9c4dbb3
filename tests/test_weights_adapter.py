"""Adapters in peft's files: what peft reads of ours and we of peft's, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmfast
from llmfast.finetuning import lora
from llmfast.finetuning.merging import merge
from llmfast.models import GPT, GPTConfig, Llama, LlamaConfig
from llmfast.weights.adapter import CONFIG, WEIGHTS, Adapter, read_adapter, target_modules, write_adapter
from llmfast.weights.checkpoint import stream

pytestmark = pytest.mark.usefixtures("one_thread")

GPT2 = GPTConfig(
    vocab_size=67, n_positions=32, n_embd=24, n_layer=2, n_head=2, initializer_range=0.3,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=67, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
)  # fmt: skip
FAMILIES = {"gpt2": (GPT, GPT2), "llama": (Llama, LLAMA)}
IDS = torch.arange(1, 25).view(2, 12) * 5 % 67


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    """A random model, and the directory that it is written to."""
    torch.manual_seed(3)
    family, config = FAMILIES[request.param]
    model = family(config).eval()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def random_adapter(model, base, targets="all", rank=3, **changes) -> Adapter:
    torch.manual_seed(4)
    shapes = {p.name: p.shape for p in lora.targets(model.config, targets)}
    pairs = {n: (torch.randn(rank, within) * 0.3, torch.randn(out, rank) * 0.3) for n, (out, within) in shapes.items()}
    return Adapter(str(base), rank, 5.0, pairs, **changes)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS)


def changed(path, **changes) -> None:
    document = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(document | changes))


# --- ours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
def test_an_adapter_beside_the_weights_does_what_it_does_within_them(base, targets, stabilised, tmp_path):
    model, directory = base
    adapter = random_adapter(model, directory, targets, rank_stabilised=stabilised)
    write_adapter(tmp_path / "a", adapter, model.config)
    plain, loaded = logits(model), llmfast.load(tmp_path / "a", backend="pytorch", device="cpu", precision="fp32")
    lora.load(model, read_adapter(tmp_path / "a", model.config))
    beside = logits(model)
    assert (beside - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded.model), beside, rtol=1e-4, atol=1e-4)
    other = llmfast.load(directory, backend="pytorch", device="cpu", precision="fp32", adapter=tmp_path / "a")
    torch.testing.assert_close(logits(other.model), beside, rtol=1e-4, atol=1e-4)
    merge(tmp_path / "a", tmp_path / "whole")
    torch.testing.assert_close(logits(llmfast.models.from_pretrained(tmp_path / "whole")), beside, rtol=1e-4, atol=1e-4)


def test_what_is_added_is_the_scaled_product_and_nothing_else(base, tmp_path):
    model, directory = base
    adapter = random_adapter(model, directory, "attention")
    write_adapter(tmp_path / "a", adapter, model.config)
    before = dict(model.state_dict())
    for name, weight in stream(tmp_path / "a"):
        expected = before[name]
        if name in adapter.pairs:
            a, b = adapter.pairs[name]
            expected = expected + 5.0 / 3 * (b @ a)
        torch.testing.assert_close(weight.float(), expected, rtol=1e-5, atol=1e-6)


def test_merging_gives_the_same_text(storyteller, storyteller_directory, tmp_path):
    adapter = random_adapter(storyteller.model, storyteller_directory)
    write_adapter(tmp_path / "a", adapter, storyteller.config)
    merge(tmp_path / "a", tmp_path / "whole")
    texts = [
        llmfast.load(path, precision="fp32", device="cpu").generate("The cat", max_new_tokens=30, temperature=0)
        for path in (tmp_path / "a", tmp_path / "whole", storyteller_directory)
    ]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(ValueError, match="holds a model already"):
        merge(tmp_path / "a", tmp_path / "whole")


def test_an_adapter_of_an_adapter_is_both(base, tmp_path):
    model, directory = base
    one = random_adapter(model, directory, "attention")
    write_adapter(tmp_path / "one", one, model.config)
    write_adapter(tmp_path / "two", random_adapter(model, tmp_path / "one", "mlp"), model.config)
    twice = llmfast.load(tmp_path / "two", backend="pytorch", device="cpu", precision="fp32")
    whole = random_adapter(model, directory, "mlp")
    both = Adapter(one.base, one.rank, one.alpha, {**one.pairs, **whole.pairs})
    write_adapter(tmp_path / "both", both, model.config)
    lora.load(model, read_adapter(tmp_path / "both", model.config))
    torch.testing.assert_close(logits(twice.model), logits(model), rtol=1e-4, atol=1e-4)
    changed(tmp_path / "one", base_model_name_or_path=str(tmp_path / "two"))  # and so on for ever
    with pytest.raises(ValueError, match="adapter of an adapter"):
        stream(tmp_path / "two")


def test_an_ambiguous_ending_is_written_as_a_whole_name():
    attention = {p.name: None for p in lora.targets(GPT2, "attention")}
    assert target_modules(attention, GPT2) == ["c_attn", "transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    assert target_modules({p.name: None for p in lora.targets(GPT2, "all")}, GPT2) == ["c_attn", "c_fc", "c_proj"]
    chosen = {p.name: None for p in lora.targets(LLAMA, "query,value")}
    assert target_modules(chosen, LLAMA) == ["q_proj", "v_proj"]


# --- peft's -------------------------------------------------------------------------------------------------------


def transformers_model(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_peft_loads_ours_and_agrees(base, targets, tmp_path):
    peft = pytest.importorskip("peft")
    model, directory = base
    write_adapter(tmp_path / "a", random_adapter(model, directory, targets, rank_stabilised=True), model.config)
    theirs = peft.PeftModel.from_pretrained(transformers_model(directory), tmp_path / "a").eval()
    lora.load(model, read_adapter(tmp_path / "a", model.config))
    with torch.no_grad(), llmfast.use_backend("pytorch"):
        torch.testing.assert_close(logits(model), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(model), theirs.merge_and_unload()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_we_load_what_peft_wrote_and_agree(base, tmp_path):
    peft = pytest.importorskip("peft")
    model, directory = base
    gpt2 = isinstance(model, GPT)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["c_attn", "c_proj"] if gpt2 else ["q_proj", "down_proj"],
        fan_in_fan_out=gpt2,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    theirs = peft.get_peft_model(transformers_model(directory), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    lora.load(model, read_adapter(tmp_path / "theirs", model.config))
    with torch.no_grad(), llmfast.use_backend("pytorch"):
        torch.testing.assert_close(logits(model), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(llmfast.models.from_pretrained(directory))).abs().max() > 0.01


# --- files from strangers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA is read"),
        ({"use_dora": True}, "sets use_dora to True"),
        ({"rank_pattern": {"q_proj": 8}}, "sets rank_pattern"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 10**9}, "r must be a whole number"),
        ({"r": 2}, "wrongly shaped"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"lora_alpha": "2"}, "lora_alpha must be a number"),
    ],
)
def test_what_is_not_computed_is_an_error_that_names_it(base, changes, message, tmp_path):
    model, directory = base
    write_adapter(tmp_path / "a", random_adapter(model, directory), model.config)
    changed(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "a", model.config)


def test_damaged_files_are_named(base, tmp_path):
    model, directory = base
    write_adapter(tmp_path / "a", random_adapter(model, directory), model.config)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    name = next(iter(tensors))
    for wrong, message in (
        ({n: t for n, t in tensors.items() if n != name}, "missing"),
        (tensors | {"base_model.model.other.lora_A.weight": torch.zeros(3, 3)}, "not of this model"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, "infinities or NaN"),
        (tensors | {name: tensors[name].double()}, "of the wrong type"),
    ):
        save_file(wrong, tmp_path / "a" / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / "a", model.config)
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        read_adapter(tmp_path / "a", model.config)
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        llmfast.load(directory, adapter=tmp_path)


def test_an_adapter_whose_base_is_gone_says_so(base, tmp_path):
    model, _ = base
    write_adapter(tmp_path / "a", random_adapter(model, tmp_path / "gone"), model.config)
    with pytest.raises(FileNotFoundError, match="adapts the model"):
        llmfast.load(tmp_path / "a")
    changed(tmp_path / "a", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say which model"):
        llmfast.load(tmp_path / "a")
