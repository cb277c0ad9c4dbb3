"""The README's tables, made from results that somebody made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import readme  # noqa: E402

BEFORE = """# Title
<!-- peers: made -->
old
<!-- end of peers -->
middle
<!-- quality: made -->
<!-- end of quality -->
end
"""


def row(library: str, precision: str, case: str, rate: float, **more: Any) -> dict[str, Any]:
    spread = {"median": rate, "min": rate - 1, "max": rate + 1}
    found = {"group": precision[:4], "engine": f"{library} {precision}", "library": library, "precision": precision}
    return found | {"case": case, "tokens_per_second": spread, "share_of_limit": 0.5} | more


def ratio(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


PEERS = {
    "machine": {"cpu": "CPU of paper", "threads": 3},
    "versions": {"llama-cpp-python": "1.0", "ctranslate2": "2.0", "transformers": "3.0"},
    "rows": [
        row("llmfast", "bf16", "decode", 200.0, ratios={"llama.cpp bf16": ratio(1.25), "CTranslate2 bf16": ratio(4)}),
        row("llama.cpp", "bf16", "decode", 160.0),
        row("CTranslate2", "bf16", "decode", 50.0),
        row("llmfast", "int8", "decode", 80.0, ratios={"llama.cpp int8": ratio(0.8)}, share_of_limit=None),
        row("llama.cpp", "int8", "decode", 100.0),
        row("llmfast", "bf16", "decode, busy neighbour", 20.0, ratios={}),
    ],
}
QUALITY = {
    "model": "somewhere/stories",
    "results": {
        "unseen text": {
            "fp32": {"loss": 3.25, "tokens": 1000},
            "int8": {"loss_change": 0.002, "kl_divergence": 0.0004, "top1_agreement": 0.987},
        }
    },
}


def test_tables_come_from_the_results(tmp_path):
    assert readme.with_tables(BEFORE, tmp_path) == BEFORE  # no results, no change
    (tmp_path / "peers.json").write_text(json.dumps(PEERS), encoding="utf-8")
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY), encoding="utf-8")
    after = readme.with_tables(BEFORE, tmp_path)
    assert after == readme.with_tables(after, tmp_path)  # writing again changes nothing
    assert "old" not in after and "busy" not in after
    lines = after.splitlines()
    assert [lines[0], lines[-1]] == ["# Title", "end"] and "middle" in lines
    assert "| | llmfast | of the limit | llama.cpp | CTranslate2 |" in lines
    assert "| decode, bf16 | 200/s | 50% | bf16 160/s (1.25 ×) | bf16 50/s (4.00 ×) |" in lines
    assert "| decode, int8 | 80/s | – | int8 100/s (0.80 ×) | – |" in lines  # a loss, and nobody to compare with
    assert "CPU of paper" in after and "ctranslate2 2.0" in after
    assert "| unseen text | fp32 | 3.2500 | | |" in lines
    assert "| unseen text | int8 | +0.0020 | 0.0004 | 98.7% |" in lines
    assert "`stories`" in after and "somewhere" not in after


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="no <!-- peers:"):
        readme.with_table("# Title\n", "peers", "text")
