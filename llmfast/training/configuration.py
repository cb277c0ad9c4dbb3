"""What a run is: its model, data, optimization and run settings, from a preset, a TOML file and single settings.

    defaults  <-  preset  <-  run.toml  <-  --set key=value

Every key is the field of one of four dataclasses, and unique among them: `lr`, `optimization.lr` and, in a file, `lr`
under `[optimization]` mean the same. Values are typed and checked; an unknown key is an error that names the nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INFINITY = float("inf")


def setting(
    default: Any,
    meaning: str,
    *,
    least: float = -INFINITY,
    most: float = INFINITY,
    above: float = -INFINITY,
    below: float = INFINITY,
    options: Sequence[str] = (),
) -> Any:
    """A field with its meaning (for `--print-config`) and its range."""
    limits = {"at least": least, "at most": most, "above": above, "below": below}
    limits = {words: limit for words, limit in limits.items() if abs(limit) != INFINITY}
    return field(default=default, metadata={"meaning": meaning, "limits": limits, "options": options})


@dataclass(frozen=True)
class ModelSettings:
    """The family and the shape, under GPT-2's names; the vocabulary comes from the tokenizer."""

    family: str = setting("gpt2", "gpt2, llama, mistral, qwen2, qwen3, smollm3, granite")
    n_layer: int = setting(4, "blocks", least=1, most=10_000)
    n_head: int = setting(6, "attention heads, a divisor of n_embd", least=1)
    n_key_head: int = setting(0, "heads of keys and values, a divisor of n_head; 0 for n_head", least=0)
    n_embd: int = setting(192, "width", least=1)
    n_inner: int = setting(0, "width of the feed-forward layers; 0 for what the family usually has", least=0)
    n_positions: int = setting(256, "the context, in tokens", least=1)
    dropout: float = setting(0.0, "of embeddings and residual branches", least=0, below=1)
    attention_dropout: float = setting(0.0, "of the weights of attention", least=0, below=1)
    tie_word_embeddings: bool = setting(True, "the head is the token embedding")


@dataclass(frozen=True)
class DataSettings:
    """How text becomes tokens, and tokens become batches."""

    encoding: str = setting("utf-8", "of text files: utf-8, latin-1, …")
    tokenizer: str = setting("bpe", "char, word, bpe, wordpiece, gpt2, or the directory of a trained one")
    vocab_size: int = setting(2000, "the largest vocabulary of a tokenizer that is trained", least=2)
    validation: float = setting(0.1, "the share of the text that is kept out of training", least=0, below=1)
    validation_documents: int = setting(0, "the last so many documents are kept out, instead of a share", least=0)
    rows: str = setting(
        "windows",
        "of a batch: windows of the text as one stream, or a document each, for texts shorter than n_positions",
        options=("windows", "documents"),
    )
    batch_size: int = setting(16, "sequences of an optimizer step, over all processes", least=1)
    accumulation: int = setting(1, "parts that a process computes its share of a batch in, to save memory", least=1)


@dataclass(frozen=True)
class OptimizationSettings:
    """The optimizer and its learning rate over the run."""

    optimizer: str = setting(
        "adamw", "adamw, sgd, or muon (with adamw for what is no matrix of a block)", options=("adamw", "sgd", "muon")
    )
    lr: float = setting(2e-3, "the peak learning rate", above=0)
    schedule: str = setting("cosine", "after the warm-up", options=("cosine", "linear", "constant"))
    warmup: int = setting(100, "steps of linear warm-up", least=0)
    hold: float = setting(0.0, "the share of the steps after it that stay at the peak", least=0, below=1)
    final_lr: float = setting(0.0, "the learning rate at the end, as a share of the peak", least=0, most=1)
    weight_decay: float = setting(0.1, "of matrices and embeddings", least=0)
    beta1: float = setting(0.9, "AdamW's, and the momentum of SGD", least=0, below=1)
    beta2: float = setting(0.99, "AdamW's", least=0, below=1)
    momentum: float = setting(0.95, "Muon's", least=0, below=1)
    clip: float = setting(1.0, "the largest norm of the gradient; 0 for no limit", least=0)


