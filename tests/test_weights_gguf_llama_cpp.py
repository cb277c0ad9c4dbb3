"""llama.cpp runs what is written: its logits, its greedy text and its tokens are ours.

In an environment of its own (LLMFAST_PEERS_PYTHON, or this one where it has llama-cpp-python); skipped without one.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_greedy, nmse, tiny_config

import llmfast
from llmfast.models import LlamaConfig, create, from_pretrained
from llmfast.models.rotary import RotarySettings
from llmfast.weights.checkpoint import stream
from llmfast.weights.converting import convert
from llmfast.weights.loading import quantized_module

PYTHON = os.environ.get("LLMFAST_PEERS_PYTHON") or sys.executable
pytestmark = pytest.mark.usefixtures("one_thread")


def has_llama_cpp() -> bool:
    return subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode == 0


def llama(kind: str = "llama", **changes) -> LlamaConfig:
    sizes = dict(
        vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaConfig(kind, **sizes | changes)


YARN = dict(rope_theta=10000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_theta=500.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
MULTIPLIERS = dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.6, logits_scaling=2.5)
GPT2 = dict(vocab_size=67, n_positions=64, n_embd=64, n_head=4, initializer_range=0.3)
MODELS = {
    "gpt2": tiny_config(**GPT2),
    "gpt2, untied": tiny_config(**GPT2, n_inner=96, tie_word_embeddings=False),
    "llama": llama(),
    "llama, tied, biases": llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, head_dim of its own": llama(head_dim=24, num_key_value_heads=1),
    "llama, linear": llama(rope=RotarySettings(500.0, "linear", factor=3.0)),
    "llama, yarn": llama(rope=RotarySettings(**YARN)),
    "llama, yarn by hand": llama(rope=RotarySettings(**YARN, attention_factor=0.7)),
    "llama 3": llama(rope=RotarySettings(**LLAMA3, original_max_position_embeddings=16)),
    "mistral, window": llama("mistral", sliding_window=24),
    "qwen2": llama("qwen2", rms_norm_eps=1e-2),
    "qwen3": llama("qwen3", head_dim=32, tie_word_embeddings=True),
    "smollm3": llama("smollm3", no_rope_blocks=(3,)),
    "granite": llama("granite", attention_bias=True, mlp_bias=True, **MULTIPLIERS),
}
QUANTISED = {("llama", kind): llama() for kind in ("bf16", "q8_0", "q4_0", "q4_1")}
IDS = [5, 9, 3, 11, 4, 60, 2, 8, 33, 17, 21, 6, 40, 41, 0, 66, 12, 50]
NEW = 5


def judge(folder: Path, jobs: list[dict]):
    """What llama.cpp computes of the jobs (see `llama_cpp_logits`), in a process of its own."""
    if not has_llama_cpp():
        pytest.skip(f"{PYTHON} has no llama-cpp-python; LLMFAST_PEERS_PYTHON names another")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("llama_cpp_logits.py")
    done = subprocess.run(
        [PYTHON, str(script), str(folder / "jobs.json"), str(folder / "out.npz")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Directories and GGUF files of all models, and what llama.cpp computes with them."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    jobs, places = [], {}
    for (name, kind), config in ({(name, "f32"): config for name, config in MODELS.items()} | QUANTISED).items():
        place = folder / f"{len(places)}"
        torch.manual_seed(len(places))
        model = create(config)
        for parameter in model.parameters():  # norms and biases too
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(place)
        convert(place, folder / f"{place.name}.gguf", "gguf", kind)
        places[name, kind] = place, folder / f"{place.name}.gguf", len(jobs)
        jobs.append({"file": str(places[name, kind][1]), "ids": IDS, "new": NEW})
    return places, judge(folder, jobs)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_are_those_of_llama_cpp(judged, name):
    places, theirs = judged
    directory, file, job = places[name, "f32"]
    ours = from_pretrained(directory)
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        assert nmse(ours(torch.tensor([IDS]))[0], torch.from_numpy(theirs[f"logits.{job}"])) < 1e-6
    llm = llmfast.load(file, backend="pytorch", precision="fp32")
    found = llm.generate(torch.tensor(IDS), max_new_tokens=NEW, temperature=0).tolist()
    assert_same_greedy(found, IDS + theirs[f"greedy.{job}"].tolist(), ours, len(IDS), name)


@pytest.mark.parametrize("kind", [kind for _, kind in QUANTISED])
def test_llama_cpp_reads_every_type_that_is_written(judged, kind):
    """It multiplies with 8-bit activations, so its logits are only near those of the same weights."""
    places, theirs = judged
    _, file, job = places["llama", kind]
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        ours = from_pretrained(file)(torch.tensor([IDS]))[0]
    assert nmse(ours, torch.from_numpy(theirs[f"logits.{job}"])) < 1e-3


TEXT = "The cat's naïve ☃ 日本語 sat on  the mat,\n\n  in 2024! <|endoftext|> \t end"


def test_llama_cpp_splits_text_as_a_tokenizer_trained_here(storyteller, storyteller_directory, tmp_path):
    """And writes the same text."""
    convert(storyteller_directory, tmp_path / "model.gguf", "gguf")
    prompt = storyteller.tokenizer.encode("The cat")
    theirs = judge(tmp_path, [{"file": str(tmp_path / "model.gguf"), "ids": prompt, "new": 20, "text": TEXT}])
    assert theirs["tokens.0"].tolist() == storyteller.tokenizer.encode(TEXT)
    with llmfast.use_backend("pytorch"):
        found = storyteller.generate(torch.tensor(prompt), max_new_tokens=20, temperature=0).tolist()
    assert_same_greedy(found, prompt + theirs["greedy.0"].tolist(), storyteller.model, len(prompt), "storyteller")


# What llama.cpp's quantiser makes of a model, mixtures of types, and how most of it runs here.
QUANTISERS = {
    "Q4_0": "q4_1", "Q4_1": "q4_1", "Q8_0": "q8_0", "Q4_K_S": "q4_k", "Q4_K_M": "q4_k", "Q5_0": "q8_0", "Q5_1": "q8_0",
    "Q5_K_M": "q8_0", "Q6_K": "q8_0", "Q3_K_M": "q8_0", "Q2_K": "q8_0", "IQ4_NL": "q8_0", "IQ4_XS": "q8_0",
}  # fmt: skip


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    create(llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2, initializer_range=0.08)).save_pretrained(
        folder / "model"
    )
    convert(folder / "model", folder / "f32.gguf", "gguf")
    places = {kind: folder / f"{kind}.gguf" for kind in QUANTISERS}
    jobs = [
        {"file": str(place), "from": str(folder / "f32.gguf"), "type": kind, "ids": IDS, "new": 0}
        for kind, place in places.items()
    ]
    theirs = judge(folder, jobs)
    return {kind: (place, theirs[f"logits.{job}"]) for job, (kind, place) in enumerate(places.items())}


@pytest.mark.parametrize("kind", QUANTISERS)
def test_what_llama_cpp_quantises_computes_the_same_here(quantised, kind):
    """As floats, and as it runs; llama.cpp rounds activations to 8 bits, in some types 256 of them by one scale."""
    file, logits = quantised[kind]
    theirs, ids = torch.from_numpy(logits), torch.tensor([IDS])
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        floats = from_pretrained(file)(ids)[0]
    assert nmse(floats, theirs) < 3e-3
    source = stream(file)
    with torch.inference_mode(), llmfast.use_backend("pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that some types are rounded to 8 bits
        packed = quantized_module(source, source.precision, torch.float32)(ids)[0]
    assert source.precision == QUANTISERS[kind]
    exact = all(weight.format == source.quantization.weights.get(name) for name, weight in source.weights.items())
    assert nmse(packed, floats) < (1e-9 if exact else 1e-3)
