"""Who is measured, at what, and what it should come to: plain data, for the other files of this folder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .counting import Formats

OURS, LLAMA, CT2, HF = "llmfast", "llama.cpp", "CTranslate2", "transformers"
HF_COMPILED = "transformers compiled"
CAPACITY = 1024  # positions in everybody's cache, GPT-2's context
MEMORY_ALLOWANCE = 60e6  # bytes beyond the weights and the cache that ours may take: code, buffers, the allocator's


@dataclass(frozen=True)
class Engine:
    """A library at a precision. `agreement` is how its logits must correlate with transformers' in float32; one of
    `slow_start` takes a minute to get ready, and is left out where there is little time."""

    library: str
    precision: str
    formats: Formats
    arithmetic: str  # the format of `limits.measure` that bounds its prefill
    agreement: float = 0.99
    slow_start: bool = False

    @property
    def name(self) -> str:
        return f"{self.library} {self.precision}"


def _ours(precision: str, blocks: str, head: str, cache: str, arithmetic: str, agreement: float = 0.99) -> Engine:
    return Engine(OURS, precision, Formats(blocks, head, cache), arithmetic, agreement)


# Everybody in a group is measured in turns. llama.cpp keeps its cache in float16, CTranslate2 in float32.
GROUPS: dict[str, list[Engine]] = {
    "fp32": [
        _ours("fp32", "f32", "f32", "f32", "fp32"),
        Engine(LLAMA, "f32", Formats("f32", "f32", "f16"), "fp32"),
        Engine(CT2, "float32", Formats("f32", "f32", "f32"), "fp32"),
        Engine(HF, "fp32", Formats("f32", "f32", "f32"), "fp32"),
        Engine(HF_COMPILED, "fp32", Formats("f32", "f32", "f32"), "fp32", slow_start=True),
    ],
    "bf16": [
        _ours("bf16", "bf16", "bf16", "bf16", "bf16"),
        Engine(LLAMA, "bf16", Formats("bf16", "bf16", "f16"), "bf16"),
        Engine(HF, "bf16", Formats("bf16", "bf16", "bf16", vectors="bf16"), "bf16"),
        Engine(HF_COMPILED, "bf16", Formats("bf16", "bf16", "bf16", vectors="bf16"), "bf16", slow_start=True),
    ],
    "int8": [
        _ours("int8", "int8", "int8", "bf16", "int8"),
        Engine(LLAMA, "q8_0", Formats("q8_0", "q8_0", "f16"), "int8"),
        Engine(CT2, "int8", Formats("int8", "int8", "f32"), "int8"),
    ],
    "int4": [
        _ours("int4", "int4", "int8", "bf16", "int8", 0.9),
        _ours("int4-all", "int4", "int4", "bf16", "int8", 0.9),
        Engine(LLAMA, "q4_0", Formats("q4_0", "q4_0", "f16"), "int8", 0.9),
    ],
}


@dataclass(frozen=True)
class Case:
    """One thing to measure: decoding `new` tokens after a prompt (`new` 0: the prompt itself)."""

    name: str
    prompt: int
    new: int = 0
    busy: bool = False  # while another process computes

    @property
    def what(self) -> str:
        return ("decode" if self.new else "prefill") + ", one CPU busy" * self.busy

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": 1, "context": self.prompt} if self.new else {"batch": 1, "tokens": self.prompt}


SHORT = Case("decode, 32 tokens", prompt=32, new=64)
LONG = Case("decode, 880 tokens", prompt=880, new=32)
PREFILL = Case("prefill, 512 tokens", prompt=512)
BUSY = Case("decode, busy neighbour", prompt=32, new=32, busy=True)
CASES = [SHORT, LONG, PREFILL, BUSY]


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    rounds: int
    limit_rounds: int
    cases: tuple[Case, ...]
    slow_starts: bool = True

    def engines(self, group: str) -> list[Engine]:
        return [engine for engine in GROUPS[group] if self.slow_starts or not engine.slow_start]


FULL = Effort(rounds=5, limit_rounds=7, cases=tuple(CASES))
QUICK = Effort(2, 3, tuple(replace(case, new=case.new // 4) for case in CASES), slow_starts=False)


@dataclass(frozen=True)
class Target:
    """A ratio of ours that is meant to be at least `least`: to a peer's speed, or to our own in another case."""

    group: str
    ours: str
    case: str
    least: float
    peer: str | None = None
    own: str | None = None  # the case of our own that it is compared with


SPEED_TARGETS = [
    Target("fp32", f"{OURS} fp32", SHORT.name, 1.0, peer=f"{LLAMA} f32"),
    Target("bf16", f"{OURS} bf16", SHORT.name, 1.0, peer=f"{LLAMA} bf16"),
    Target("int8", f"{OURS} int8", SHORT.name, 1.35, peer=f"{LLAMA} q8_0"),
    Target("int4", f"{OURS} int4-all", SHORT.name, 1.5, peer=f"{LLAMA} q4_0"),
    Target("fp32", f"{OURS} fp32", PREFILL.name, 1.6, peer=f"{LLAMA} f32"),
    Target("fp32", f"{OURS} fp32", PREFILL.name, 1.2, peer=f"{CT2} float32"),
    Target("bf16", f"{OURS} bf16", PREFILL.name, 1.6, peer=f"{LLAMA} bf16"),
    Target("int8", f"{OURS} int8", PREFILL.name, 1.2, peer=f"{CT2} int8"),
]
# Of its own speed: bytes a second at a long context, tokens a second beside a busy process.
OWN_TARGETS = [
    Target(group, engine.name, case, least, own=SHORT.name)
    for case, least in ((LONG.name, 0.9), (BUSY.name, 0.55))
    for group, engines in GROUPS.items()
    for engine in engines
    if engine.library == OURS
]
TARGETS = SPEED_TARGETS + OWN_TARGETS
