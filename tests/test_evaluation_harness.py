"""The adapter for lm-evaluation-harness: run by the harness itself, on tasks made here, with no network."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import PARROT_TEXT, STORY_TEXTS, tiny_config

lm_eval = pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install -e ".[eval]"')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import llmfast  # noqa: E402
from llmfast.evaluation.harness import HarnessLM  # noqa: E402
from llmfast.evaluation.minimal_pairs import MinimalPair, minimal_pair_outcomes  # noqa: E402
from llmfast.evaluation.perplexity import text_perplexity  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [MinimalPair(text, " ".join(reversed(text.split()))) for text in STORY_TEXTS]
PAIRS += [MinimalPair("hello the sun the sun", STORY_TEXTS[0])]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def task(tmp_path, documents: list[dict], **config) -> dict:
    """A task of the harness over a local file."""
    file = tmp_path / f"{config['task']}.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    dataset = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
    return {"dataset_path": "json", "dataset_kwargs": dataset, "test_split": "test", "num_fewshot": 0, **config}


def evaluate(model: llmfast.LLM, task: dict) -> dict[str, float]:
    own = TaskManager(include_defaults=False)  # reading the harness's thousands of tasks takes ten seconds
    result = lm_eval.simple_evaluate(HarnessLM(model), tasks=[task], task_manager=own, bootstrap_iters=0)
    return result["results"][task["task"]]


def test_a_task_of_choices_by_the_harness(storyteller, tmp_path):
    pairs = task(
        tmp_path,
        [{"good": pair.good, "bad": pair.bad} for pair in PAIRS],
        task="pairs",
        output_type="multiple_choice",
        doc_to_text="",
        doc_to_target=0,
        doc_to_choice="{{[good, bad]}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    outcomes = minimal_pair_outcomes(storyteller, PAIRS)
    assert evaluate(storyteller, pairs)["acc,none"] == pytest.approx(sum(outcomes) / len(outcomes))
    assert 0 < sum(outcomes) < len(outcomes)


def test_bits_per_byte_by_the_harness(storyteller, tmp_path):
    text = STORY_TEXTS[3]
    rolling = task(
        tmp_path,
        [{"text": text}],
        task="rolling",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    expected = text_perplexity(storyteller, text).bits_per_byte
    assert evaluate(storyteller, rolling)["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_generated_text_by_the_harness(parrot, tmp_path):
    generating = task(
        tmp_path,
        [{"prompt": PARROT_TEXT[:20], "answer": PARROT_TEXT[20:]}, {"prompt": PARROT_TEXT[:8], "answer": "?"}],
        task="generating",
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 60},
        metric_list=[{"metric": "exact_match"}],
    )
    assert evaluate(parrot, generating)["exact_match,none"] == 0.5


def test_a_continuation_is_scored_given_its_context_and_a_text_alone_given_end_of_text(storyteller):
    context, continuation = "Once upon a time there was", " a little cat."
    scored = HarnessLM(storyteller).loglikelihood(
        requests("loglikelihood", [(context, continuation), (context + " ", continuation[1:]), ("", context)]), True
    )
    ids = [storyteller.tokenizer.encode(text) for text in (context, context + continuation)]
    # Where there is a context, nothing is put before it.
    with torch.inference_mode(), llmfast.use_backend("pytorch"):
        logits = storyteller.model(torch.tensor([ids[1][:-1]]))[0].double().log_softmax(-1)
    expected = sum(float(logits[i - 1, ids[1][i]]) for i in range(len(ids[0]), len(ids[1])))
    assert scored[0][0] == pytest.approx(expected, abs=1e-4)
    assert scored[1] == scored[0]  # the blank belongs to the word after it
    assert scored[2][0] == pytest.approx(storyteller.score(context).total, abs=1e-4)


def test_greedy_is_what_generate_would_say(parrot):
    asked = [(PARROT_TEXT[:9], PARROT_TEXT[9:]), (PARROT_TEXT[:9], PARROT_TEXT[9:-1] + "?")]
    scored = HarnessLM(parrot).loglikelihood(requests("loglikelihood", asked), True)
    assert parrot.generate(PARROT_TEXT[:9], temperature=0) == PARROT_TEXT
    assert [greedy for _, greedy in scored] == [True, False] and scored[0][0] > scored[1][0]


def test_too_long_a_context_loses_its_beginning_and_too_long_a_continuation_is_scored_whole():
    torch.manual_seed(0)

    class Letters:
        vocab_size, end_of_text = 19, 18

        def encode(self, text, allow_special=False):
            return [ord(letter) - ord("a") for letter in text]

    llm = llmfast.LLM(llmfast.GPT(tiny_config(n_positions=8)), Letters())
    harness = HarnessLM(llm)
    long, short = "abcdefghij" * 2, "kln"
    values = harness.loglikelihood(
        requests("loglikelihood", [(long, short), (long[-6:], short), ("", long), (long, short * 9)]), True
    )
    assert values[0] == pytest.approx(values[1])
    assert values[2][0] == pytest.approx(llm.score(long).total, rel=1e-5)
    assert values[3][0] < values[0][0]
    # Rolling windows share no context, and the last one is as long as the model allows.
    sequence = [18, *Letters().encode(long)]
    with torch.inference_mode():
        expected = 0.0
        for start, first, end in ((0, 1, 9), (8, 9, 17), (12, 17, 21)):
            logits = llm.model(torch.tensor([sequence[start : end - 1]]))[0].double().log_softmax(-1)
            expected += sum(float(logits[i - 1 - start, sequence[i]]) for i in range(first, end))
    rolling = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(long,), ("",)]), True)
    assert rolling == pytest.approx([expected, 0], rel=1e-5)


def test_what_is_generated_stops_where_it_is_told(parrot):
    harness = HarnessLM(parrot, batch_size=2)
    asked = [
        (PARROT_TEXT[:4], {"until": ["naïve"], "max_gen_toks": 60}),
        (PARROT_TEXT[:9], {"until": ["naïve"], "max_gen_toks": 60}),
        (PARROT_TEXT[:9], {"until": [], "max_gen_toks": 3}),
        (PARROT_TEXT[:12], {"until": ["naïve"], "max_gen_toks": 60}),
        ("x" * 99 + PARROT_TEXT[:9], {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "top_k": 1, "seed": 0}),
    ]
    texts = harness.generate_until(requests("generate_until", asked), True)
    end = PARROT_TEXT.index("naïve")
    assert texts[:2] == [PARROT_TEXT[4:end], PARROT_TEXT[9:end]] and texts[3] == PARROT_TEXT[12:end]
    assert PARROT_TEXT[9:].startswith(texts[2]) and 1 <= len(texts[2]) <= 3
    assert texts[4] and len(texts[4].encode()) <= 4  # of a prompt that had to be shortened
    with pytest.raises(ValueError, match="can't generate with num_beams"):
        harness.generate_until(requests("generate_until", [("a", {"num_beams": 2})]))


def test_the_harness_finds_the_model_by_name(storyteller_directory):
    arguments = f"pretrained={storyteller_directory},precision=fp32,backend=pytorch"
    harness = lm_eval.api.registry.get_model("llmfast").create_from_arg_string(arguments, {"batch_size": 4})
    assert harness.batch_size == 4 and harness.llm.precision == "fp32" and harness.max_length == 96
    with pytest.raises(ValueError, match="no end-of-text"):
        _ = HarnessLM(llmfast.LLM(llmfast.GPT(tiny_config()))).eot_token_id


def test_without_the_harness_one_line_says_how_to_get_it():
    code = "import sys; sys.modules['lm_eval'] = None; import llmfast.evaluation.harness"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "llmfast-kernels[eval]"' in result.stderr.splitlines()[-1]
