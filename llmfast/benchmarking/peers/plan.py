"""Who is measured, at what, and what it should come to: plain data, for the other files of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .counting import Formats

OURS, LLAMA, CT2, HF = "llmfast", "llama.cpp", "CTranslate2", "transformers"
HF_COMPILED, OPENVINO = "transformers compiled", "openvino-genai"
MEMORY_ALLOWANCE = 60e6  # bytes beyond the weights and the cache that ours may take: code, buffers, the allocator's


@dataclass(frozen=True)
class Engine:
    """A library at a precision. `agreement` is how its logits must correlate with transformers' in float32 (None: it
    gives none); one of `slow_start` takes a minute to get ready, and is left out where there is little time."""

    library: str
    precision: str
    formats: Formats
    arithmetic: str  # the format of `limits.measure` that bounds its prefill
    agreement: float | None = 0.99
    slow_start: bool = False

    @property
    def name(self) -> str:
        return f"{self.library} {self.precision}"


def _ours(precision: str, blocks: str, head: str, cache: str, arithmetic: str, agreement: float = 0.99) -> Engine:
    return Engine(OURS, precision, Formats(blocks, head, cache), arithmetic, agreement)


# The engines of a group take turns. llama.cpp keeps its cache in float16, CTranslate2 in float32.
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
        Engine(LLAMA, "q4_0", Formats("q4_0", "q8_0", "f16"), "int8", 0.9),
    ],
    # A GGUF file as it is, and what llama.cpp makes of its numbers in its other forms.
    "as stored": [
        _ours("q4_1", "q4_1", "q8_0", "bf16", "int8"),
        Engine(LLAMA, "q4_1", Formats("q4_1", "q8_0", "f16"), "int8"),
        Engine(LLAMA, "q4_0", Formats("q4_0", "q8_0", "f16"), "int8", 0.9),
        Engine(LLAMA, "q8_0", Formats("q8_0", "q8_0", "f16"), "int8"),
        Engine(LLAMA, "bf16", Formats("bf16", "bf16", "f16"), "bf16"),
        Engine(OPENVINO, "q4_1", Formats("q4_1", "q8_0", "f16"), "int8", None),
    ],
}
RANDOM_WEIGHTS = ("fp32", "bf16", "int8", "int4")  # groups


@dataclass(frozen=True)
class Case:
    """One thing to measure: decoding `new` tokens after a prompt (`new` 0: the prompt itself)."""

    kind: str
    prompt: int
    new: int = 0
    busy: bool = False  # while another process computes

    @property
    def name(self) -> str:
        return f"{self.what}, {self.prompt} tokens"

    @property
    def what(self) -> str:
        return ("decode" if self.new else "prefill") + ", one CPU busy" * self.busy

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": 1, "context": self.prompt} if self.new else {"batch": 1, "tokens": self.prompt}


SHORT = Case("short", prompt=32, new=64)
PREFILL = Case("prefill", prompt=512)
BUSY = Case("busy", prompt=32, new=32, busy=True)


@dataclass(frozen=True)
class Target:
    """A ratio of ours that is meant to be at least `least`: to a peer's speed, to our own in another case, or (neither)
    to the machine's limit. `case` and `own` are kinds of a `Case`."""

    group: str
    ours: str
    case: str
    least: float
    peer: str | None = None
    own: str | None = None


def _times(group: str, ours: str, case: Case, least: float, peer: str) -> Target:
    return Target(group, f"{OURS} {ours}", case.kind, least, peer=peer)


def _own(case: str, least: float, groups: tuple[str, ...] = RANDOM_WEIGHTS) -> list[Target]:
    """Of its own speed at a short context: bytes a second at a long one, tokens a second beside a busy process."""
    ours = [(group, engine) for group in groups for engine in GROUPS[group] if engine.library == OURS]
    return [Target(group, engine.name, case, least, own=SHORT.kind) for group, engine in ours]


@dataclass(frozen=True)
class Model:
    """A shape of `llmfast.models.PRESETS` with random weights, what is measured of it, and what that should come to.

    One that is `known` is the model of that shape which `llmfast get` brings under this name, a GGUF file `stored_as`
    a type.
    """

    preset: str
    title: str
    long: Case
    capacity: int  # positions in every engine's cache
    libraries: tuple[str, ...]
    targets: list[Target] = field(default_factory=list)
    groups: tuple[str, ...] = RANDOM_WEIGHTS
    known: str | None = None
    stored_as: str | None = None

    @property
    def name(self) -> str:
        return self.known or self.preset

    def engines(self) -> list[Engine]:
        return [e for group in self.groups for e in GROUPS[group] if e.library in self.libraries]

    @property
    def cases(self) -> tuple[Case, ...]:
        return (SHORT, self.long, PREFILL, BUSY)


