"""Perplexity against its definition, computed a document or a token at a time, and `llmfast eval perplexity`."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner
from conftest import PARROT_TEXT, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import llmfast
from llmfast.cli import cli
from llmfast.evaluation.perplexity import (
    Perplexity,
    document_perplexity,
    documents_perplexity,
    loses_text,
    text_perplexity,
)
from llmfast.inference.decoders import EagerReader
from llmfast.inference.scoring import half_overlapping
from llmfast.tokenizers import BPETokenizer
from llmfast.training.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

END = 18
DOCUMENTS = st.lists(st.tuples(st.lists(st.integers(0, 17), max_size=30), st.integers(1, 50)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model() -> llmfast.GPT:
    torch.manual_seed(0)
    return llmfast.GPT(tiny_config(n_positions=8, initializer_range=0.5)).eval()


def direct(model: llmfast.GPT, documents) -> tuple[float, int]:
    """Every document from an end-of-text to its own, in blocks of a context that share nothing but their border."""
    nats, tokens, context = 0.0, 0, model.config.n_positions
    for ids, _ in documents:
        sequence = [END, *ids, END]
        for start in range(0, len(sequence) - 1, context):
            block = sequence[start : start + context + 1]
            with torch.inference_mode(), llmfast.use_backend("pytorch"):
                logits = model(torch.tensor([block[:-1]]))[0].double()
            nats -= float(torch.log_softmax(logits, -1).gather(1, torch.tensor(block[1:])[:, None]).sum())
            tokens += len(block) - 1
    return nats, tokens


@settings(max_examples=30)
@given(DOCUMENTS, st.sampled_from([1, 20, 8192]))
def test_it_is_what_the_definition_says_however_the_blocks_are_batched(model, documents, tokens_per_batch):
    nats, tokens = direct(model, documents)
    result = document_perplexity(EagerReader(model), documents, END, tokens_per_batch)
    assert result.tokens == tokens == sum(len(ids) + 1 for ids, _ in documents)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.bytes == sum(length for _, length in documents)


def test_every_backend_measures_the_same(model, place):
    backend, device = place
    documents = [([1, 2, 3], 9), ([4] * 20, 30)]
    moved = llmfast.GPT(model.config).to(device).eval()
    moved.load_state_dict(model.state_dict())
    with llmfast.use_backend(backend):
        result = document_perplexity(EagerReader(moved), documents, END)
    assert result.nats == pytest.approx(direct(model, documents)[0], rel=1e-4)


def test_the_numbers_it_is_stated_by():
    measured = Perplexity(nats=20.0, tokens=10, bytes=40)
    assert measured.nats_per_token == 2.0
    assert measured.perplexity == pytest.approx(math.exp(2))
    assert measured.bits_per_byte == pytest.approx(20 / math.log(2) / 40)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = llmfast.GPT(tiny_config(initializer_range=1e-6)).eval()
    assert document_perplexity(EagerReader(model), [([1, 2, 3], 3)], END).perplexity == pytest.approx(19, rel=1e-3)


def test_a_trained_model_finds_its_text_less_surprising_than_noise(parrot):
    ids = parrot.tokenizer.encode("The ☃ said: naïve")
    text = document_perplexity(EagerReader(parrot.model), [(ids, 20)], parrot.tokenizer.end_of_text)
    noise = document_perplexity(EagerReader(parrot.model), [(ids[::-1], 20)], parrot.tokenizer.end_of_text)
    assert text.nats_per_token < 0.5 * noise.nats_per_token


# --- texts, through a whole LLM -------------------------------------------------------------------------------------


class Characters:
    """A tokenizer without an end of text, and with one token for all that is not a small letter."""

    kind = "letters"
    special_tokens: ClassVar[dict[str, int]] = {}
    vocab_size = 27
    end_of_text = None

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        return [max(0, ord(letter) - 96) if letter <= "z" else 0 for letter in text]

    def decode_bytes(self, ids) -> bytes:
        return "".join("é" if i == 0 else chr(96 + i) for i in ids).encode()

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode()

    def save(self, directory) -> None: ...


def test_a_text_scored_with_a_sliding_window_agrees_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["a sliding window over a text"] * 3, 280)
    config = tiny_config(vocab_size=tokenizer.vocab_size, n_positions=12, bos_token_id=tokenizer.end_of_text)
    llmfast.LLM(llmfast.GPT(config), tokenizer).save_pretrained(tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    text = "a text longer than the window: ☃ over and over, sliding"
    sequence = [tokenizer.end_of_text, *tokenizer.encode(text)]

    for stride in (1, 5, 12):
        nats = 0.0
        for token in range(1, len(sequence)):
            # A token is predicted in the first window that reaches it; windows start at multiples of the stride.
            start = max(0, -(-(token - 12) // stride)) * stride
            with torch.inference_mode():
                logits = peer(torch.tensor([sequence[start:token]])).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[sequence[token]])
        for llm in (
            llmfast.load(tmp_path, precision="fp32"),
            llmfast.load(tmp_path, precision="fp32", backend="pytorch", device="cpu"),
        ):
            result = text_perplexity(llm, text, stride)
            assert result.nats == pytest.approx(nats, rel=1e-5)
            assert (result.tokens, result.bytes) == (len(sequence) - 1, len(text.encode()))


def test_a_text_has_the_total_of_its_score(storyteller):
    text = "Once upon a time there was a cat. " * 9
    stride = half_overlapping(storyteller.config.n_positions)
    assert text_perplexity(storyteller, text, stride).nats == pytest.approx(-storyteller.score(text).total, rel=1e-5)


def test_more_context_is_not_worse_for_a_model_that_uses_it(parrot):
    text = PARROT_TEXT
    blocks, sliding = (text_perplexity(shortened(parrot, 16), text, stride).nats for stride in (16, 1))
    assert sliding < blocks


def shortened(llm: llmfast.LLM, context: int) -> llmfast.LLM:
    """The same model with a shorter context."""
    model = llmfast.GPT(replace(llm.config, n_positions=context))
    state = llm.model.state_dict()
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:context]
    model.load_state_dict(state)
    return llmfast.LLM(model, llm.tokenizer)


def test_without_an_end_of_text_the_first_token_is_context_and_its_bytes_do_not_count():
    torch.manual_seed(0)
    llm = llmfast.LLM(llmfast.GPT(tiny_config(vocab_size=27)), Characters())
    result = text_perplexity(llm, "éabc")
    assert (result.tokens, result.bytes) == (3, 3)
    assert result.nats == pytest.approx(-llm.score("éabc").total, rel=1e-5)
    both = documents_perplexity(llm, ["éabc", "xy"])
    assert (both.tokens, both.bytes) == (4, 4)
    assert both.nats == pytest.approx(-llm.score("éabc").total - llm.score("xy").total, rel=1e-5)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_anything_to_predict_is_an_error(text):
    llm = llmfast.LLM(llmfast.GPT(tiny_config(vocab_size=27)), Characters())
    with pytest.raises(ValueError, match="too short"):
        text_perplexity(llm, text)


def test_a_tokenizer_that_loses_text_is_noticed(parrot):
    assert loses_text(Characters(), "ab c") and not loses_text(Characters(), "abéc")
    assert not loses_text(parrot.tokenizer, PARROT_TEXT + "\r\n\x00")


def test_documents_are_what_document_perplexity_says(storyteller):
    documents = ["The cat.", "☃", "A dog liked to run in the park."]
    encoded = [(storyteller.tokenizer.encode(each), len(each.encode())) for each in documents]
    expected = document_perplexity(EagerReader(storyteller.model), encoded, storyteller.tokenizer.end_of_text)
    result = documents_perplexity(storyteller, documents)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    assert result.nats == pytest.approx(expected.nats, rel=1e-5)


# --- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(cli, ["eval", "perplexity", *map(str, arguments)])


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("The cat was happy.\n<|endoftext|>\nThe dog ran.\n<|endoftext|>\n\n<|endoftext|>\nThe sun.\n")
    return path


def test_the_command_scores_a_text(storyteller, storyteller_directory, tmp_path):
    text = "The cat was happy.\nThe sun was warm."
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    result = run(storyteller_directory, tmp_path / "text.txt", "--precision", "fp32", "--stride", 10, "--json")
    assert result.exit_code == 0, result.output
    facts, expected = json.loads(result.stdout), text_perplexity(storyteller, text, 10)
    assert facts["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert facts["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert (facts["tokens"], facts["bytes"], facts["stride"]) == (expected.tokens, len(text), 10)
    assert facts["lossless"] and facts["first_token"] == "predicted from end-of-text"


def test_the_command_scores_documents_and_the_last_of_them(storyteller, storyteller_directory, stories):
    parts = ["The cat was happy.", "The dog ran.", "The sun."]
    for last in (None, 2):
        arguments = () if last is None else ("--last", last)
        result = run(storyteller_directory, stories, "--documents", *arguments, "--precision", "fp32")
        chosen = parts[-last:] if last else parts
        expected = documents_perplexity(storyteller, chosen)
        assert result.exit_code == 0 and f"{expected.nats_per_token:.4f}" in result.stdout
        assert re.search(rf"documents +{len(chosen)}\b", result.stdout)


def test_the_command_scores_what_prepared_data_keep_out_of_training(storyteller, storyteller_directory, tmp_path):
    text = "The cat was happy. " * 9 + "The dog ran. The sun was warm"
    (tmp_path / "text.txt").write_text(text)
    manifest = prepare([tmp_path / "text.txt"], tmp_path / "data", "bpe", 260, validation=0.3)
    kept_out = text[-manifest.splits["validation"].bytes :]
    result = run(storyteller_directory, tmp_path / "data", "--precision", "fp32", "--json")
    assert result.exit_code == 0, result.output
    expected = text_perplexity(storyteller, kept_out)
    assert json.loads(result.stdout)["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert json.loads(result.stdout)["bytes"] == len(kept_out) and result.stderr == ""
    prepare([tmp_path / "text.txt"], tmp_path / "lossy", "word", 8, validation=0.3)
    assert "can't give all of its text back" in run(storyteller_directory, tmp_path / "lossy").stderr


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_that_gives_no_probabilities_has_no_perplexity(precision, storyteller_directory, stories, tmp_path):
    shutil.copytree(storyteller_directory, tmp_path / "poisoned")
    tensors = load_file(tmp_path / "poisoned" / "model.safetensors")
    tensors["transformer.ln_f.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "The cat was.", "sentence_bad": "The was cat."}\n')
    for command in (
        ["perplexity", stories],
        ["perplexity", stories, "--documents"],
        ["blimp", tmp_path / "pairs.jsonl"],
    ):
        name, file, *options = map(str, command)
        arguments = ["eval", name, str(tmp_path / "poisoned"), file, *options, "--precision", precision, "--json"]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2 and result.stdout == "" and "logits are not finite" in result.stderr, result.output
        assert len([line for line in result.stderr.splitlines() if not line.startswith("note")]) == 1


def test_a_file_has_as_many_tokens_in_evaluation_as_in_training(storyteller_directory, tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffThe cat was happy.\r\nThe sun was warm.\r\n".encode("utf-16-le") * 9)
    data = prepare([tmp_path / "text.txt"], tmp_path / "data", storyteller_directory, validation=0)
    result = run(storyteller_directory, tmp_path / "text.txt", "--precision", "fp32", "--json")
    assert json.loads(result.stdout)["tokens"] + 1 == data.splits["train"].tokens  # which has an end-of-text too


def test_the_command_says_what_it_does_not_take(storyteller_directory, stories, tmp_path):
    assert "--documents scores what is between" in run(storyteller_directory, stories).stderr
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_text(" <|endoftext|> ")
    for arguments, message in [
        ((stories, "--last", 2), "--last counts documents"),
        ((stories, "--documents", "--last", 4), "holds 3 documents, fewer than --last 4"),
        ((stories, "--documents", "--stride", 97), "context of 96 tokens, got 97"),
        ((tmp_path / "bytes",), "bytes is not utf-8: byte 3"),
        ((tmp_path / "empty",), "empty is empty"),
        ((tmp_path / "blank", "--documents"), "too short"),
        ((tmp_path / "missing",), "No such file"),
        ((tmp_path,), "a directory without prepared data"),
    ]:
        result = run(storyteller_directory, *arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
