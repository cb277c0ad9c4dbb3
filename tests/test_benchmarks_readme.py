"""The README's tables, made from results that somebody made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmfast.benchmarking import records
from llmfast.benchmarking.records import Record, Results, Spread, Versus

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import readme  # noqa: E402

BEFORE = """# Title
<!-- table: made -->
<!-- end of table -->
<!-- peers: made -->
old
<!-- end of peers -->
<!-- llama-peers: made -->
<!-- end of llama-peers -->
<!-- smollm2-peers: made -->
<!-- end of smollm2-peers -->
middle
<!-- quality: made -->
<!-- end of quality -->
<!-- smollm2-quality: made -->
<!-- end of smollm2-quality -->
<!-- training: made -->
<!-- end of training -->
end
"""


def row(library: str, precision: str, rate: float, versus: dict[str, float] | None = None, **more: Any) -> Record:
    sound: dict[str, Any] = {"name": "decode", "sizes": {"batch": 1, "context": 32}, "share_of_limit": 0.5} | more
    return Record(
        group="peers",
        backend=library,
        precision=precision,
        device="cpu",
        model="gpt2",
        seconds=Spread.of([1 / rate]),
        rates={"tokens_per_second": rate},
        versus=tuple(Versus(name, Spread.of([value])) for name, value in (versus or {}).items()),
        **sound,
    )


FACTS = {
    "machine": {"cpu": "CPU of paper"},
    "threads": 3,
    "isa": "generic",
    "versions": {"torch": "0.1", "llama-cpp-python": "1.0", "ctranslate2": "2.0", "transformers": "3.0"},
}
PEERS = (
    row("llmfast", "bf16", 200.0, {"llama.cpp bf16": 1.25, "CTranslate2 bf16": 4}),
    row("llama.cpp", "bf16", 160.0),
    row("CTranslate2", "bf16", 50.0),
    row("llmfast", "int8", 80.0, {"llama.cpp q8_0": 0.8}, share_of_limit=None),
    row("llama.cpp", "q8_0", 100.0),
    row("llmfast", "bf16", 20.0, name="decode, one CPU busy"),
)
SPEEDS = tuple(
    Record(group, name, backend, precision, "cpu", {"tokens": tokens}, seconds=Spread.of([seconds]),
           rates={"tokens_per_second": tokens / seconds})
    for group, name, tokens, precisions in [
        ("ops", "causal_attention forward", 1024, ("fp32", "bf16")),
        ("ops", "layer_norm forward", 1024, ("fp32", "bf16")),
        ("ops", "gelu forward", 1024, ("fp32", "bf16")),
        ("generate", "generate, cached", 128, ("fp32",)),
        ("generate", "generate, uncached", 128, ("fp32",)),
    ]
    for precision in precisions
    for backend, seconds in (("pytorch", 0.02), ("cpp", 0.005))
)  # fmt: skip
QUALITY = {
    "model": "somewhere/stories",
    "results": {
        "unseen text": {
            "fp32": {"loss": 3.25, "tokens": 1000},
            "int8": {"loss_change": 0.002, "kl_divergence": 0.0004, "top1_agreement": 0.987},
        }
    },
}
TRAINING = {
    "speed": {
        "plain PyTorch, fp32": {"tokens_per_second": 20000, "times_plain": 1.0},
        "llmfast, bf16": {"tokens_per_second": 45000, "times_plain": 2.25},
    },
    "shakespeare-char-cpu": {
        "losses": [1.87, 1.8749],
        "seconds": 61.6,
        "config": {
            "model": {"n_layer": 4, "n_embd": 128, "n_positions": 64},
            "data": {"batch_size": 12},
            "run": {"steps": 2000},
        },
    },
    "facts": FACTS,
}


def test_tables_come_from_the_results(tmp_path):
    assert readme.with_tables(BEFORE, tmp_path) == BEFORE  # no results, no change
    records.save(Results(FACTS, {}, PEERS), tmp_path / "peers.json")
    records.save(Results(FACTS, {}, SPEEDS), tmp_path / "cpu.json")
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY), encoding="utf-8")
    (tmp_path / "training.json").write_text(json.dumps(TRAINING), encoding="utf-8")
    after = readme.with_tables(BEFORE, tmp_path)
    assert after == readme.with_tables(after, tmp_path)  # writing again changes nothing
    assert "old" not in after and "busy" not in after
    lines = after.splitlines()
    assert [lines[0], lines[-1]] == ["# Title", "end"] and "middle" in lines
    assert "| | llmfast | of the limit | llama.cpp | CTranslate2 |" in lines
    assert "| decode, 32 tokens, bf16 | 200/s | 50% | bf16 160/s (1.25 ×) | bf16 50/s (4.00 ×) |" in lines
    assert "| decode, 32 tokens, int8 | 80/s | – | q8_0 100/s (0.80 ×) | – |" in lines  # a loss
    assert "| GELU, tanh, bfloat16 | 20.00 ms | 5.00 ms | 4.0 × |" in lines
    assert "| `generate`, 128 tokens, without it | 6400/s | 25600/s | 4.0 × |" in lines
    assert "CPU of paper" in after and "generic kernels, torch 0.1" in after and "ctranslate2 2.0" in after
    assert "| unseen text | fp32 | 3.2500 | | |" in lines
    assert "| unseen text | int8 | +0.0020 | 0.0004 | 98.7% |" in lines
    assert "| llmfast, bf16 | 45,000 | 2.2 × |" in lines
    assert "| 4 layers, 128 wide, context 64, 2000 steps of 12 | 62 | 1.870, 1.875 |" in lines
    assert "`stories`" in after and "somewhere" not in after


def test_a_library_at_several_precisions_beside_one_of_ours_has_a_column_each():
    rows = (
        row("llmfast", "q4_1", 200.0, {"llama.cpp q4_1": 2.0, "llama.cpp q8_0": 4.0}),
        row("llama.cpp", "q4_1", 100.0),
        row("llama.cpp", "q8_0", 50.0),
    )
    lines = readme.peers(Results(FACTS, {}, rows)).splitlines()
    assert lines[0] == "| | llmfast | of the limit | llama.cpp q4_1 | llama.cpp q8_0 |"
    assert lines[2] == "| decode, 32 tokens, q4_1 | 200/s | 50% | 100/s (2.00 ×) | 50/s (4.00 ×) |"
    assert "llama-cpp-python 1.0" in lines[-1]


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="no <!-- peers:"):
        readme.with_table("# Title\n", "peers", "text")


def test_pictures_know_which_results_they_show(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = tmp_path / "pictures"
    records.save(Results(FACTS, {}, PEERS), tmp_path / "peers.json")
    records.save(Results(FACTS, {}, SPEEDS), tmp_path / "cpu.json")
    assert not readme.drawn(pictures, tmp_path)
    readme.draw(pictures, tmp_path)
    assert readme.drawn(pictures, tmp_path)
    assert all((pictures / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in readme.PICTURES)
    records.save(Results(FACTS, {}, PEERS[:-1]), tmp_path / "peers.json")
    assert not readme.drawn(pictures, tmp_path)