@dataclass(frozen=True)
class RunSettings:
    """How long, on what, and what is written on the way."""

    steps: int = setting(1000, "optimizer steps", least=1)
    seed: int = setting(0, "decides initial weights, data order and dropout", least=0)
    precision: str = setting(
        "auto", "of forward and backward; the weights themselves are fp32", options=("auto", "fp32", "bf16", "fp16")
    )
    device: str = setting("auto", "auto, cpu, cuda, …")
    backend: str = setting("auto", "auto, pytorch, cpp, triton, or OP=NAME,OP=NAME")
    compile: bool = setting(False, "torch.compile the model")
    activation_checkpointing: bool = setting(False, "compute a block's activations again in backward, to save memory")
    evaluate_every: int = setting(250, "steps between evaluations of the whole validation split; 0 for never", least=0)
    checkpoint_every: int = setting(250, "steps between checkpoints; 0 for the end only", least=0)
    keep_checkpoints: int = setting(2, "how many of them are kept", least=1)
    saved_precision: str = setting("fp32", "of the model; checkpoints are fp32", options=("fp32", "bf16", "fp16"))
    log_every: int = setting(10, "steps between lines of the display", least=1)
    sample_every: int = setting(0, "steps between samples; 0 for never", least=0)
    sample_prompt: str = setting("\n", "what a sample continues")
    tensorboard: bool = setting(False, "write event files for TensorBoard too")


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run. `ValueError` in one line for a value of a wrong type or out of range."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    run: RunSettings = RunSettings()

    def __post_init__(self) -> None:
        for section in SECTIONS:
            for each in dataclasses.fields(getattr(self, section)):
                _check(each, getattr(getattr(self, section), each.name))
        if self.model.n_embd % self.model.n_head:
            raise ValueError(f"n_head must divide n_embd, but {self.model.n_head} does not divide {self.model.n_embd}")

    def replace(self, changes: Mapping[str, Any]) -> TrainingConfig:
        """The same with some settings changed: {"lr": 1e-3} or {"optimization.lr": "1e-3"}, strings are converted."""
        by_section: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            section, each = _find(key)
            by_section.setdefault(section, {})[each.name] = _converted(each, value)
        sections = {name: dataclasses.replace(getattr(self, name), **some) for name, some in by_section.items()}
        return dataclasses.replace(self, **sections)

    def to_document(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> TrainingConfig:
        """From tables by section, as in a TOML file; a `preset` beside them is what they start from."""
        config = cls.preset(document["preset"]) if "preset" in document else cls()
        return config.replace(_flattened(document))

    @classmethod
    def preset(cls, name: str) -> TrainingConfig:
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}{_nearest(str(name), PRESETS)}; known: {', '.join(PRESETS)}")
        return cls().replace(PRESETS[name])

    def to_toml(self) -> str:
        """A file that `--config` takes, each setting with its meaning."""
        lines = []
        for section in SECTIONS:
            lines.append(f"[{section}]")
            for each in dataclasses.fields(getattr(self, section)):
                value = json.dumps(getattr(getattr(self, section), each.name), ensure_ascii=False)
                value = value.replace("\x7f", "\\u007f")  # JSON's strings are TOML's but for this character
                options = f": {', '.join(each.metadata['options'])}" if each.metadata["options"] else ""
                lines.append(f"{each.name} = {value}  # {each.metadata['meaning']}{options}")
            lines.append("")
        return "\n".join(lines)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; `ValueError` naming the file where it is none, `OSError` where it can't be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def configure(
    preset: str | None = None, file: str | Path | None = None, changes: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """Defaults, then the preset, then the file, then single changes."""
    document = read_toml(file) if file is not None else {}
    if preset is not None:
        document = document | {"preset": preset}
    try:
        config = TrainingConfig.from_document(document)
    except ValueError as error:
        raise ValueError(f"{file}: {error}" if file is not None else str(error)) from None
    return config.replace(changes or {})


SECTIONS = ("model", "data", "optimization", "run")
SECTION_TYPES = dict(zip(SECTIONS, (ModelSettings, DataSettings, OptimizationSettings, RunSettings), strict=True))
FIELDS = {each.name: (section, each) for section, kind in SECTION_TYPES.items() for each in dataclasses.fields(kind)}
TYPES = {name: kind for section in SECTION_TYPES.values() for name, kind in typing.get_type_hints(section).items()}

