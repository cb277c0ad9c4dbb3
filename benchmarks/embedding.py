"""Texts to vectors, beside the libraries that one would take instead: speed, and what the vectors are worth.

    python benchmarks/embedding.py xquad_en.json --python peers/bin/python --out embedding.json

XQuAD's 240 paragraphs and 1,190 questions in SQuAD's format, with `minilm`. Each engine is loaded in a process of its
own by the first of the Pythons given that has its packages (this one comes first), and they take turns: a round gives
every one a turn with all paragraphs and one with all questions, tokenizing included. Its vectors are those of
sentence-transformers within 1e-5 at fp32, or it is an error; R@1 is how often the vector nearest to a question's is its
paragraph's. An engine whose packages no Python has is left out, with a line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from engine_process import EngineProcess, answers

SETS = ("paragraphs", "questions")
MOST_TOKENS = 256
TOKENS_AT_ONCE = 2048  # of a batch, for engines that leave it to their caller
BATCH = 32  # texts, sentence-transformers' default
TOLERANCE = 1e-5
Encode = Callable[[list[str]], np.ndarray]


def texts_of(squad: Path) -> tuple[list[str], list[str], list[int]]:
    """Paragraphs, questions, and the paragraph of each question."""
    paragraphs = [p for article in json.loads(squad.read_text())["data"] for p in article["paragraphs"]]
    questions = [(q["question"], i) for i, p in enumerate(paragraphs) for q in p["qas"]]
    return [p["context"] for p in paragraphs], [q for q, _ in questions], [i for _, i in questions]


# ---- Engines: each gives a function from texts to vectors of length 1 ----


def llmfast_engine(precision: str, model: Path, threads: int, work: Path) -> Encode:
    import torch

    import llmfast

    torch.set_num_threads(threads)
    embedder = llmfast.Embedder(model, max_tokens=MOST_TOKENS, precision=precision)
    return lambda texts: embedder.embed(texts).numpy()


def sentence_transformers_engine(precision: str, model: Path, threads: int, work: Path) -> Encode:
    return _sentence_transformers(str(model), threads, backend="torch")


def sentence_transformers_onnx_engine(precision: str, model: Path, threads: int, work: Path) -> Encode:
    import onnxruntime
    import optimum.onnxruntime  # noqa: F401  (what its backend needs)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    arguments = {"provider": "CPUExecutionProvider", "session_options": options}
    kept = work / "sentence-transformers"
    if not kept.exists():
        import sentence_transformers

        export = {"provider": "CPUExecutionProvider", "export": True}
        made = sentence_transformers.SentenceTransformer(str(model), device="cpu", backend="onnx", model_kwargs=export)
        made.save_pretrained(str(kept))
    return _sentence_transformers(str(kept), threads, backend="onnx", model_kwargs=arguments)


def _sentence_transformers(model: str, threads: int, **arguments: Any) -> Encode:
    import sentence_transformers
    import torch

    torch.set_num_threads(threads)
    made = sentence_transformers.SentenceTransformer(model, device="cpu", **arguments)
    made.max_seq_length = MOST_TOKENS
    return lambda texts: made.encode(texts, batch_size=BATCH, convert_to_numpy=True, show_progress_bar=False)


def onnxruntime_engine(precision: str, model: Path, threads: int, work: Path) -> Encode:
    import onnxruntime
    from onnxruntime.transformers.optimizer import optimize_model
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    fused = work / "fused.onnx"
    if not fused.exists():
        ORTModelForFeatureExtraction.from_pretrained(model, export=True).save_pretrained(work)
        config = json.loads((model / "config.json").read_text())
        sizes = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
        optimize_model(str(work / "model.onnx"), "bert", **sizes).save_model_to_file(str(fused))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(fused), options, providers=["CPUExecutionProvider"])

    def hidden(rows: list[list[int]], there: np.ndarray) -> np.ndarray:
        ids = np.zeros(there.shape, dtype=np.int64)
        ids[there] = np.concatenate(rows)
        feeds = {"input_ids": ids, "attention_mask": there.astype(np.int64), "token_type_ids": np.zeros_like(ids)}
        return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]

    return _batched(model, hidden)


def ctranslate2_engine(precision: str, model: Path, threads: int, work: Path) -> Encode:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    if not (work / "ct2").exists():
        TransformersConverter(str(model)).convert(str(work / "ct2"))
    kind = {"fp32": "float32"}.get(precision, precision)
    encoder = ctranslate2.Encoder(str(work / "ct2"), device="cpu", compute_type=kind, intra_threads=threads)
    return _batched(model, lambda rows, there: np.array(encoder.forward_batch(rows).last_hidden_state))


def _batched(model: Path, hidden: Callable[[list[list[int]], np.ndarray], np.ndarray]) -> Encode:
    """Tokenizes, sorts by length, and averages what `hidden(rows, there (B, T))` gives, (B, T, C)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)

    def encode(texts: list[str]) -> np.ndarray:
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        vectors = np.empty((len(rows), 0), dtype=np.float32)
        for batch in _by_length([len(row) for row in rows]):
            some = [rows[i] for i in batch]
            there = np.arange(len(some[0])) < np.array([len(row) for row in some])[:, None]
            means = (hidden(some, there) * there[:, :, None]).sum(1) / there.sum(1)[:, None]
            if not vectors.size:
                vectors = np.empty((len(rows), means.shape[1]), dtype=np.float32)
            vectors[batch] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors

    return encode


def _by_length(lengths: list[int]) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, TOKENS_AT_ONCE // lengths[order[0]])
        yield order[:size]
        order = order[size:]


