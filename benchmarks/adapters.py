"""Low-rank adapters, trained here and by peft with transformers: tokens a second, memory, and the same losses.

    python benchmarks/adapters.py DATA --python peers/bin/python
    python benchmarks/adapters.py DATA --only "llmfast" "llmfast int4"

DATA holds instruction_data.json. Adapters of rank 16 beside all matrices of the blocks of smollm2, in bf16, by AdamW,
16 instructions a step, as `llmfast finetune` makes the batches. Each engine runs in a process of its own, begins with
the same weights and the same adapter, and is given the same batches; they take turns, a step each. Tokens are those
of a batch without what pads its rows. An engine's peak is the most memory that its process had (Linux' VmHWM) less
what it had after its imports. The losses of the same weights must be the same within `TOLERANCE`, or it is an error;
that of the base in int4, which rounds them again, is given beside them.

peft is run as its manual shows it: the base in bfloat16, the adapters in float32 under autocast (`peft`), or all in
bfloat16 (`peft bf16`); the loss is transformers' own; the optimizer is torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_process import EngineProcess, answers

RESULTS = Path(__file__).parent / "results" / "adapters.json"
TOLERANCE = 0.02  # of the mean loss: bfloat16 keeps eight bits
LR, RANK, ALPHA = 5e-4, 16, 32
BASES: dict[str, dict[str, Any]] = {
    "llmfast": {},
    "llmfast, recomputing": {"activation_checkpointing": True},
    "llmfast int4": {"base": "int4"},
    "llmfast q4_1": {"base": "q4_1"},
}
ENGINES = (*BASES, "peft", "peft bf16")
OTHER_WEIGHTS = ("llmfast int4",)  # q4_1 is what smollm2 is made of
Step = Callable[[int], float]


def status(name: str) -> float:
    """A size of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / 1e6


# ---- Engines: each gives, after its imports, a function that makes a step and returns its loss ----


def ours(name: str, work: Path, steps: int) -> Callable[[], Step]:
    from llmfast.finetuning.run import Finetuning  # noqa: F401

    def begin() -> Step:
        run = tuning(work, BASES[name], steps)
        if (work / "adapter").exists():
            run.trainer.weights.load(run.method.read_export(work / "adapter"))

        def step(number: int) -> float:
            return float(run.trainer.step()[0])

        step.expected = run.expected_memory().total / 1e6  # type: ignore[attr-defined]
        return step

    return begin


def tuning(work: Path, changes: dict[str, Any], steps: int) -> Any:
    """The run that `llmfast finetune` would begin."""
    from llmfast.finetuning.configuration import FinetuningConfig
    from llmfast.finetuning.directory import Record
    from llmfast.finetuning.run import Finetuning
    from llmfast.finetuning.task import Task, resolved
    from llmfast.training.interruption import Interruption
    from llmfast.training.processes import Processes

    config = FinetuningConfig().replace(
        {"precision": "bf16", "lr": LR, "rank": RANK, "alpha": ALPHA, "warmup": 0}
        | {"schedule": "constant", "steps": steps}
        | changes
    )
    record = Record(
        config, "smollm2" if changes.get("base") == "q4_1" else str(work / "model"), str(work / "instructions.json"), ""
    )
    task = Task.of(record)
    record = Record(resolved(config, task.examples, Processes()), record.model, record.file, "")
    return Finetuning(record, task, work / "out", Processes(), Interruption(), "", quiet=True)


def theirs(name: str, work: Path, steps: int) -> Callable[[], Step]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def begin() -> Step:
        model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.bfloat16)
        wide = name == "peft"
        model = PeftModel.from_pretrained(model, work / "adapter", is_trainable=True, autocast_adapter_dtype=wide)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

        def step(number: int) -> float:
            batch = torch.load(work / f"batch-{number}.pt")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wide):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    return begin


def serve(name: str, work: Path, steps: int, threads: int) -> None:
    """One engine, told by line which step to make; it answers with the loss, the seconds, and its peak so far."""
    reply = answers()
    try:
        import torch

        torch.set_num_threads(threads)
        begin = (ours if name in BASES else theirs)(name, work, steps)
    except ImportError as error:
        return reply(missing=str(error))
    bare = status("VmRSS")
    step = begin()
    loaded = status("VmRSS") - bare
    reply(bare=bare, loaded=loaded, expected=getattr(step, "expected", None))
    for line in sys.stdin:
        before = time.perf_counter()
        loss = step(int(line))
        reply(loss=loss, seconds=time.perf_counter() - before, peak=status("VmHWM") - bare)


