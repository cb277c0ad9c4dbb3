"""Several adapters beside one model: each sequence has its own, as if it were folded into the weights."""

from __future__ import annotations

import pytest
import torch

import llmfast
from llmfast.backends import cpp
from llmfast.finetuning import lora
from llmfast.inference.decoders import NativeAdapter, NativeDecoder, NativeModel
from llmfast.inference.decoders.native import BLOCK_ROWS
from llmfast.models import GPT, GPTConfig, Llama, LlamaConfig
from llmfast.weights.adapter import Adapter, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.skipif(
    cpp.why_not("linear", torch.device("cpu"), torch.float32) is not None, reason="the C++ kernels are not built"
)

FAMILIES = {
    "gpt2": (GPT, GPTConfig(vocab_size=67, n_positions=96, n_embd=24, n_layer=2, n_head=2, initializer_range=0.3)),
    "llama": (
        Llama,
        LlamaConfig(
            vocab_size=67, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3,
        ),
    ),
    "wide": (  # whole panels, and weights that end within one
        Llama,
        LlamaConfig(
            vocab_size=67, hidden_size=96, intermediate_size=200, num_hidden_layers=1, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=96, initializer_range=0.2,
        ),
    ),
}  # fmt: skip
PROMPTS = [[5, 9, 2], [7], [11, 3, 60, 8, 1], [44, 45]]


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    """A directory with a random model, and two adapters for it of different ranks and layers."""
    torch.manual_seed(3)
    family, config = FAMILIES[request.param]
    model = family(config).eval()
    model.save_pretrained(tmp_path / "base")
    for seed, (name, rank, targets) in enumerate([("a", 3, "all"), ("b", 5, "attention")]):
        torch.manual_seed(seed)
        shapes = {p.name: p.shape for p in lora.targets(config, targets)}
        pairs = {n: (torch.randn(rank, k) * 0.2, torch.randn(out, rank) * 0.2) for n, (out, k) in shapes.items()}
        write_adapter(tmp_path / name, Adapter("base", rank, 2.0 * rank, pairs), config)
    return tmp_path


def loaded(directory, backend, **changes):
    return llmfast.load(directory / "base", backend=backend, device="cpu", precision="fp32", **changes)


