"""Arguments and files that make no sense: an error in words, never a crash or a read out of bounds.

`tests/check_core.sh pytest` runs these with the address sanitizer, which sees reads that happen to do no harm here.
"""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_inference_native import MODEL, needs_cpp, packed

import llmfast
from llmfast import GPT, GPTConfig
from llmfast.inference.decoders import NativeDecoder
from llmfast.quantization.formats import quantize
from llmfast.quantization.plan import plan
from llmfast.weights.saving import save

pytestmark = needs_cpp

OPS = torch.ops.llmfast
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int64])


@st.composite
def tensors(draw, shape: list[int] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Any shape (or one that is nearly right), any dtype, any strides."""
    if shape is None:
        shape = draw(st.lists(SIZES, max_size=4))
    elif draw(st.integers(0, 9)) == 0:
        shape = [draw(SIZES) if draw(st.booleans()) else n for n in shape]
    dtype = dtype if dtype is not None and draw(st.integers(0, 9)) else draw(DTYPES)
    layout = draw(st.sampled_from(["dense", "dense", "transposed", "strided", "expanded", "offset"]))
    if not shape or layout == "dense":
        return torch.randn(shape).to(dtype)
    if layout == "transposed":
        return torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return torch.randn([2 * n for n in shape]).to(dtype)[tuple(slice(None, None, 2) for _ in shape)]
    if layout == "expanded":
        return torch.randn([1, *shape[1:]]).to(dtype).expand(shape)
    return torch.randn([n + 1 for n in shape]).to(dtype)[tuple(slice(1, None) for _ in shape)]


def survives(call, *arguments) -> None:
    """Runs, or says what was wrong."""
    try:
        call(*arguments)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        assert str(error).strip()


fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@fuzz
@given(data=st.data())
def test_attention_survives(data):
    B, H, group, T, more, D = (data.draw(SIZES) for _ in range(6))
    D = data.draw(st.sampled_from([D, 64, 257]))
    S = T + data.draw(st.sampled_from([0, more]))
    dtype = data.draw(DTYPES)
    q, k, v = (data.draw(tensors(shape, dtype)) for shape in ([B, H * group, T, D], [B, H, S, D], [B, H, S, D]))
    lengths = data.draw(
        st.none() | tensors([B], torch.int64) | st.lists(st.integers(-3, 40), max_size=4).map(torch.tensor)
    )
    seed = data.draw(st.none() | st.integers(-(2**63), 2**63 - 1).map(torch.tensor))
    p = data.draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, -1.0, 2.0]))
    window, causal = data.draw(st.sampled_from([0, 0, 1, 7, 2**40, -1])), data.draw(st.booleans())
    survives(OPS.causal_attention, q, k, v, 0.1, p, seed, lengths, window, causal)
    out, lse = data.draw(tensors([B, H * group, T, D], dtype)), data.draw(tensors([B, H * group, T], torch.float32))
    survives(OPS.causal_attention_backward, out, q, k, v, out, lse, 0.1, p, seed, lengths, window, causal)


@fuzz
@given(data=st.data())
def test_norms_gelu_and_products_survive(data):
    M, N, K = (data.draw(SIZES) for _ in range(3))
    dtype = data.draw(DTYPES)
    x, other = data.draw(tensors([M, N], dtype)), data.draw(tensors([M, N], dtype))
    weight, bias = data.draw(tensors([N], dtype)), data.draw(st.none() | tensors([N], dtype))
    mean, rstd = data.draw(tensors([M], torch.float32)), data.draw(tensors([M], torch.float32))
    kind = data.draw(st.sampled_from(["tanh", "none", "exact"]))
    survives(OPS.layer_norm, x, weight, bias, 1e-5)
    survives(OPS.layer_norm_backward, other, x, weight, mean, rstd)
    survives(OPS.add_layer_norm, x, other, weight, bias, 1e-5)
    survives(OPS.add_layer_norm_backward, other, other, x, weight, mean, rstd)
    survives(OPS.rms_norm, x, weight, 1e-6)
    survives(OPS.rms_norm_backward, other, x, weight, rstd)
    survives(OPS.add_rms_norm, x, other, weight, 1e-6)
    survives(OPS.add_rms_norm_backward, other, data.draw(st.sampled_from([None, other])), x, weight, rstd)
    survives(OPS.gelu, x, kind)
    survives(OPS.gelu_backward, other, x, kind)
    matrix, row = data.draw(tensors([K, N], dtype)), data.draw(st.none() | tensors([K], dtype))
    activation = data.draw(st.sampled_from(["", "silu", "gelu", "gelu_tanh", "relu"]))
    survives(OPS.linear, x, matrix, row, activation, True)
    grad, before = data.draw(tensors([M, K], dtype)), data.draw(tensors([M, K], dtype))
    survives(OPS.linear_backward, grad, x, matrix, before, activation, True, True, True)
    up, up_row, up_before = data.draw(tensors([K, N], dtype)), data.draw(st.none() | tensors([K], dtype)), before
    save = data.draw(st.booleans())
    survives(OPS.gated_linear, x, matrix, up, row, up_row, activation, save)
    needed = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    survives(OPS.gated_linear_backward, grad, x, matrix, up, before, up_before, activation, *needed)


@fuzz
@given(data=st.data())
def test_rotary_survives(data):
    B, H, T, D, half = (data.draw(SIZES) for _ in range(5))
    x = data.draw(tensors([B, H, T, D], data.draw(DTYPES)))
    tables = data.draw(st.sampled_from([1, B]))
    half = data.draw(st.sampled_from([half, D // 2]))
    cos, sin = (data.draw(tensors([tables, T, half], torch.float32)) for _ in range(2))
    interleaved = data.draw(st.booleans())
    survives(OPS.rotary, x, cos, sin, interleaved)
    survives(OPS.rotary_backward, x, cos, sin, interleaved)


@fuzz
@given(data=st.data())
def test_cross_entropy_survives(data):
    M, V, K = (data.draw(SIZES) for _ in range(3))
    dtype = data.draw(DTYPES)
    hidden, weight = data.draw(tensors([M, K], dtype)), data.draw(tensors([V, K], dtype))
    targets = torch.tensor(data.draw(st.lists(st.integers(-101, V + 2), min_size=M, max_size=M)), dtype=torch.int64)
    survives(OPS.linear_cross_entropy, hidden, weight, targets, -100)
    lse, grad = data.draw(tensors([M], torch.float32)), data.draw(tensors([], torch.float32))
    survives(OPS.linear_cross_entropy_backward, grad, hidden, weight, targets, lse, -100, True)


@fuzz
@given(data=st.data())
def test_a_native_step_survives(data):
    batch, capacity = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    decoder = NativeDecoder(packed(MODEL, data.draw(st.sampled_from(["fp32", "int8", "int4-all"]))), batch, capacity)
    for _ in range(3):
        number = st.integers(-2, 42) | st.sampled_from([2**62, -(2**62)])
        segments = data.draw(st.lists(number, max_size=9))
        ids = data.draw(
            tensors([len(segments)], torch.int64) | st.lists(st.integers(0, 100), max_size=50).map(torch.tensor)
        )
        out = data.draw(st.none() | tensors([len(segments) // 3, 101], torch.float32))
        threads, vocabulary = data.draw(st.integers(-1, 5)), data.draw(st.integers(-5, 200))
        all_rows = data.draw(st.booleans())
        survives(OPS.native_step, decoder._number, ids, segments, all_rows, vocabulary, threads, out)
    decoder.prefill([[1]] * batch)  # and works as ever afterwards


# A block of the Llama family, 40 wide: (role, is a bias, shape).
PARAMETERS: list[tuple[str, int, list[int]]] = [
    *(("attention_norm", 0, [40]), ("query", 0, [40, 40]), ("query", 1, [40]), ("key", 0, [20, 40])),
    *(("value", 0, [20, 40]), ("attention_out", 0, [40, 40]), ("mlp_norm", 0, [40]), ("gate", 0, [50, 40])),
    *(("up", 0, [50, 40]), ("mlp_out", 0, [40, 50]), ("final_norm", 0, [40]), ("token_embedding", 0, [11, 40])),
]


def native_model(sizes, numbers, frequencies, rotary, windows, blocks, formats) -> int:
    roles, biases, _ = zip(*PARAMETERS, strict=True)
    return OPS.native_model(
        sizes, numbers, "rms", "silu", True, frequencies, rotary, windows, blocks, list(roles), list(biases), formats
    )


@fuzz
@given(data=st.data())
def test_describing_a_model_survives(data):
    integers = st.integers(-2, 60) | st.sampled_from([2**31, 2**62, -(2**62)])
    lists = st.lists(integers, max_size=14)
    sizes = data.draw(st.lists(integers, min_size=8, max_size=8) | lists)
    floats = st.lists(st.floats(), max_size=8)
    blocks = data.draw(st.just([0] * 10 + [-1, -1]) | lists)
    formats = data.draw(st.lists(st.integers(-1, 7), min_size=12, max_size=12) | lists)
    numbers, frequencies = data.draw(floats), data.draw(floats)
    try:
        number = native_model(sizes, numbers, frequencies, data.draw(lists), data.draw(lists), blocks, formats)
    except RuntimeError:
        return
    OPS.native_model_free(number)


@fuzz
@given(data=st.data())
def test_giving_weights_survives(data):
    form = data.draw(st.integers(-1, 7))
    try:
        sizes, numbers = [11, 9, 40, 1, 4, 2, 10, 50], [1e-5, 0.3, 1.0, 1.0, 1.0, 1.0]
        model = native_model(sizes, numbers, [1.0, 0.1], [1], [0], [0] * 10 + [-1, -1], [form] * 12)
    except RuntimeError:
        return
    for number in [*range(len(PARAMETERS)), -1, len(PARAMETERS)]:
        shape = PARAMETERS[number % len(PARAMETERS)][2]
        values = data.draw(tensors(shape)).to(data.draw(st.sampled_from([torch.float32, torch.int8, torch.uint8])))
        halves = tensors([shape[0], 2], torch.float16) | tensors([shape[0], 1], torch.float16)
        scale = data.draw(st.none() | tensors([shape[0]]) | tensors([shape[0], 2], torch.bfloat16) | halves)
        codes = st.none() | tensors([shape[0], 2], torch.uint8)
        further = data.draw(st.none() | halves), data.draw(codes), data.draw(codes)
        survives(OPS.native_model_give, model, number, values, scale, *further, 2)
    survives(OPS.native_decoder, model, 1, 9, 9, "fp32")
    OPS.native_model_free(model)


@fuzz
@given(data=st.data())
def test_sampling_survives(data):
    logits = data.draw(tensors([2, 17], torch.float32))
    if logits.dtype == torch.float32 and logits.numel() and data.draw(st.booleans()):
        logits = logits * data.draw(st.sampled_from([float("inf"), float("nan"), -float("inf"), 1e30]))
    uniform = data.draw(tensors([2], torch.float64))
    number = st.floats(-1, 2) | st.sampled_from([0.0, 1e-300, float("nan"), float("inf")])
    temperature, top_p, min_p = (data.draw(number) for _ in range(3))
    vocabulary, top_k = data.draw(st.integers(-1, 20)), data.draw(st.integers(-3, 30))
    survives(OPS.sample, logits, vocabulary, temperature, top_k, top_p, min_p, uniform)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small model, quantised."""
    directory = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, n_positions=16, n_embd=40, n_layer=1, n_head=2)
    state = GPT(config).state_dict()
    formats = plan(config, "int4")
    state = {name: quantize(t, formats[name]) if name in formats else t for name, t in state.items()}
    save(directory, config, state, precision="int4")
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@fuzz
@given(data=st.data())
def test_a_damaged_quantised_model_is_an_error_or_a_model(quantised, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    files = dict(quantised)
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:  # mostly in the header, where it matters
            content[data.draw(st.integers(0, min(len(content), 4000) - 1))] = data.draw(st.integers(0, 255))
    files[name] = bytes(content)
    for file, text in files.items():
        (directory / file).write_bytes(text)
    try:
        llm = llmfast.load(directory, device="cpu")
        llm.generate(torch.tensor([[1, 2]]), max_new_tokens=3, temperature=0)
    except (ValueError, FileNotFoundError, MemoryError) as error:
        assert "\n" not in str(error).strip()


def test_shapes_that_do_not_fit_the_configuration_are_refused(quantised, tmp_path):
    for file, content in quantised.items():
        (tmp_path / file).write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 48}))
    with pytest.raises(ValueError, match="does not fit"):
        llmfast.load(tmp_path)
    tensors_ = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors_["transformer.wte.weight_scale"] = torch.full_like(tensors_["transformer.wte.weight_scale"], float("nan"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors_, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="wte"):
        llmfast.load(tmp_path, device="cpu")
