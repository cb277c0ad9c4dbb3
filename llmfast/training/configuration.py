"""What a training run is configured by: every setting with its default, meaning and range (`settings` has the rest)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmfast.training.settings import Configuration, setting


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
    lr_scales: str = setting(
        "",
        "factors of it, such as head=10,vector=0.5, by kinds of weights: matrix, embedding, vector; in fine-tuning "
        "also adapter_a, adapter_b, and head, a classifier's",
    )
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
    patience: int = setting(0, "evaluations without a better one after which a run stops; 0 for never", least=0)
    checkpoint_every: int = setting(250, "steps between checkpoints; 0 for the end only", least=0)
    keep_checkpoints: int = setting(2, "how many of them are kept", least=1)
    saved_precision: str = setting("fp32", "of the model; checkpoints are fp32", options=("fp32", "bf16", "fp16"))
    log_every: int = setting(10, "steps between lines of the display", least=1)
    sample_every: int = setting(0, "steps between samples; 0 for never", least=0)
    sample_prompt: str = setting("\n", "what a sample continues")
    tensorboard: bool = setting(False, "write event files for TensorBoard too")


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


@dataclass(frozen=True)
class TrainingConfig(Configuration):
    """A whole run. `ValueError` in one line for a value of a wrong type or out of range."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    run: RunSettings = RunSettings()

    presets: ClassVar = PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.n_embd % self.model.n_head:
            raise ValueError(f"n_head must divide n_embd, but {self.model.n_head} does not divide {self.model.n_embd}")


def configure(
    preset: str | None = None, file: str | Path | None = None, changes: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """`TrainingConfig.configure`: defaults, then the preset, then the file, then single changes."""
    return TrainingConfig.configure(preset, file, changes)