PRESETS: dict[str, dict[str, Any]] = {
    # nanoGPT's two forms of character-level Shakespeare: for a laptop's CPU, and for a GPU.
    "shakespeare-char-cpu": dict(
        n_layer=4, n_head=4, n_embd=128, n_positions=64, dropout=0.0, tokenizer="char", batch_size=12,
        lr=4e-3, steps=2000, warmup=100, evaluate_every=250, checkpoint_every=500, sample_every=500,
    ),
    "shakespeare-char": dict(
        n_layer=6, n_head=6, n_embd=384, n_positions=256, dropout=0.2, attention_dropout=0.2, tokenizer="char",
        batch_size=64, lr=1e-3, final_lr=0.1, steps=5000, warmup=100, evaluate_every=250, checkpoint_every=500,
        sample_every=500,
    ),
    # The embedded model, of tinystories.txt: 12 epochs of 2 million tokens. More dropout (0.15 to 0.3, and of
    # attention), more decay and fewer epochs were all worse after as many steps.
    "stories": dict(
        n_layer=6, n_head=4, n_embd=256, n_positions=512, dropout=0.1, tokenizer="bpe", vocab_size=4000,
        validation_documents=500, rows="documents", batch_size=24, optimizer="muon", lr=4e-3, schedule="linear",
        hold=0.3, steps=2000, warmup=50, beta2=0.95, saved_precision="bf16", evaluate_every=250,
        checkpoint_every=250, sample_every=500, sample_prompt="Once upon a time",
    ),
    # A small model of the Llama family: 7.9 million parameters, minutes on a CPU.
    "llama-small": dict(
        family="llama", n_layer=4, n_head=6, n_key_head=2, n_embd=384, n_positions=256, tokenizer="bpe",
        vocab_size=2000, batch_size=16, lr=2e-3, steps=1000, warmup=50, beta2=0.95, evaluate_every=250,
        checkpoint_every=250, sample_every=500,
    ),
    # GPT-2 124M, half a million tokens a step, 10 billion in all: for a node of GPUs.
    "gpt2": dict(
        n_layer=12, n_head=12, n_embd=768, n_positions=1024, dropout=0.0, tokenizer="gpt2", validation=0.001,
        batch_size=512, accumulation=16, lr=6e-4, final_lr=0.1, steps=20_000, warmup=700, beta2=0.95,
        precision="bf16", evaluate_every=1000, checkpoint_every=1000, sample_every=1000,
    ),
}  # fmt: skip


def _find(key: str) -> tuple[str, dataclasses.Field[Any]]:
    """The section and the field that a key names. `ValueError` names the nearest where it names none."""
    section, _, name = key.rpartition(".")
    if name in FIELDS and section in ("", FIELDS[name][0]):
        return FIELDS[name]
    if section and section not in SECTIONS:
        raise ValueError(f"unknown section {section!r}{_nearest(section, SECTIONS)}; known: {', '.join(SECTIONS)}")
    if name in FIELDS:
        raise ValueError(f"unknown setting {key!r}: {name} belongs to {FIELDS[name][0]}")
    within = [known for known, (home, _) in FIELDS.items() if section in ("", home)]
    raise ValueError(f"unknown setting {key!r}{_nearest(name, within) or '; known: ' + ', '.join(within)}")


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _flattened(document: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": each for name, each in value.items()}
        elif key != "preset":
            flat[key] = value
    return flat


def _converted(each: dataclasses.Field[Any], value: Any) -> Any:
    """`value` in the field's type; text is read as the type asks, and a whole number serves as a float."""
    kind = TYPES[each.name]
    try:
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if kind is int and isinstance(value, str):
            return int(value)
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, KeyError):
        raise ValueError(f"{each.name} must be {_words(kind)}, got {value!r}") from None
    return value


def _check(each: dataclasses.Field[Any], value: Any) -> None:
    kind = TYPES[each.name]
    right = type(value) is kind or (kind is float and type(value) is int)
    if not right or value != value:
        raise ValueError(f"{each.name} must be {_words(kind)}, got {value!r}")
    options = each.metadata["options"]
    if options and value not in options:
        raise ValueError(f"{each.name} must be {', '.join(options)}, got {value!r}{_nearest(value, options)}")
    passes = {"at least": lambda x, y: x >= y, "at most": lambda x, y: x <= y}
    passes |= {"above": lambda x, y: x > y, "below": lambda x, y: x < y}
    limits = each.metadata["limits"]
    if value in (INFINITY, -INFINITY) or not all(passes[words](value, limit) for words, limit in limits.items()):
        wanted = " and ".join(f"{words} {limit:g}" for words, limit in limits.items()) or "finite"
        raise ValueError(f"{each.name} must be {wanted}, got {value!r}")


def _words(kind: type | types.UnionType) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[typing.cast(type, kind)]