@pytest.mark.parametrize("backend", ["pytorch", pytest.param("cpp", marks=native)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_row_has_the_text_of_its_own_folded_adapter(base, backend, use_cache):
    llm = loaded(base, backend)
    llm.add_adapter("a", base / "a")
    llm.add_adapter("b", base / "b")
    chosen = ["a", None, "b", "a"]
    prompts = torch.tensor([[5, 9, 2], [5, 9, 2], [5, 9, 2], [44, 45, 1]])
    together = llm.generate(prompts, 12, temperature=0, adapter=chosen, use_cache=use_cache)
    for row, name in enumerate(chosen):
        folded = loaded(base, backend, adapter=None if name is None else base / name)
        assert together[row].tolist() == folded.generate(prompts[row], 12, temperature=0).tolist()
        assert together[row].tolist() == llm.generate(prompts[row], 12, temperature=0, adapter=name).tolist()
    assert len({tuple(row) for row in together[:3].tolist()}) == 3
    assert together[1].tolist() == llm.generate(prompts[1], 12, temperature=0).tolist()  # and nothing stays behind


@native
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4", "q4_1"])
def test_a_sequence_has_the_same_bits_alone_and_in_company(base, precision):
    llm = llmfast.load(base / "base", backend="cpp", device="cpu", precision=precision)
    llm.add_adapter("a", base / "a")
    llm.add_adapter("b", base / "b")
    model = llm.native()
    a, b = (NativeAdapter(model, llm.runner.adapters[name]) for name in "ab")
    chosen = [a, None, b, a]
    decoder = NativeDecoder(model, 4, 64)
    decoder.adapt(chosen)
    together = [decoder.prefill(PROMPTS), decoder.step(torch.tensor([1, 2, 3, 4]))]
    for row, adapter in enumerate(chosen):
        alone = NativeDecoder(model, 1, 64)
        alone.adapt([adapter])
        assert torch.equal(alone.prefill([PROMPTS[row]])[0], together[0][row])
        assert torch.equal(alone.step(torch.tensor([row + 1]))[0], together[1][row])
    plain = NativeDecoder(model, 1, 64)
    assert torch.equal(plain.prefill([PROMPTS[1]])[0], together[0][1])
    assert (plain.prefill([PROMPTS[0]])[0] - together[0][0]).abs().max() > 0.1


@native
@pytest.mark.parametrize("length", [3, BLOCK_ROWS, BLOCK_ROWS + 1, 80])
def test_logits_are_those_of_the_module_however_many_rows_a_step_has(base, length):
    llm, folded = loaded(base, "cpp"), loaded(base, "pytorch", adapter=base / "a")
    llm.add_adapter("a", base / "a")
    model = llm.native()
    decoder = NativeDecoder(model, 2, 90)
    decoder.adapt([NativeAdapter(model, llm.runner.adapters["a"]), None])
    ids = torch.arange(length) * 7 % 67
    logits = decoder.prefill([ids.tolist(), ids[:2].tolist()])
    with torch.no_grad():
        torch.testing.assert_close(logits[0], folded.model(ids[None])[0, -1], rtol=1e-4, atol=2e-4)


@native
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_an_adapter_in_8_bits_adds_what_it_adds_in_float32(base, precision, name):
    """Beside weights of fewer bits: what is lost is little beside what the adapter changes."""
    llm = llmfast.load(base / "base", backend="cpp", device="cpu", precision=precision)
    llm.add_adapter(name, base / name)
    model = llm.native()
    prompts = [list(range(i, i + 20)) for i in range(0, 40, 5)]

    def logits(adapter: NativeAdapter | None) -> torch.Tensor:
        decoder = NativeDecoder(model, len(prompts), 64)
        decoder.adapt([adapter] * len(prompts))
        return decoder.prefill(prompts)

    rounded = NativeAdapter(model, llm.runner.adapters[name])
    exact = NativeAdapter(model, llm.runner.adapters[name], rounded=False)
    changed, lost = logits(exact) - logits(None), logits(rounded) - logits(exact)
    assert 0 < lost.norm() < 0.05 * changed.norm()
    assert rounded.nbytes < 0.4 * exact.nbytes


def test_streams_and_replaced_adapters(base):
    llm = loaded(base, "auto")
    llm.add_adapter("a", base / "a")
    ids = torch.tensor([5, 9, 2])
    first = llm.generate(ids, 8, temperature=0, adapter="a")
    llm.add_adapter("a", base / "b")
    assert llm.generate(ids, 8, temperature=0, adapter="a").tolist() != first.tolist()
    assert "adapter" not in "".join(llm.model.state_dict())


def test_what_can_not_be_chosen_is_said(base):
    llm = loaded(base, "auto")
    with pytest.raises(ValueError, match=r"no adapter 'x'; it has none: add_adapter"):
        llm.generate(torch.tensor([1]), 1, adapter="x")
    llm.add_adapter("a", base / "a")
    with pytest.raises(ValueError, match=r"no adapter 'x'; it has a"):
        llm.generate(torch.tensor([1]), 1, adapter="x")
    with pytest.raises(ValueError, match="1 names for 2 prompts"):
        llm.generate(torch.tensor([[1], [2]]), 1, adapter=["a"])
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        llm.add_adapter("b", base / "nowhere")


@native
def test_an_adapter_that_does_not_fit_is_an_error_in_cpp():
    config = FAMILIES["gpt2"][1]
    models = [NativeModel(config, GPT(config).state_dict().items(), "fp32") for _ in range(2)]
    make, shape = torch.ops.llmfast.native_adapter, config.parameters()
    number = next(i for i, p in enumerate(shape) if p.role == "attention_out")
    ok = torch.zeros(48)
    for parameters, rank, a, b in [
        ([number], 2, torch.zeros(47), ok), ([number], 2, ok, torch.zeros(49)), ([number], 2**62, ok, ok),
        ([number, number], 2, torch.zeros(96), torch.zeros(96)), ([number], 0, ok, ok), ([number], 2, ok.double(), ok),
        ([0], 2, ok, ok), ([-1], 2, ok, ok), ([999], 2, ok, ok), ([number], 2, ok / 0, ok), ([number], 2, ok, ok / 0),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError):
            make(models[0]._number, parameters, rank, 1.0, a, b, False)
    adapter = make(models[0]._number, [number], 2, 1.0, ok, ok, False)
    decoder = NativeDecoder(models[1], 1, 8)
    with pytest.raises(RuntimeError, match="another model"):
        torch.ops.llmfast.native_decoder_adapt(decoder._number, [adapter])
    with pytest.raises(RuntimeError, match="every sequence"):
        torch.ops.llmfast.native_decoder_adapt(decoder._number, [])
    torch.ops.llmfast.native_adapter_free(adapter)
