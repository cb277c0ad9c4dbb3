"""How many bytes a decoded token has to read and how many operations a prompt takes, for any architecture.

What the work needs, whatever an engine really does: each weight and each cached key and value once a token; two
operations (a product and a sum) for each weight and each key and value that meets an activation. Left out as far below
a thousandth: the rows looked up in the embeddings, activations, and the arithmetic of norms, activations and softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the peers' processes import this file too, and must not hold llmfast or torch
    from llmfast.models import ModelConfig

GROUP = 32  # weights that share a scale in the formats of about 4 bits, and in llama.cpp's of 8


@dataclass(frozen=True)
class Formats:
    """How an engine stores the blocks' matrices, the head, the vectors (biases, norms) and the KV cache."""

    blocks: str
    head: str
    cache: str
    vectors: str = "f32"


def matrix_bytes(format: str, rows: int, columns: int) -> int:
    """A weight (rows, columns) with its scales. Rows are outputs; groups run along them."""
    groups = rows * -(-columns // GROUP)
    return {
        "f32": 4 * rows * columns,
        "bf16": 2 * rows * columns,
        "f16": 2 * rows * columns,
        "int8": rows * columns + 4 * rows,  # a float32 for each row
        "q8_0": groups * (GROUP + 2),  # 2 bytes for each group
        "int4": groups * (GROUP // 2 + 2),
        "q4_1": groups * (GROUP // 2 + 4),
        "q4_k": groups * (GROUP // 2 + 2) + 4 * rows * -(-columns // (8 * GROUP)),
        "q4_0": groups * (GROUP // 2 + 2),
    }[format]


def weight_bytes(config: ModelConfig, formats: Formats) -> int:
    """The weights a decoded token reads: every block, the last norm and the head."""
    read = [p for p in config.parameters() if p.role not in ("token_embedding", "position_embedding", "head")]
    blocks = sum(matrix_bytes(formats.blocks, p.shape[0], p.shape[1]) for p in read if p.is_matrix)
    vectors = sum(p.size for p in read if not p.is_matrix) * {"f32": 4, "bf16": 2}[formats.vectors]
    return blocks + vectors + matrix_bytes(formats.head, config.vocab_size, config.width)


def cache_bytes(config: ModelConfig, format: str) -> int:
    """Keys and values of one position. An 8-bit head has a float32 scale."""
    head = {"f32": 4 * config.head_dim, "bf16": 2 * config.head_dim, "f16": 2 * config.head_dim}
    head["int8"] = config.head_dim + 4
    return 2 * config.blocks * config.key_heads * head[format]


def decode_bytes(config: ModelConfig, formats: Formats, prompt: int, new: int) -> float:
    """Bytes read for a token, on average over `new` of them after `prompt`: token i attends to prompt + i + 1."""
    positions = prompt + (new + 1) / 2
    return weight_bytes(config, formats) + cache_bytes(config, formats.cache) * positions


def prefill_operations(config: ModelConfig, tokens: int) -> float:
    """Operations for a prompt: every block for every token, causal attention, the head for the last one only."""
    head = 2 * config.vocab_size * config.width
    return tokens * (config.flops_per_token((tokens + 1) / 2) - head) + head


def step_operations(config: ModelConfig, positions: float) -> float:
    """Operations for one token that attends to `positions`: every block, attention, the head."""
    return config.flops_per_token(positions)


def training_operations(config: ModelConfig, batch: int, tokens: int) -> float:
    """Operations of a step of training: forward with the head for every token, and twice that backward."""
    positions = (tokens + 1) / 2  # on average
    return 3 * batch * tokens * step_operations(config, positions)


def resident_bytes(config: ModelConfig, formats: Formats, capacity: int) -> int:
    """What a decoder has to hold: the weights, the position embeddings, and a cache of `capacity` positions."""
    positions = sum(4 * p.size for p in config.parameters() if p.role == "position_embedding")
    return weight_bytes(config, formats) + positions + capacity * cache_bytes(config, formats.cache)
