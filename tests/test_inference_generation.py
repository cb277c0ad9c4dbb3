"""Log-probabilities of what was generated, and biases: the same text, the model's own numbers."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from click.testing import CliRunner

import llmfast
from llmfast.backends import cpp
from llmfast.cli import cli
from llmfast.inference.decoders import CudaGraphDecoder, DecoderPool, StaticDecoder, cuda_graph
from llmfast.inference.generation import Generation
from llmfast.inference.sampling import SamplingSettings
from llmfast.inference.scoring import Window

pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = cpp.why_not("linear", torch.device("cpu"), torch.float32) is None
BACKENDS = ["pytorch", *(["auto"] if NATIVE else [])]
PROMPT = "The cat sat. The dog sat. The cat sat. The"


@pytest.fixture(scope="module", params=BACKENDS)
def llm(request) -> llmfast.LLM:
    return llmfast.load("stories", precision="fp32", backend=request.param, device="cpu")


def scored(llm: llmfast.LLM, prompt: str, generation: Generation) -> torch.Tensor:
    """What scoring says of the tokens chosen, after the same tokens."""
    ids = llm.tokenizer.encode(prompt)
    assert generation.ids.tolist() == [*ids, *(choice.id for choice in generation.choices)]
    [(_, prediction)] = llm.predictions([Window(generation.ids.tolist(), len(ids))])
    return prediction.log_probabilities


@pytest.mark.parametrize(
    "settings", [dict(temperature=0), dict(seed=3), dict(seed=3, top_k=5, repetition_penalty=1.3), dict(stop="the ")]
)
def test_the_text_is_the_same_and_the_numbers_are_those_of_score(llm, settings):
    settings = {"max_new_tokens": 24, "seed": 1} | settings
    text = llm.generate(PROMPT, **settings)
    made = llm.generate(PROMPT, logprobs=4, **settings)
    assert isinstance(made, Generation) and made.text == text
    mine = torch.tensor([choice.log_probability for choice in made.choices])
    torch.testing.assert_close(mine, scored(llm, PROMPT, made), atol=2e-4, rtol=1e-4)
    assert made.total == pytest.approx(float(mine.sum()), rel=1e-5)
    if "stop" not in settings:
        assert "".join(choice.text for choice in made.choices) == text.removeprefix(PROMPT)
    for choice in made.choices:
        found = [alternative.log_probability for alternative in choice.alternatives]
        assert len(found) == 4 and found == sorted(found, reverse=True)
        if settings.get("temperature") == 0:
            assert choice.alternatives[0].id == choice.id
            assert choice.alternatives[0].text == choice.text
            assert found[0] == choice.log_probability


def test_score_of_what_was_generated(llm):
    """`score` begins with the start token, and so does this prompt."""
    made = llm.generate(torch.tensor([llm.start_token]), max_new_tokens=30, temperature=0, logprobs=0)
    score = llm.score(made.ids[1:])
    mine = torch.tensor([choice.log_probability for choice in made.choices])
    torch.testing.assert_close(mine, score.log_probabilities, atol=2e-4, rtol=1e-4)
    assert made.total == pytest.approx(score.total, abs=1e-3)


def test_alternatives_are_the_likeliest(llm):
    made = llm.generate(PROMPT, max_new_tokens=1, temperature=0, logprobs=3)
    with llm.using_backend(), torch.inference_mode():
        ids = torch.tensor([llm.tokenizer.encode(PROMPT)])
        expected = torch.log_softmax(llm.model(ids)[0, -1].float(), -1).topk(3)
    [choice] = made.choices
    assert [a.id for a in choice.alternatives] == expected.indices.tolist()
    values = torch.tensor([a.log_probability for a in choice.alternatives])
    torch.testing.assert_close(values, expected.values, atol=1e-4, rtol=1e-4)
    assert [a.text for a in choice.alternatives] == [llm.tokenizer.decode([a.id]) for a in choice.alternatives]


def test_without_a_cache_and_guessing_ahead(llm):
    made = llm.generate(PROMPT, max_new_tokens=20, temperature=0, logprobs=1)
    again = llm.generate(PROMPT, max_new_tokens=20, temperature=0, logprobs=1, use_cache=False)
    assert again.text == made.text and again.total == pytest.approx(made.total, abs=1e-3)
    if llm.native() is not None:
        guessed = llm.generate(PROMPT, max_new_tokens=20, temperature=0, logprobs=1, speculate=5)
        plain = llm.generate(PROMPT, max_new_tokens=20, temperature=0, logprobs=1, speculate=0)
        assert guessed.choices == plain.choices and guessed.text == plain.text


def test_an_end_token_is_chosen_too(llm):
    end = llm.tokenizer.end_of_text
    made = llm.generate(PROMPT, logprobs=0, logit_bias={end: 9000}, seed=1)
    assert made.text == PROMPT
    [choice] = made.choices
    assert choice.id == end and choice.alternatives == [] and choice.log_probability < -0.1


def test_shapes(llm):
    settings = dict(max_new_tokens=5, seed=1, logprobs=1)
    pair = llm.generate(["The cat", "A dog ran"], **settings)
    plain = llm.generate(["The cat", "A dog ran"], max_new_tokens=5, seed=1)
    assert [made.text for made in pair] == plain
    for prompt, made in zip(["The cat", "A dog ran"], pair, strict=True):
        mine = torch.tensor([choice.log_probability for choice in made.choices])
        torch.testing.assert_close(mine, scored(llm, prompt, made), atol=2e-4, rtol=1e-4)
    several = llm.generate(["The cat", "A dog"], num_return_sequences=2, **settings)
    assert [len(group) for group in several] == [2, 2]
    assert [len(made.choices) for made in itertools.chain(*several)] == [5] * 4
    assert llm.generate([], logprobs=1) == []
    ids = torch.tensor(llm.tokenizer.encode("The cat"))
    made = llm.generate(ids, **settings)
    assert made.text is None and torch.equal(made.ids, llm.generate(ids, max_new_tokens=5, seed=1))
    rows = llm.generate(ids.repeat(2, 1), **settings)
    assert [len(row.choices) for row in rows] == [5, 5] and torch.equal(rows[0].ids, made.ids)


def test_a_stream_has_them_as_they_come(llm):
    settings = dict(max_new_tokens=8, temperature=0)
    made = llm.generate(PROMPT, logprobs=2, **settings)
    stream = llm.stream(PROMPT, logprobs=2, **settings)
    for _ in stream:
        assert len(stream.choices) == stream.tokens > 0
    assert stream.choices == made.choices
    assert llm.stream(PROMPT, **settings).choices == []


# --- biases -----------------------------------------------------------------------------------------------------------


def test_a_bias_of_minus_infinity_rules_out_and_a_large_one_decides(llm):
    settings = dict(max_new_tokens=12, temperature=0)
    text = llm.generate(PROMPT, **settings)
    first = llm.tokenizer.encode(text)[len(llm.tokenizer.encode(PROMPT))]
    made = llm.generate(PROMPT, logprobs=2, logit_bias={first: -math.inf}, **settings)
    assert first not in [choice.id for choice in made.choices]
    assert made.choices[0].id == made.choices[0].alternatives[1].id  # the model's own numbers know of no bias
    [word] = llm.tokenizer.encode("x")
    for sampling in (dict(temperature=0), dict(temperature=1.0, seed=1), dict(repetition_penalty=1.1, seed=1)):
        made = llm.generate(PROMPT, logprobs=0, max_new_tokens=3, logit_bias={word: 100.0}, **sampling)
        assert [choice.id for choice in made.choices] == [word] * 3
    assert (
        llm.generate(PROMPT, logit_bias={}, **settings) == text == llm.generate(PROMPT, logit_bias={5: 0}, **settings)
    )


def test_a_bias_shifts_the_odds(llm):
    """Adding ln 3 to a logit multiplies its odds by 3."""
    plain = llm.generate(PROMPT, max_new_tokens=1, temperature=0, logprobs=2).choices[0].alternatives
    rival = plain[1].id
    gap = plain[0].log_probability - plain[1].log_probability
    for more, expected in ((gap - 0.01, plain[0].id), (gap + 0.01, rival)):
        made = llm.generate(PROMPT, max_new_tokens=1, temperature=0, logprobs=0, logit_bias={rival: more})
        assert made.choices[0].id == expected


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(logprobs=-1), "logprobs must be an integer from 0 to 100"),
        (dict(logprobs=101), "logprobs must be an integer from 0 to 100"),
        (dict(logprobs=True), "logprobs must be an integer"),
        (dict(logit_bias=[1]), "logit_bias must be"),
        (dict(logit_bias={-1: 2.0}), "logit_bias must be"),
        (dict(logit_bias={"a": 2.0}), "logit_bias must be"),
        (dict(logit_bias={1: math.nan}), "logit_bias must be numbers"),
        (dict(logit_bias={1: math.inf}), "logit_bias must be numbers"),
        (dict(logit_bias={1: "x"}), "logit_bias must be numbers"),
        (dict(logit_bias={10**6: 1.0}), "logit_bias has token 1000000, and the vocabulary only"),
    ],
)
def test_what_cannot_be_is_said(llm, settings, words):
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=words) as caught:
            call("The", **settings)
        assert "\n" not in str(caught.value)


def test_settings_do_not_change_with_the_dictionary_they_were_made_from():
    bias = {1: 2.0}
    settings = SamplingSettings(logit_bias=bias)
    bias[2] = 3.0
    assert settings.logit_bias == {1: 2.0}


def test_a_recorded_step_is_not_asked(monkeypatch):
    """A CUDA graph chooses by the settings alone; the decoder for observed and biased texts runs eagerly."""
    llm = llmfast.load("stories", precision="fp32", backend="pytorch", device="cpu")
    monkeypatch.setattr(cuda_graph, "why_not", lambda model: None)
    llm.runner._recorded = DecoderPool(StaticDecoder)
    assert isinstance(llm.runner.decoder(1, 8, keep_recorded=True), StaticDecoder)
    plain = llm.generate(PROMPT, max_new_tokens=5, temperature=0)
    made = llm.generate(PROMPT, max_new_tokens=5, temperature=0, logprobs=1)
    assert made.text == plain and len(made.choices) == 5
    other = llm.generate(PROMPT, max_new_tokens=5, temperature=0, logit_bias={made.choices[0].id: -math.inf})
    assert other != plain
    assert CudaGraphDecoder is not StaticDecoder


# --- forms, and the command line --------------------------------------------------------------------------------------


def test_text_of_a_form_has_the_models_own_probabilities(llm):
    pytest.importorskip("llguidance")
    made = llm.generate("The cat", regex=" (sat|ran)!", logprobs=1, temperature=0)
    assert made.text in ("The cat sat!", "The cat ran!")
    mine = torch.tensor([choice.log_probability for choice in made.choices])
    torch.testing.assert_close(mine, scored(llm, "The cat", made), atol=2e-4, rtol=1e-4)


def test_the_command_line():
    run = CliRunner().invoke(
        cli, ["generate", "The cat", "-n", "3", "-t", "0", "--precision", "fp32", "--logprobs", "2", "--json"]
    )
    assert run.exit_code == 0, run.output
    record = json.loads(run.stdout)
    [choices] = record["choices"]
    assert "The cat" + "".join(choice["text"] for choice in choices) == record["texts"][0]
    assert len(choices) == 3 and {*choices[0]} == {"id", "text", "log_probability", "alternatives"}
    assert choices[0]["alternatives"][0] == {key: choices[0][key] for key in ("id", "text", "log_probability")}
    first = choices[0]["id"]
    run = CliRunner().invoke(
        cli, ["generate", "The cat", "-n", "3", "-t", "0", "--precision", "fp32", "--logit-bias", f"{first}=-inf"]
    )
    assert run.exit_code == 0 and record["texts"][0] not in run.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--logprobs", "200", "--json"], "logprobs must be an integer from 0 to 100"),
        (["--logit-bias", "5"], "ID=NUMBER"),
        (["--logit-bias", "a=5"], "ID=NUMBER"),
        (["--logit-bias", "5=nan"], "must be numbers"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words):
    run = CliRunner().invoke(cli, ["generate", "The cat", "-n", "3", *arguments])
    assert run.exit_code == 2 and words in run.output and "Traceback" not in run.output