GPT2 = Model(
    "gpt2",
    "GPT-2 124M",
    Case("long", prompt=880, new=32),
    1024,
    (OURS, LLAMA, CT2, HF, HF_COMPILED),
    [
        _times("fp32", "fp32", SHORT, 1.0, f"{LLAMA} f32"),
        _times("bf16", "bf16", SHORT, 1.0, f"{LLAMA} bf16"),
        _times("int8", "int8", SHORT, 1.35, f"{LLAMA} q8_0"),
        _times("int4", "int4-all", SHORT, 1.5, f"{LLAMA} q4_0"),
        _times("fp32", "fp32", PREFILL, 1.6, f"{LLAMA} f32"),
        _times("fp32", "fp32", PREFILL, 1.2, f"{CT2} float32"),
        _times("bf16", "bf16", PREFILL, 1.6, f"{LLAMA} bf16"),
        _times("int8", "int8", PREFILL, 1.2, f"{CT2} int8"),
        *_own("long", 0.9),
        *_own("busy", 0.55),
    ],
)
SMOLLM2 = Model(
    "smollm2-135m",
    "SmolLM2 135M",
    Case("long", prompt=2048, new=32),
    2304,
    (OURS, LLAMA, HF),
    [
        _times("fp32", "fp32", SHORT, 1.1, f"{LLAMA} f32"),
        _times("bf16", "bf16", SHORT, 1.3, f"{LLAMA} bf16"),
        _times("int8", "int8", SHORT, 1.7, f"{LLAMA} q8_0"),
        _times("int4", "int4", SHORT, 1.8, f"{LLAMA} q4_0"),
        *(
            Target(group, f"{OURS} {group}", SHORT.kind, least)
            for group, least in (("fp32", 0.85), ("bf16", 0.85), ("int8", 0.8), ("int4", 0.75))
        ),
        *_own("long", 0.9),
        _times("fp32", "fp32", PREFILL, 1.7, f"{LLAMA} f32"),
        _times("bf16", "bf16", PREFILL, 1.8, f"{LLAMA} bf16"),
        _times("int8", "int8", PREFILL, 3.0, f"{LLAMA} q8_0"),
    ],
)
SMOLLM2_FILE = Model(
    "smollm2-135m",
    "SmolLM2 135M Instruct as Q4_1",
    Case("long", prompt=2000, new=32),
    2304,
    (OURS, LLAMA, OPENVINO),
    [
        _times("as stored", "q4_1", SHORT, 2.8, f"{LLAMA} q4_1"),
        Target("as stored", f"{OURS} q4_1", SHORT.kind, 0.75),
        *_own("long", 0.9, ("as stored",)),
        _times("as stored", "q4_1", PREFILL, 5.0, f"{LLAMA} q4_1"),
        *(_times("as stored", "q4_1", PREFILL, 1.8, f"{LLAMA} {form}") for form in ("q4_0", "q8_0", "bf16")),
    ],
    ("as stored",),
    "smollm2",
    "q4_1",
)
LARGER = replace(SMOLLM2, preset="smollm2-360m", title="SmolLM2 360M")
MODELS = {model.name: model for model in (GPT2, SMOLLM2, LARGER, SMOLLM2_FILE)}


@dataclass(frozen=True)
class Effort:
    """How much to measure. `share_of_new` shortens the texts."""

    rounds: int
    limit_rounds: int
    share_of_new: float = 1.0
    slow_starts: bool = True

    def engines(self, model: Model, group: str) -> list[Engine]:
        able = [engine for engine in GROUPS[group] if engine.library in model.libraries]
        return [engine for engine in able if self.slow_starts or not engine.slow_start]

    def cases(self, model: Model) -> tuple[Case, ...]:
        return tuple(replace(case, new=int(case.new * self.share_of_new)) for case in model.cases)


FULL = Effort(rounds=5, limit_rounds=7)
QUICK = Effort(rounds=2, limit_rounds=3, share_of_new=0.25, slow_starts=False)