# Name, the function above, its packages, precision.
ENGINES = {
    "llmfast fp32": (llmfast_engine, "llmfast", "fp32"),
    "sentence-transformers": (sentence_transformers_engine, "sentence-transformers", "fp32"),
    "sentence-transformers, ONNX": (sentence_transformers_onnx_engine, "optimum-onnx", "fp32"),
    "ONNX Runtime": (onnxruntime_engine, "onnxruntime", "fp32"),
    "CTranslate2": (ctranslate2_engine, "ctranslate2", "fp32"),
    "llmfast bf16": (llmfast_engine, "llmfast", "bf16"),
    "llmfast int8": (llmfast_engine, "llmfast", "int8"),
    "CTranslate2 int8": (ctranslate2_engine, "ctranslate2", "int8"),
}


def serve(name: str, squad: Path, model: Path, threads: int, folder: Path) -> None:
    """One engine, told what to do line by line: `paragraphs` or `questions` are encoded and kept, and the answer is the
    seconds that it took."""
    answer = answers()
    make, package, precision = ENGINES[name]
    paragraphs, questions, _ = texts_of(squad)
    made = model.parent / "peers" / model.name  # kept from run to run
    made.mkdir(parents=True, exist_ok=True)
    try:
        encode = make(precision, model, threads, made)
    except ImportError as error:
        return answer(missing=str(error))
    from importlib.metadata import version

    answer(version="" if package == "llmfast" else version(package))
    for line in sys.stdin:
        what = line.strip()
        before = time.perf_counter()
        vectors = encode(paragraphs if what == "paragraphs" else questions)
        seconds = time.perf_counter() - before
        np.save(folder / f"{what}.npy", vectors)
        answer(seconds=seconds)


class Worker:
    def __init__(self, python: str, name: str, options: argparse.Namespace, folder: Path):
        self.folder = folder
        call = [str(options.squad), "--serve", name, "--model", str(options.model)]
        call += ["--threads", str(options.threads), "--folder", str(folder)]
        own = name.startswith("llmfast")
        self.process = EngineProcess(python, __file__, call, options.threads, folder / "errors", own)
        self.first: dict[str, Any] = {}

    def wait(self) -> None:
        self.first = self.process.read()

    def seconds(self, what: str) -> float:
        return float(self.process.ask(what)["seconds"])

    def vectors(self, what: str) -> np.ndarray:
        return np.load(self.folder / f"{what}.npy")


def started(options: argparse.Namespace, work: Path) -> dict[str, Worker]:
    """All that can be, loading side by side."""
    workers: dict[str, Worker] = {}
    left = [name for name in ENGINES if not options.only or name in options.only]
    for number, python in enumerate((sys.executable, *options.python)):
        tried = {}
        for name in left:
            folder = work / f"{number}-{len(tried)}"
            folder.mkdir()
            tried[name] = Worker(python, name, options, folder)
        for name, worker in tried.items():
            worker.wait()
            if "missing" not in worker.first:
                workers[name] = worker
        left = [name for name in left if name not in workers]
    for name in left:
        print(f"left out: {name} ({tried[name].first['missing']})", flush=True)
    return {name: workers[name] for name in ENGINES if name in workers}


def begun(workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    """The record before the first round: every engine is warm, and its vectors are checked."""
    _, _, paragraph_of = texts_of(options.squad)
    for worker in workers.values():
        for what in SETS:
            worker.seconds(what)
    expected = {what: workers["sentence-transformers"].vectors(what) for what in SETS}
    record: dict[str, Any] = {"threads": options.threads, "engines": {}}
    for name, worker in workers.items():
        found = {what: worker.vectors(what) for what in SETS}
        apart = max(float(np.abs(found[what] - expected[what]).max()) for what in SETS)
        cosine = min(float((found[what] * expected[what]).sum(1).min()) for what in SETS)
        precision = ENGINES[name][2]
        if precision == "fp32" and not apart <= TOLERANCE:
            raise SystemExit(f"{name}'s vectors are {apart:.1e} from sentence-transformers'")
        nearest = (found["questions"] @ found["paragraphs"].T).argmax(1)
        record["engines"][name] = {
            **{"version": worker.first["version"], "precision": precision, "apart": apart, "least_cosine": cosine},
            "right_first": float((nearest == np.array(paragraph_of)).mean()),
            "seconds": {what: [] for what in SETS},
        }
    return record


def one_round(workers: dict[str, Worker], record: dict[str, Any], turn: int) -> None:
    names = list(workers)
    for what in SETS:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            record["engines"][name]["seconds"][what].append(workers[name].seconds(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("squad", type=Path)
    parser.add_argument("--python", action="append", default=[], help="that has peers' packages; several times")
    parser.add_argument("--only", nargs="+", help="engines; sentence-transformers is needed to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache/llmfast/minilm")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.squad, options.model, options.threads, options.folder)
    from llmfast.benchmarking.facts import facts

    with tempfile.TemporaryDirectory() as work:
        workers = started(options, Path(work))
        record = begun(workers, options)
        for turn in range(options.rounds):
            one_round(workers, record, turn)
            print("round", turn + 1, flush=True)
    record["machine"] = facts()
    for name, engine in record["engines"].items():
        texts = [f"{what} {np.median(seconds):.2f} s" for what, seconds in engine["seconds"].items()]
        print(f"{name:30} {'  '.join(texts)}  R@1 {engine['right_first']:.4f}  apart {engine['apart']:.1e}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