class Worker:
    """An engine that makes steps; `first` is what it says when it is ready, or cannot be."""

    def __init__(self, python: str, name: str, options: argparse.Namespace, work: Path):
        call = [str(options.data), "--serve", name, "--work", str(work)]
        call += ["--threads", str(options.threads), "--steps", str(options.steps)]
        self.process = EngineProcess(
            python, __file__, call, options.threads, work / f"errors-{name}", own=name in BASES
        )
        self.first = self.process.read()


def material(data: Path, work: Path, steps: int) -> list[int]:
    """Writes the model in bfloat16, the adapter that all begin with, and the batches; the tokens of each batch."""
    import shutil

    import torch

    from llmfast.training.dataset import IGNORED
    from llmfast.weights.checkpoint import stream
    from llmfast.weights.loading import module_of
    from llmfast.weights.locate import locate_model
    from llmfast.weights.saving import copy_tokenizer, save

    shutil.copy(data / "instruction_data.json", work / "instructions.json")
    source = stream(locate_model("smollm2"))
    save(work / "model", source.config, module_of(source, torch.bfloat16).state_dict())
    copy_tokenizer(source.path, work / "model")
    run = tuning(work, {}, steps)
    run.method.export(work / "adapter", run.trainer.full_weights(), torch.float32)
    tokens = []
    for number in range(steps):
        ids, targets = run.loader.batch(number)
        lengths = torch.tensor([len(run.examples.train[i].ids) for i in run.loader._batches(0)[number]])
        there = torch.arange(ids.shape[1] + 1) <= lengths[:, None]
        # theirs are the ids with what follows the last, as labels that their loss shifts
        after = torch.where(targets == IGNORED, ids.new_full((), 0), targets)
        whole = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1)
        last = torch.arange(len(ids)), lengths
        whole[last] = after[torch.arange(len(ids)), lengths - 1]
        labels = torch.cat([ids.new_full((len(ids), 1), IGNORED), targets], dim=1)
        torch.save({"input_ids": whole, "attention_mask": there.long(), "labels": labels}, work / f"batch-{number}.pt")
        tokens.append(int(lengths.sum()))
    return tokens


def started(options: argparse.Namespace, work: Path) -> dict[str, Worker]:
    workers: dict[str, Worker] = {}
    for name in options.only or ENGINES:
        for python in (sys.executable, *options.python):
            worker = Worker(python, name, options, work)
            if "missing" not in worker.first:
                workers[name] = worker
                break
        else:
            print(f"left out: {name} ({worker.first['missing']})", flush=True)
    return workers


def measured(workers: dict[str, Worker], tokens: list[int], warm: int) -> dict[str, Any]:
    names = list(workers)
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(len(tokens)):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            replies[name].append(workers[name].process.ask(number))
        print(f"step {number + 1}:", *(f"{n} {replies[n][-1]['loss']:.3f}" for n in names), flush=True)
    engines = {}
    for name, steps in replies.items():
        seconds = [step["seconds"] for step in steps[warm:]]
        engines[name] = {
            **{"bare_mb": workers[name].first["bare"], "loaded_mb": workers[name].first["loaded"]},
            **{"peak_mb": steps[-1]["peak"], "expected_mb": workers[name].first["expected"]},
            "tokens_per_second": sum(tokens[warm:]) / sum(seconds),
            "loss": statistics.fmean(step["loss"] for step in steps),
            "losses": [step["loss"] for step in steps],
            "seconds": [step["seconds"] for step in steps],
        }
    return engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--python", action="append", default=[], help="that has peft and transformers; several times")
    parser.add_argument("--only", nargs="+", choices=ENGINES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.work, options.steps, options.threads)
    from llmfast.benchmarking.facts import facts

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokens = material(options.data, work, options.steps)
        workers = started(options, work)
        engines = measured(workers, tokens, options.warm)
        for worker in workers.values():
            worker.process.kill()
    expected = engines.get("peft", next(iter(engines.values())))["loss"]
    for name, engine in engines.items():
        print(
            f"{name:26} {engine['tokens_per_second']:7.0f} tokens/s  peak {engine['peak_mb']:6.0f} MB above its "
            f"imports' {engine['bare_mb']:.0f}  loss {engine['loss']:.4f}"
            + (f"  expected {engine['expected_mb']:.0f} MB" if engine["expected_mb"] else "")
        )
        if name not in OTHER_WEIGHTS and abs(engine["loss"] / expected - 1) > TOLERANCE:
            raise SystemExit(f"{name}'s loss is {engine['loss']:.4f}, not {expected:.4f}")
    record = {"threads": options.threads, "warm": options.warm, "tokens": tokens, "engines": engines}
    options.out.write_text(json.dumps(record | {"machine": facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
