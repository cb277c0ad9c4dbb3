"""Whole fine-tuning runs: what they write and what they leave as it was, and that a stopped one goes on the same."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import llmfast
from llmfast.cli import cli
from llmfast.cli.common import resume_command
from llmfast.finetuning.answers import Answer, Question
from llmfast.finetuning.classifier import Classifier
from llmfast.finetuning.configuration import FinetuningConfig
from llmfast.finetuning.confusion import Confusion
from llmfast.finetuning.merging import merge
from llmfast.finetuning.page import write_page
from llmfast.finetuning.run import finetune
from llmfast.training import checkpoints
from llmfast.training.trainer import Trainer
from llmfast.weights.adapter import WEIGHTS
from llmfast.weights.quantizing import quantize_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"precision": "fp32", "device": "cpu", "batch_size": 8, "lr": 1e-2, "warmup": 2, "rank": 4, "max_tokens": 64}


def tuned(model, file, out, **changes):
    return finetune(model, file, out, changes=QUICK | changes, quiet=True)


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"instruction": f"Who is friend {i % 4}?", "output": f"It is Tom {i % 4}.", "turn": f"{i}"} for i in range(40)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.fixture
def labelled(tmp_path):
    rng = random.Random(0)
    words = {"good": ["sun", "happy", "cat", "sing"], "bad": ["rain", "sad", "dog", "cry"]}
    lines = [f"{label},{' '.join(rng.choices(words[label], k=4))}" for _ in range(40) for label in words]
    path = tmp_path / "moods.csv"
    path.write_text("label,text\n" + "\n".join(lines) + "\n", "utf-8")
    return path


def evaluation(out):
    return json.loads((out / "evaluation.json").read_text())


# --- adapters -----------------------------------------------------------------------------------------------------


def test_a_chat_is_learned_and_the_result_is_a_model_by_itself(storyteller_directory, chats, tmp_path, capsys):
    out = tmp_path / "mine"
    changes = QUICK | {"epochs": 12.0, "validation": 0.2}
    (tmp_path / "other.txt").write_text("Once upon a time there was a little cat. " * 9, "utf-8")
    outcome = finetune(storyteller_directory, chats, out, changes=changes | {"also": str(tmp_path / "other.txt")})
    found = evaluation(out)
    assert found["after"]["also"]["perplexity"] > found["before"]["also"]["perplexity"]  # so much of it is forgotten
    assert found["after"]["validation"]["loss"] < 0.2 < 1 < found["before"]["validation"]["loss"]
    assert outcome.validation["loss"] == pytest.approx(found["after"]["validation"]["loss"])
    llm = llmfast.load(out, precision="fp32", device="cpu")
    assert (
        llm.chat([{"role": "user", "content": "Who is friend 3?"}], temperature=0, max_new_tokens=16) == "It is Tom 3."
    )
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", WEIGHTS, "chat_template.jinja", "run.json"}
    assert not (out / "model.safetensors").exists()
    shown = capsys.readouterr().err
    assert "parameters are trained" in shown and "step 0: validation loss" in shown
    assert f"llmfast chat --model {out}" in shown
    assert found["after"]["answers"] == {"exact_match": 1.0, "rouge_l": 1.0, "count": 8}
    assert found["before"]["answers"]["rouge_l"] < 0.5
    page = (out / "report.html").read_text()
    assert page.count('<td class="text">It is Tom') >= 16 and "exact match" in page and "<script" not in page
    for path in checkpoints.found(out / "checkpoints"):  # which hold what is trained, and nothing else
        assert all(".adapter." in name for name in load_file(path / "trained.safetensors"))


def test_a_text_is_learned(storyteller_directory, tmp_path):
    (tmp_path / "a.txt").write_text("The queen of the hill sang to the sea. " * 60, "utf-8")
    out = tmp_path / "book"
    tuned(storyteller_directory, tmp_path / "a.txt", out, test=0.1)
    found = evaluation(out)
    assert set(found["after"]) == {"validation", "test"}
    assert all(found["after"][part]["loss"] < 0.5 * found["before"][part]["loss"] for part in found["after"])
    likely = [
        llmfast.load(model, precision="fp32", device="cpu").score("The queen of the hill sang to the sea.").total
        for model in (storyteller_directory, out)
    ]
    assert likely[1] > 0.5 * likely[0]


@pytest.mark.parametrize("base", ["floats", "q4_1"])
def test_bottlenecks_are_learned_beside_the_model(base, storyteller_directory, chats, tmp_path):
    if base == "q4_1":
        quantize_checkpoint(storyteller_directory, tmp_path / "small", base)
    out, model = tmp_path / "mine", tmp_path / "small" if base == "q4_1" else storyteller_directory
    tuned(model, chats, out, method="adapter", bottleneck=16, epochs=18.0, lr=2e-2, validation=0.2, base=base)
    found = evaluation(out)
    assert found["after"]["validation"]["loss"] < 0.2 < 1 < found["before"]["validation"]["loss"]
    assert found["after"]["answers"]["exact_match"] == 1.0
    question = [{"role": "user", "content": "Who is friend 3?"}]
    for llm in (llmfast.load(out, device="cpu"), llmfast.load(model, device="cpu", adapter=out)):
        assert llm.chat(question, temperature=0, max_new_tokens=16) == "It is Tom 3."
    for path in checkpoints.found(out / "checkpoints"):
        assert all(".adapter." in name for name in load_file(path / "trained.safetensors"))


@pytest.mark.parametrize("method", ["full", "last-layers"])
def test_weights_of_its_own_make_a_whole_model(method, storyteller, storyteller_directory, chats, tmp_path):
    out = tmp_path / "whole"
    tuned(storyteller_directory, chats, out, method=method, layers=1, lr=5e-3, epochs=8.0)
    found = evaluation(out)["after"]["validation"]["loss"]
    assert found < 0.7 * evaluation(out)["before"]["validation"]["loss"]
    before, after = load_file(storyteller_directory / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = {name for name in before if ".h.1." in name or ".ln_f." in name}
    assert changed == (last if method == "last-layers" else set(before))
    kept = load_file(checkpoints.found(out / "checkpoints")[-1] / "trained.safetensors")
    assert len(kept) == len(changed)
    assert llmfast.load(out, device="cpu").generate("The", max_new_tokens=3) != ""


def test_half_precision_trains_float32_adapters(storyteller_directory, chats, tmp_path):
    with llmfast.use_backend("auto"):
        tuned(storyteller_directory, chats, tmp_path / "a", precision="bf16", epochs=6.0)
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.float32}
    found = evaluation(tmp_path / "a")
    assert found["after"]["validation"]["loss"] < 0.5 * found["before"]["validation"]["loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_of_weights_have_learning_rates_of_their_own(optimizer, storyteller_directory, labelled, tmp_path):
    """With a factor of 0 a group stays what it was; the others learn."""
    changed = {}
    for scales in ("adapter_a=0", "head=0,adapter_b=2"):
        out = tmp_path / scales
        tuned(storyteller_directory, labelled, out, lr_scales=scales, steps=4, optimizer=optimizer, checkpoint_every=1)
        first, last = (
            load_file(checkpoints.directory_of(out / "checkpoints", n) / "trained.safetensors") for n in (3, 4)
        )
        changed[scales] = {
            "head" if n == "score.weight" else n.rpartition(".")[2] for n in first if not torch.equal(first[n], last[n])
        }
    assert changed == {"adapter_a=0": {"b", "head"}, "head=0,adapter_b=2": {"a", "b"}}


def test_a_factor_is_one_of_the_learning_rate(storyteller_directory, labelled, tmp_path):
    """Plain descent by one step: from zero, B goes twice as far."""
    states = []
    for factor in (1, 2):
        out = tmp_path / str(factor)
        changes = {"lr_scales": f"adapter_b={factor}", "optimizer": "sgd", "steps": 1, "warmup": 0, "clip": 0.0}
        tuned(storyteller_directory, labelled, out, **changes)
        states.append(load_file(checkpoints.found(out / "checkpoints")[-1] / "trained.safetensors"))
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], 2 * tensor if name.endswith(".b") else tensor), name


# --- stopped and resumed ------------------------------------------------------------------------------------------


def files_of(out):
    names = [WEIGHTS, "evaluation.json", "training.json"]
    newest = checkpoints.found(out / "checkpoints")[-1]
    return {n: (out / n).read_bytes() for n in names} | {
        n: (newest / n).read_bytes() for n in ("trained.safetensors", "optimizer.safetensors")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_dropout": 0.3, "accumulation": 2, "precision": "bf16"},
        {"method": "adapter", "activation_checkpointing": True},
    ],
)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    changes, storyteller_directory, chats, tmp_path, monkeypatch
):
    settings = {"epochs": 3.0, "checkpoint_every": 2} | changes
    tuned(storyteller_directory, chats, tmp_path / "one", **settings)
    step = Trainer.step

    def dies(self):
        if self.steps_done == 7:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            tuned(storyteller_directory, chats, tmp_path / "two", **settings)
    assert checkpoints.found(tmp_path / "two" / "checkpoints")[-1].name == "step-000006"
    finetune(None, None, tmp_path / "two", resume=True, quiet=True)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


def started(*arguments, count=1):
    """`llmfast finetune` in processes of its own, as `torchrun` starts them; one of them by itself."""
    call = ["-m", "llmfast", "finetune", *map(str, arguments), "-q"]
    if count > 1:
        call = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *call]
    environment = os.environ | {"PYTHONPATH": str(Path(llmfast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *call], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def settings_of(**changes):
    return [part for name, value in (QUICK | changes).items() for part in ("--set", f"{name}={value}")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that can't be caught")
def test_a_run_that_was_killed_goes_on_with_the_same_bits(storyteller_directory, chats, tmp_path):
    settings = settings_of(epochs=12.0, checkpoint_every=3, lora_dropout=0.2, validation=0.2, answers=0)
    one, two = tmp_path / "one", tmp_path / "two"
    begin = [storyteller_directory, chats, *settings]
    whole, killed = started(*begin, "--out", one), started(*begin, "--out", two)
    until = time.monotonic() + 120
    while not checkpoints.found(two / "checkpoints") and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (two / "evaluation.json").exists()
    assert whole.wait(120) == 0, whole.stderr.read()
    resumed = started("--out", two, "--resume")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    assert files_of(one) == files_of(two)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs processes that talk to each other")
@pytest.mark.parametrize("task", ["chats", "labelled"])
def test_two_processes_learn_what_one_does(task, storyteller_directory, request, tmp_path):
    file = request.getfixturevalue(task)
    settings = settings_of(epochs=2.0, validation=0.2, answers=0)
    runs = {}
    for count, more in ((1, []), (2, ["--parallel", "ddp"])):
        out = tmp_path / str(count)
        run = started(storyteller_directory, file, "--out", out, *settings, *more, count=count)
        assert run.wait(240) == 0, run.stderr.read()
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        runs[count] = [row["loss"] for row in rows if "loss" in row], load_file(out / WEIGHTS)
    assert len(runs[1][0]) > 4 and runs[2][0] == pytest.approx(runs[1][0], abs=1e-4)
    for name, tensor in runs[1][1].items():
        torch.testing.assert_close(runs[2][1][name], tensor, atol=2e-3, rtol=0)


def test_weights_are_not_shared_between_processes(chats, tmp_path):
    with pytest.raises(ValueError, match="shares its batches between processes, not its weights: --parallel ddp"):
        finetune("stories", chats, tmp_path / "x", parallel="fsdp")


def test_a_resumed_run_is_the_same_run(storyteller_directory, chats, tmp_path):
    out = tmp_path / "a"
    tuned(storyteller_directory, chats, out, epochs=1.0)
    with pytest.raises(ValueError, match="can't change rank from 4 to 8"):
        finetune(None, None, out, changes={"rank": 8}, resume=True, quiet=True)
    before = len((out / "metrics.jsonl").read_text().splitlines())
    finetune(None, None, out, changes={"steps": 8}, resume=True, quiet=True)
    assert len((out / "metrics.jsonl").read_text().splitlines()) > before
    chats.write_text(chats.read_text() + "\n")
    with pytest.raises(ValueError, match="is not what the run in .* was started with"):
        finetune(None, None, out, resume=True, quiet=True)
    with pytest.raises(ValueError, match="holds a run already"):
        tuned(storyteller_directory, chats, out)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        finetune(None, None, tmp_path / "none", resume=True)
    (out / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="it is a run of `llmfast train`"):
        finetune(None, None, out, resume=True)


def test_a_run_stops_when_it_has_waited_enough_and_keeps_the_best(storyteller_directory, chats, tmp_path, monkeypatch):
    evaluate, losses = Trainer.evaluate, iter([5.0, 3.0, 2.0, 4.0, 2.5, 1.0, 1.0])

    def scripted(self, batches):
        result = evaluate(self, batches)
        return type(result)(next(losses) * result.tokens, result.tokens)

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    outcome = tuned(storyteller_directory, chats, tmp_path / "a", epochs=9.0, patience=2)
    assert outcome.step == 4 * 5 and outcome.validation["step"] == 2 * 5 and outcome.validation["loss"] == 2.0
    assert json.loads((tmp_path / "a" / "training.json").read_text())["step"] == 10


@pytest.mark.parametrize("method", ("lora", "full"))
def test_a_run_that_only_does_harm_leaves_what_there_was(method, storyteller_directory, tmp_path):
    teller = llmfast.load(storyteller_directory, precision="fp32", device="cpu")
    said = "".join(teller.generate(who, temperature=0, max_new_tokens=30) for who in ("Tom", "Lily", "The cat"))
    (tmp_path / "own.txt").write_text(said * 20, "utf-8")  # nobody says it better
    changes = {"method": method, "lr": 3.0, "steps": 1, "warmup": 0}
    outcome = tuned(storyteller_directory, tmp_path / "own.txt", tmp_path / "a", **changes)
    found = evaluation(tmp_path / "a")
    assert outcome.validation["step"] == 0 and found["after"]["validation"] == found["before"]["validation"]
    tuned_teller = llmfast.load(tmp_path / "a", precision="fp32", device="cpu")
    assert tuned_teller.score("Tom has a cat.").total == pytest.approx(teller.score("Tom has a cat.").total, rel=1e-4)


# --- classifiers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "lr"), [("lora", 1e-2), ("adapter", 1e-2), ("head", 5e-2), ("last-layers", 5e-3), ("full", 5e-3)]
)
def test_classes_are_told_apart(method, lr, storyteller_directory, labelled, tmp_path):
    out = tmp_path / "moods"
    pooling = "last" if method == "lora" else "both"  # peft's model reads the last token
    tuned(storyteller_directory, labelled, out, method=method, layers=1, lr=lr, epochs=10.0, test=0.2, pooling=pooling)
    assert evaluation(out)["before"]["test"]["accuracy"] > 0.6  # of a head that suits the model as it is
    found = evaluation(out)["after"]["test"]
    assert found["accuracy"] > 0.8 and found["classes"]["good"]["texts"] + found["classes"]["bad"]["texts"] == 16
    assert sum(map(sum, found["confusion"])) == 16
    classifier = Classifier.load(out, precision="fp32", device="cpu")
    verdicts = classifier.classify(["happy sun sing cat", "cry rain sad dog", "sun sun cat happy"])
    assert [verdict.label for verdict in verdicts] == ["good", "bad", "good"]
    assert all(sum(v.probabilities.values()) == pytest.approx(1) and v.confidence > 0.5 for v in verdicts)
    assert classifier.classify("happy sun sing cat").confidence == pytest.approx(verdicts[0].confidence, rel=1e-4)
    with pytest.raises(ValueError, match="text 2: its text is empty"):
        classifier.classify(["x", " "])
    if method != "lora":
        return
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(storyteller_directory, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    ids = torch.tensor([[classifier.tokenizer.end_of_text, *classifier.tokenizer.encode("happy sun sing cat")]])
    with torch.no_grad():
        chances = theirs(ids).logits.softmax(-1)[0]
    assert float(chances[1]) == pytest.approx(verdicts[0].probabilities["good"], abs=1e-4)


def test_a_merged_classifier_is_the_same_classifier(storyteller_directory, labelled, tmp_path):
    tuned(storyteller_directory, labelled, tmp_path / "a", epochs=2.0)
    merge(tmp_path / "a", tmp_path / "b")
    one, other = (Classifier.load(tmp_path / name, precision="fp32", device="cpu") for name in "ab")
    texts = ["happy sun sing cat", "cry rain sad dog"]
    for verdict, merged in zip(one.classify(texts), other.classify(texts), strict=True):
        assert merged.probabilities == pytest.approx(verdict.probabilities, rel=1e-3)


def test_a_classifier_that_is_not_whole_is_refused(storyteller_directory, labelled, tmp_path):
    with pytest.raises(FileNotFoundError, match="no classifier in"):
        Classifier.load(storyteller_directory)
    out = tmp_path / "a"
    tuned(storyteller_directory, labelled, out, epochs=1.0)
    (out / "classifier.json").write_text('{"labels": ["x", "y", "z"], "max_tokens": 9}')
    with pytest.raises(ValueError, match="no head for its 3 labels"):
        Classifier.load(out)
    (out / "classifier.json").write_text('{"labels": ["x"], "max_tokens": 9}')
    with pytest.raises(ValueError, match="should hold a list of labels, max_tokens, and a pooling"):
        Classifier.load(out)


def test_a_confusion_table_says_how_often_each_class_was_right():
    confusion = Confusion.of(("ham", "spam"), [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0])
    assert confusion.counts.tolist() == [[2, 1], [1, 3]]
    assert confusion.accuracy == 5 / 7 and confusion.precision(1) == 3 / 4 and confusion.recall(0) == 2 / 3
    assert confusion.macro_f1 == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert confusion.table().splitlines() == [
        "      → ham  → spam  precision  recall",
        "ham       2       1      66.7%   66.7%",
        "spam      1       3      75.0%   75.0%",
    ]
    empty = Confusion.of(("a", "b"), [0], [0])
    assert empty.recall(1) == empty.precision(1) == 0 and math.isfinite(empty.macro_f1)


# --- the command line ---------------------------------------------------------------------------------------------


def invoke(*arguments, **options):
    return CliRunner().invoke(cli, [str(a) for a in arguments], **options)


def test_from_a_table_to_its_classes_at_the_command_line(storyteller_directory, labelled, tmp_path):
    settings = [f"--set={name}={value}" for name, value in (QUICK | {"test": 0.2}).items()]
    made = invoke(
        "finetune", storyteller_directory, labelled, "--out", tmp_path / "m", "--epochs", 8, *settings, "--json"
    )
    assert made.exit_code == 0, made.output
    assert "→ bad" in made.stderr and json.loads(made.stdout)["step"] == 8 * 7
    said = invoke("classify", tmp_path / "m", labelled)
    assert said.exit_code == 0 and "are right" in said.stderr and len(said.stdout.splitlines()) == 80
    said = invoke("classify", tmp_path / "m", "-", "--json", input="sun cat happy\n\nrain rain cry\n")
    assert [json.loads(line)["label"] for line in said.stdout.splitlines()] == ["good", "bad"]
    (tmp_path / "other.csv").write_text("label,text\nugly,sun\ngood,cat\n")
    wrong = invoke("classify", tmp_path / "m", tmp_path / "other.csv")
    assert wrong.exit_code == 2 and "does not know: ugly" in wrong.stderr
    (tmp_path / "texts.jsonl").write_text('{"text": "rain cry"}\n')
    assert invoke("classify", tmp_path / "m", tmp_path / "texts.jsonl").stdout.startswith("bad\t")


def test_an_adapter_is_merged_and_named_at_the_command_line(storyteller_directory, chats, tmp_path):
    settings = [f"--set={name}={value}" for name, value in QUICK.items()]
    made = invoke("finetune", storyteller_directory, chats, "-o", tmp_path / "m", "--epochs", 10, *settings, "-q")
    assert made.exit_code == 0 and made.output == ""
    merged = invoke("merge", tmp_path / "m", "--out", tmp_path / "whole")
    assert merged.exit_code == 0, merged.output
    ask = ["--temperature", "0", "--precision", "fp32", "--device", "cpu", "-n", "16"]
    answers = [
        invoke("chat", *model, *ask, input="Who is friend 2?\n").stdout
        for model in (
            ["--model", tmp_path / "m"],
            ["--model", tmp_path / "whole"],
            ["--model", storyteller_directory, "--adapter", tmp_path / "m"],
        )
    ]
    assert answers[0] == answers[1] and "It is Tom 2." in answers[0]
    assert answers[2] == answers[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "X", "--resume", "stories"], "leave them out"),
        (["stories", "none.jsonl", "--out", "X"], "no file"),
        (["stories", "--out", "X"], "name a model and a file"),
        (["stories", "none.jsonl"], "name the directory to write"),
        (["nowhere", "none.jsonl", "--out", "X"], "no model"),
        (["stories", "CHATS", "--out", "X", "--set", "rnk=3"], "did you mean 'rank'"),
        (["stories", "CHATS", "--out", "X", "--method", "head"], "needs --task classify"),
        (["stories", "CHATS", "--out", "X", "--set", "targets=gate"], "no layers 'gate' to adapt"),
        (["stories", "CHATS", "--out", "X", "--method=adapter", "--set", "targets=gate"], "follow attention, mlp, all"),
        (["stories", "CHATS", "--out", "X", "--set", "method=last-layers", "--set", "layers=7"], "the model has 6"),
        (["stories", "CHATS", "--out", "X", "--set", "lr_scales=adapter_c=2"], "must be KIND=FACTOR,… of matrix, adap"),
        (["stories", "CHATS", "--out", "X", "--set", "lr_scales=head=2"], "nothing of that kind is trained"),
        (["stories", "CHATS", "--out", "X", "--set", "group=x"], "no field 'x' to group by"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, chats, tmp_path):
    places = {"X": tmp_path / "x", "CHATS": chats, "none.jsonl": tmp_path / "none.jsonl"}
    result = invoke("finetune", *(places.get(a, a) for a in arguments), "-q")
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_whole_configuration_can_be_printed_and_read_back(tmp_path):
    printed = invoke("finetune", "--print-config", "--set", "rank=5", "--method", "full")
    (tmp_path / "a.toml").write_text(printed.output)
    config = FinetuningConfig.configure(file=tmp_path / "a.toml")
    assert config == FinetuningConfig().replace({"rank": 5, "method": "full"})
    shutil.rmtree(tmp_path)


def test_what_a_model_says_is_shown_as_text(tmp_path):
    question = Question([1], "<b>asked</b>", "x", "line 1")
    write_page(tmp_path / "a.html", "a & b", [], {}, {}, tmp_path / "none.png", [Answer(question, "<script>", "ok")])
    page = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;asked" in page and "<script" not in page and "a &amp; b" in page


def test_a_preview_shows_what_counts_and_leaves_nothing(storyteller_directory, chats, labelled, tmp_path):
    settings = [f"--set={name}={value}" for name, value in QUICK.items()]
    shown = invoke("finetune", storyteller_directory, chats, "--dry-run", *settings)
    assert shown.exit_code == 0, shown.output
    first = json.loads(chats.read_text().splitlines()[0])
    assert f"### User\n{first['instruction']}\n\n### Assistant\n⟦{first['output']}<|endoftext|>⟧" in shown.stdout
    assert shown.stdout.count("⟦") == 3 and "memory: about" in shown.stdout and "of training" in shown.stdout
    shown = invoke("finetune", storyteller_directory, labelled, "--dry-run", *settings)
    assert shown.stdout.count("  → ") == 3 and "pads rows" in shown.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "moods.csv"]
    assert invoke("finetune", "--dry-run").exit_code == 2


@pytest.mark.parametrize("base", ["int4", "q4_1"])
def test_adapters_are_learned_beside_weights_of_4_bits(base, storyteller_directory, chats, tmp_path):
    out = tmp_path / "a"
    tuned(storyteller_directory, chats, out, base=base, epochs=8.0, answers=0)
    found = evaluation(out)
    assert found["after"]["validation"]["loss"] < 0.5 * found["before"]["validation"]["loss"]
    assert '"activation_checkpointing": true' in (out / "run.json").read_text()  # without it they would save nothing
    assert llmfast.load(out, precision="fp32", device="cpu").config == llmfast.load(storyteller_directory).config
    with pytest.raises(ValueError, match="must be floats, not int4"):
        tuned(storyteller_directory, chats, tmp_path / "b", base="int4", method="full")


def test_memory_is_given_back_where_less_is_free_than_a_run_is_expected_to_take(
    storyteller_directory, chats, tmp_path, monkeypatch
):
    needed = []
    monkeypatch.setattr("llmfast.training.memory.give_back", needed.append)
    outcome = tuned(storyteller_directory, chats, tmp_path / "a", epochs=2.0, answers=0)
    assert len(needed) == outcome.step and 1e6 < needed[0] == needed[-1]


def test_an_adapter_of_a_quantised_model_is_quantised_and_merged_as_floats_are(storyteller_directory, chats, tmp_path):
    quantize_checkpoint(storyteller_directory, tmp_path / "small", "q4_1")
    tuned(tmp_path / "small", chats, tmp_path / "a", epochs=1.0, answers=0)
    quantize_checkpoint(tmp_path / "a", tmp_path / "int8", "int8")
    assert llmfast.load(tmp_path / "int8", device="cpu").precision == "int8"
    merge(tmp_path / "a", tmp_path / "whole")
    whole, adapted = (llmfast.load(tmp_path / name, precision="fp32", device="cpu") for name in ("whole", "a"))
    assert whole.score("The cat.").total == pytest.approx(adapted.score("The cat.").total, rel=1e-5)


def test_without_anything_held_out_the_last_is_what_is_written(storyteller_directory, chats, tmp_path, capsys):
    outcome = finetune(storyteller_directory, chats, tmp_path / "a", changes=QUICK | {"validation": 0.0, "epochs": 1.0})
    assert outcome.validation is None and not (tmp_path / "a" / "evaluation.json").exists()
    assert (tmp_path / "a" / WEIGHTS).exists() and "llmfast chat --model" in capsys.readouterr().err


def test_the_advice_to_resume_names_the_processes_it_was_started_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llmfast", "finetune", "--threads", "1"])
    one, several = (resume_command("finetune", tmp_path / "my run", parallel) for parallel in ("none", "ddp"))
    assert one.startswith("llmfast finetune --out '") and " --resume --threads " in one
    assert several.startswith("torchrun --nproc-per-node N -m llmfast finetune --out '")
    assert several.endswith(" --resume --parallel ddp")
