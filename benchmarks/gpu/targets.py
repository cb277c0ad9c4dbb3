"""What this project wants to reach on an H200, and whether the records say that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.bench import COMPILED
from llmfast.benchmarking.records import Record

LONG = (4096, 8192, 16384)


@dataclass(frozen=True)
class Target:
    """`value` is the worst of what counts, in `unit`; None where nothing of it was measured."""

    name: str
    wanted: float
    unit: str
    value: Callable[[Sequence[Record]], float | None]

    def verdict(self, records: Sequence[Record]) -> tuple[float | None, str]:
        found = self.value(records)
        return found, "not measured" if found is None else "met" if found >= self.wanted else "missed"


def ours(records: Iterable[Record], name: str, backend: str = "triton", **sizes: int) -> list[Record]:
    """Our records of a task at these sizes, measured on a GPU."""
    return [
        record
        for record in records
        if (record.name, record.backend) == (name, backend)
        and record.problem is None
        and record.device == "cuda"
        and all(record.sizes.get(key) == value for key, value in sizes.items())
    ]


def teraflops(head_dim: int) -> Callable[[Sequence[Record]], float | None]:
    def value(records: Sequence[Record]) -> float | None:
        found = ours(records, "causal_attention forward", head_dim=head_dim)
        return least(r.rates["gigaflops_per_second"] / 1e3 for r in found if r.sizes["tokens"] in LONG)

    return value


def ratio(name: str, competitor: str, lengths: Sequence[int] = (), **sizes: int):  # type: ignore[no-untyped-def]
    """How many times as fast as the competitor, where it is least."""

    def value(records: Sequence[Record]) -> float | None:
        found = [r for r in ours(records, name, **sizes) if not lengths or r.sizes["tokens"] in lengths]
        return least(v.ratio.median for r in found for v in r.versus if v.competitor.startswith(competitor))

    return value


def layer_norm_share(records: Sequence[Record]) -> float | None:
    found = [r for r in ours(records, "layer_norm forward") if r.sizes["width"] >= 4096]
    return least(100 * r.share_of_limit for r in found if r.share_of_limit is not None)


def decode_rate(records: Sequence[Record]) -> float | None:
    found = [r for r in ours(records, "decode", "triton graph", batch=1) if r.precision == "bf16"]
    return least(r.rates["tokens_per_second"] for r in found)


def least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


FORWARD, BACKWARD = "causal_attention forward", "causal_attention backward"
NORM, NORM_BACKWARD = "layer_norm forward", "layer_norm backward"
TARGETS = (
    Target("attention forward, head dim 64, 4k to 16k", 350, "TFLOP/s", teraflops(64)),
    Target("attention forward, head dim 128, 4k to 16k", 380, "TFLOP/s", teraflops(128)),
    Target("attention forward against SDPA flash, 4k to 16k", 1, "×", ratio(FORWARD, "sdpa flash", LONG)),
    Target("attention backward against SDPA flash, 4k to 16k", 1, "×", ratio(BACKWARD, "sdpa flash", LONG)),
    Target("LayerNorm forward, width 4096 and more, of the copy bandwidth", 90, "%", layer_norm_share),
    Target("LayerNorm forward against torch.compile, width 768", 1, "×", ratio(NORM, COMPILED, width=768)),
    Target("LayerNorm backward against torch.compile, width 768", 1, "×", ratio(NORM_BACKWARD, COMPILED, width=768)),
    Target("decode of GPT-2 124M, bf16, batch 1, CUDA graph", 3500, "tokens/s", decode_rate),
    Target("training of GPT-2 124M against torch.compile", 1, "×", ratio("training step", COMPILED)),
)


def table(records: Sequence[Record]) -> str:
    """A Markdown table of the targets."""
    lines = ["| target | wanted | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        value, verdict = target.verdict(records)
        measured = "–" if value is None else f"{_number(value)} {target.unit}"
        lines.append(f"| {target.name} | {_number(target.wanted)} {target.unit} | {measured} | {verdict} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
