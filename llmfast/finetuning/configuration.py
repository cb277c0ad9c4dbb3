"""What a fine-tuning run is configured by: every setting with its default, meaning and range."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llmfast.finetuning.head import POOLINGS
from llmfast.quantization.plan import PRECISIONS
from llmfast.training.configuration import OptimizationSettings, RunSettings
from llmfast.training.settings import Configuration, setting

METHODS = ("lora", "adapter", "full", "last-layers", "head")
BESIDE = ("lora", "adapter", "head")  # the model's own weights stay as they are
TASKS = ("text", "chat", "classify", "preference")
# The peak learning rate that suits a method, where none is given.
LEARNING_RATES = {"lora": 5e-4, "adapter": 5e-4, "full": 5e-5, "last-layers": 1e-4, "head": 1e-4}
PREFERENCE_LEARNING_RATE = 5e-5
CLASSIFIER_LEARNING_RATE = 1e-4  # at most: its head suits the model from the first step on


@dataclass(frozen=True)
class MethodSettings:
    """What is trained of the model."""

    method: str = setting(
        "lora",
        "low-rank adapters, bottleneck adapters, all weights, those of the last blocks, or a classifier's head alone",
        options=METHODS,
    )
    rank: int = setting(16, "of the low-rank adapters", least=1, most=4096)
    alpha: float = setting(32.0, "they are scaled by alpha / rank", above=0)
    rslora: bool = setting(False, "by alpha / √rank instead")
    lora_dropout: float = setting(0.0, "of what they are given", least=0, below=1)
    targets: str = setting(
        "all", "layers that get adapters: all, attention, mlp; low-rank ones also by roles, such as query,value"
    )
    bottleneck: int = setting(64, "the width of bottleneck adapters", least=1, most=4096)
    base: str = setting(
        "floats",
        "frozen weights are floats, or in 8 or 4 bits with activation_checkpointing; q4_1 is a GGUF file's Q4_1",
        options=("floats", *PRECISIONS),
    )
    dpo_beta: float = setting(0.1, "how far preferences may lead away from the model: less is further", above=0)
    layers: int = setting(2, "how many blocks last-layers trains, with the final norm", least=1)


@dataclass(frozen=True)
class DataSettings:
    """How files become examples, and examples become batches."""

    task: str = setting(
        "auto",
        "text, chat (also instructions, and prompts with completions), classify, or preference (pairs of answers)",
        options=("auto", *TASKS),
    )
    encoding: str = setting("utf-8", "of the file")
    max_tokens: int = setting(512, "of an example, or of a window of text; at most the model's context", least=8)
    too_long: str = setting("cut", "what becomes of longer examples", options=("cut", "drop", "error"))
    validation: float = setting(0.1, "the share held out to choose the best weights by", least=0, below=1)
    test: float = setting(0.0, "the share held out to be measured before and after, and no more", least=0, below=1)
    group: str = setting("", "the field whose rows with one value are all held out or none")
    text_field: str = setting("", "the field of a classifier's text; found by its name if not given")
    label_field: str = setting("", "the field of its label")
    pooling: str = setting(
        "both", "which hidden states a classifier reads: the last token's, the mean over all, or both", options=POOLINGS
    )
    also: str = setting("", "a text whose perplexity is measured before and after: what was forgotten")
    system: str = setting("", "what a chat without a system message begins with")
    batch_size: int = setting(16, "examples of an optimizer step, over all processes", least=1)
    accumulation: int = setting(1, "parts that a process computes its share of a batch in, to save memory", least=1)
    epochs: float = setting(3.0, "how often each example is seen", above=0)


@dataclass(frozen=True)
class FinetuningOptimizationSettings(OptimizationSettings):
    """The optimizer and its learning rate over the run."""

    lr: float = setting(0.0, "the peak learning rate; 0 for what suits the method", least=0)
    warmup: int = setting(10, "steps of linear warm-up", least=0)
    weight_decay: float = setting(0.0, "of matrices and embeddings", least=0)
    beta2: float = setting(0.999, "AdamW's", least=0, below=1)


@dataclass(frozen=True)
class FinetuningRunSettings(RunSettings):
    """How long, on what, and what is written on the way."""

    steps: int = setting(0, "optimizer steps; 0 for as many as the epochs take", least=0)
    seed: int = setting(0, "decides what is held out, initial weights, order and dropout", least=0)
    evaluate_every: int = setting(0, "steps between evaluations of what is held out; 0 for each epoch", least=0)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0 for each epoch", least=0)
    answers: int = setting(10, "held-out chats that are answered before and after, for the report; 0 for none", least=0)
    answer_tokens: int = setting(128, "of such an answer, at most", least=1)
    sample_prompt: str = setting("Hello!", "what a sample continues, or answers")


@dataclass(frozen=True)
class FinetuningConfig(Configuration):
    """A whole run. `ValueError` in one line for a value of a wrong type or out of range."""

    method: MethodSettings = MethodSettings()
    data: DataSettings = DataSettings()
    optimization: FinetuningOptimizationSettings = FinetuningOptimizationSettings()
    run: FinetuningRunSettings = FinetuningRunSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.validation + self.data.test >= 1:
            raise ValueError(
                f"validation and test must leave something to train on, got {self.data.validation} and {self.data.test}"
            )


# What a run can't change on the way: with another of these it would be another run.
FIXED = {each.name for kind in (MethodSettings, DataSettings) for each in dataclasses.fields(kind)}
FIXED = FIXED - {"lora_dropout", "accumulation", "epochs", "also"} | {"seed", "optimizer"}
