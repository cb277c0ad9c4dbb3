"""How many bytes a decoded token has to read and how many operations a prompt takes, for GPT-2's architecture.

What the work needs, whatever an engine really does: each weight and each cached key and value once a token; two
operations (a product and a sum) for each weight and each key and value that meets an activation. Left out as far below
a thousandth: the rows looked up in the embeddings, activations, and the arithmetic of LayerNorm, GELU and softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the peers' processes import this file too, and must not hold llmfast or torch
    from llmfast import GPTConfig

GROUP = 32  # weights that share a scale in the formats of about 4 bits, and in llama.cpp's of 8


@dataclass(frozen=True)
class Formats:
    """How an engine stores the blocks' matrices, the head, the vectors (biases, LayerNorm) and the KV cache."""

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
        "q4_0": groups * (GROUP // 2 + 2),
    }[format]


def matrices(config: GPTConfig) -> list[tuple[int, int]]:
    """A block's weights, (rows, columns): attention in and out, feed-forward in and out."""
    C, inner = config.n_embd, config.inner_dim
    return [(3 * C, C), (C, C), (inner, C), (C, inner)]


def weight_bytes(config: GPTConfig, formats: Formats) -> int:
    """The weights a decoded token reads: every block and the head."""
    block = sum(matrix_bytes(formats.blocks, *shape) for shape in matrices(config))
    head = matrix_bytes(formats.head, config.vocab_size, config.n_embd)
    biases = sum(rows for rows, _ in matrices(config))
    vectors = config.n_layer * (biases + 4 * config.n_embd) + 2 * config.n_embd
    return config.n_layer * block + head + vectors * {"f32": 4, "bf16": 2}[formats.vectors]


def cache_bytes(config: GPTConfig, format: str) -> int:
    """Keys and values of one position. An 8-bit head has a float32 scale."""
    head = {"f32": 4 * config.head_dim, "bf16": 2 * config.head_dim, "f16": 2 * config.head_dim}
    head["int8"] = config.head_dim + 4
    return 2 * config.n_layer * config.n_head * head[format]


def decode_bytes(config: GPTConfig, formats: Formats, prompt: int, new: int) -> float:
    """Bytes read for a token, on average over `new` of them after `prompt`: token i attends to prompt + i + 1."""
    positions = prompt + (new + 1) / 2
    return weight_bytes(config, formats) + cache_bytes(config, formats.cache) * positions


def prefill_operations(config: GPTConfig, tokens: int) -> int:
    """Operations for a prompt: every block for every token, causal attention, the head for the last one only."""
    block = sum(rows * columns for rows, columns in matrices(config))
    pairs = tokens * (tokens + 1) // 2  # of a query and a key that it sees; both products are n_embd long
    products = tokens * config.n_layer * block + 2 * config.n_layer * pairs * config.n_embd
    return 2 * (products + config.vocab_size * config.n_embd)


def step_operations(config: GPTConfig, positions: float) -> float:
    """Operations for one token that attends to `positions`: every block, attention, the head."""
    block = sum(rows * columns for rows, columns in matrices(config))
    attention = 2 * config.n_layer * positions * config.n_embd
    return 2 * (config.n_layer * block + attention + config.vocab_size * config.n_embd)


def training_operations(config: GPTConfig, batch: int, tokens: int) -> float:
    """Operations of a step of training: forward with the head for every token, and twice that backward."""
    positions = (tokens + 1) / 2  # on average
    return 3 * batch * tokens * step_operations(config, positions)


def resident_bytes(config: GPTConfig, formats: Formats, capacity: int) -> int:
    """What a decoder has to hold: the weights, the position embeddings, and a cache of `capacity` positions."""
    positions = 4 * config.n_positions * config.n_embd
    return weight_bytes(config, formats) + positions + capacity * cache_bytes(config, formats.cache)
