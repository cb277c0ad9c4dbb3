"""What the attention kernels share: which tile a program works on, rows in and out, dropout, and a launch's arguments.

Dropout is regenerated, never stored: element (query t, key s) of head bh is kept when the first word of Philox4x32-10
(Salmon et al., SC 2011) at counter (s, t, bh, 0) under the seed is large enough.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from .launch import Schedule, next_power_of_2

# Exponentials are powers of two, with log2(e) folded into the scale.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Kernels get strides in this unit and multiply it back as a constant. That tells the compiler that rows are aligned and
# loads can be vectors, and the strides themselves, which vary with the sequence length, specialise nothing.
UNIT = tl.constexpr(16)
# Offsets inside one tile are 32-bit, to save registers; offsets of the tile itself are 64-bit. A tile has at most 256
# rows.
LARGEST_STRIDE = 2**31 // 256 - 1
# Heads whose keys and values fit in this part of the L2 cache run side by side.
CACHE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class AttentionTile(Schedule):
    """The tile sizes of an attention kernel, and how Triton schedules it."""

    query_block: int
    key_block: int
    warps: int
    stages: int


@triton.jit
def head_and_tile(program, tiles, heads, heads_together):
    """Which (batch, head) and which tile a program works on.

    Heads go in groups that fit the cache together; within a group all first tiles come before all second ones, so
    that when tile 0 is the longest, long work starts first and the short tiles fill the gaps at the end.
    """
    group = program // (heads_together * tiles)
    first_head = group * heads_together
    heads_here = tl.minimum(heads - first_head, heads_together)
    within = program - group * heads_together * tiles
    return first_head + within % heads_here, within // heads_here


@triton.jit
def load_rows(
    base, first_row, row_stride, rows_end, dims, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Rows first_row .. first_row + ROWS - 1 of a (rows, HEAD_DIM) matrix; rows at or past rows_end, and the padding,
    read as 0.
    """
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + rows[:, None] * row_stride + dims[None, :]
    if MASK_ROWS and dims.shape[0] != HEAD_DIM:
        return tl.load(pointers, mask=(rows[:, None] < rows_end - first_row) & (dims[None, :] < HEAD_DIM), other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < rows_end - first_row, other=0.0)
    elif dims.shape[0] != HEAD_DIM:
        return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, values, first_row, row_stride, rows_end, dims, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + rows[:, None] * row_stride + dims[None, :]
    mask = (rows[:, None] < rows_end - first_row) & (dims[None, :] < HEAD_DIM)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_log_sum(pointers, mask):
    """lse in powers of two. Queries that saw no key, or are not there, get probability 2^(s - inf) = 0."""
    log_sum = tl.load(pointers, mask=mask, other=float("-inf"))
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2_E)


@triton.jit
def survives(seed, queries, keys, head, drop_below):
    """Which probabilities dropout keeps; queries and keys broadcast against each other."""
    word, _, _, _ = tl.philox(seed, keys.to(tl.uint32), queries.to(tl.uint32), head.to(tl.uint32), 0)
    return (word >> 1) >= drop_below.to(tl.uint32)


# ------------------------------------------------------------------------------------------------------------ launching


def empty_heads_last(like: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) laid out as (B, T, H, D), so that merging the heads again is a view."""
    batch, heads, rows, dim = like.shape
    return like.new_empty((batch, rows, heads, dim)).transpose(1, 2)


def in_units(*tensors: torch.Tensor) -> list[int]:
    """The batch, head and row strides of each tensor, in the unit."""
    return [stride // UNIT.value for tensor in tensors for stride in tensor.stride()[:3]]


def walkable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernels can walk it (the ordinary case), else a copy that they can.

    Rows must be contiguous, every stride a multiple of the unit, and a tile's offsets fit 32 bits.
    """
    strides = tensor.stride()
    aligned = all(stride % UNIT.value == 0 for stride in strides[:3])
    return tensor if strides[3] == 1 and aligned and strides[2] <= LARGEST_STRIDE else tensor.contiguous()


def dropout_arguments(dropout_p: float, dropout_seed: torch.Tensor | None) -> tuple[torch.Tensor | None, float, int]:
    """(seed or None, what kept probabilities are multiplied with, below which Philox word (of 31 bits) one is
    dropped)
    """
    if dropout_p <= 0.0:
        return None, 1.0, 0
    if dropout_seed is None:
        raise ValueError(f"causal_attention: dropout_p is {dropout_p} but dropout_seed is None")
    if dropout_p >= 1.0:
        return dropout_seed, 0.0, 2**31 - 1
    return dropout_seed, 1.0 / (1.0 - dropout_p), int(dropout_p * 2**31)


def heads_in_cache(heads: int, rows: int, tensor: torch.Tensor) -> int:
    """How many heads, of two (rows, D) matrices each, share the cache."""
    return max(1, min(heads, CACHE_BYTES // max(2 * rows * tensor.shape[3] * tensor.element_size(), 1)))


def precision(tensor: torch.Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"  # says nothing for half precision


def head_dim_block(tensor: torch.Tensor) -> int:
    """The head dim rounded up to what a tile can have."""
    return max(16, next_power_of_2(tensor.shape[3]))


def tile_key(tensor: torch.Tensor) -> dict[str, int]:
    """What every attention configuration is found under."""
    return {"element_bytes": tensor.element_size(), "head_dim": head_dim_block(tensor)}


@cache  # every launch asks, and making a hundred tiles takes longer than ten launches
def candidates(query_blocks: tuple[int, ...], key_blocks: tuple[int, ...]) -> tuple[AttentionTile, ...]:
    """What a search tries."""
    return tuple(
        AttentionTile(query_block, key_block, warps, stages)
        for query_block in query_blocks
        for key_block in key_blocks
        for warps in (4, 8)
        for stages in (1, 2, 3, 4)
    )
