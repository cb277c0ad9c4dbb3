"""Which keys an attention query sees: what is masked in a tile, and which tiles are visited at all.

With T queries against the first `length` of S keys, query t stands at position p = offset + t, offset = length - T. It
sees key s where

    s < length,        if CAUSAL s <= p,        with a window s > p - window

(`window` is None where there is none, and then costs nothing.) For a tile of queries these are keys start .. end - 1,
of which whole .. edge - 1 are seen by every query and need no mask; for a tile of keys, the queries that see it divide
in the same way. What lies outside of start .. end is never loaded.
"""

import triton
import triton.language as tl


@triton.jit
def visible_length(lengths, batch, key_count):
    """How many keys of this batch element are there."""
    length = key_count
    if lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths + batch), key_count), 0).to(tl.int32)
    return length


@triton.jit
def key_runs(first_position, last_position, length, window, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """The keys that queries at first_position .. last_position see, as (start, whole, edge, end): whole .. edge - 1 are
    seen by all of them; start .. whole - 1, where a window begins, and edge .. end - 1, on the diagonal or at the
    length, by some. All but the end are multiples of KEY_BLOCK; without a window start and whole are 0.
    """
    start, whole, end = 0, 0, length
    edge = length // KEY_BLOCK * KEY_BLOCK
    if CAUSAL:
        end = tl.maximum(tl.minimum(last_position + 1, length), 0)
        edge = tl.minimum(tl.maximum(first_position + 1, 0), end) // KEY_BLOCK * KEY_BLOCK
    if window is not None:
        start = tl.maximum(first_position - window + 1, 0) // KEY_BLOCK * KEY_BLOCK
        whole = tl.cdiv(tl.maximum(end - window, 0), KEY_BLOCK) * KEY_BLOCK
        whole = tl.maximum(tl.minimum(whole, edge), start)
        edge = tl.maximum(edge, whole)
    return start, whole, edge, end


@triton.jit
def query_runs(
    first_key, length, offset, query_count, window, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """The queries that see any key of first_key .. first_key + KEY_BLOCK - 1, as (start, whole, edge, end): whole ..
    edge - 1 see all of them; start .. whole - 1, on the diagonal, and edge .. end - 1, which a window leaves behind,
    see some. start and whole are multiples of QUERY_BLOCK; without a window edge is the end. Keys that end past the
    length, where nothing is causal, have all their queries in the first run.
    """
    last_key = first_key + KEY_BLOCK - 1
    start, whole = 0, tl.where(last_key < length, 0, query_count)
    end = tl.where(first_key < length, query_count, 0)
    if CAUSAL:
        start = tl.maximum(first_key - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
        whole = tl.maximum(last_key - offset, 0)
    if window is not None:
        end = tl.maximum(tl.minimum(end, last_key + window - offset), 0)
    whole = tl.cdiv(tl.minimum(whole, end), QUERY_BLOCK) * QUERY_BLOCK
    edge = end
    if window is not None:
        edge = tl.maximum(first_key + window - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
        edge = tl.maximum(tl.minimum(edge, end), whole)
    return start, whole, edge, end


@triton.jit
def loop_over(runs, MASKED: tl.constexpr):
    """Where the loop over the tiles that need no mask begins and ends, or the one over those that do: it counts both
    masked runs of (start, whole, edge, end) as one, so that they share its registers.
    """
    start, whole, edge, end = runs
    if MASKED:
        first, last = start, whole + end - edge
    else:
        first, last = whole, edge
    return first, last


@triton.jit
def tile_of(count, runs, MASKED: tl.constexpr):
    """The first row of the tile that such a loop has counted up to."""
    _, whole, edge, _ = runs
    first_row = count
    if MASKED:
        first_row += tl.where(count < whole, 0, edge - whole)
    return first_row


@triton.jit
def sees(positions, keys, length, window, CAUSAL: tl.constexpr):
    """Whether the query at a position sees a key; they broadcast against each other."""
    visible = keys < length
    if CAUSAL:
        visible = visible & (keys <= positions)
    if window is not None:
        visible = visible & (keys > positions - window)
    return visible


@triton.jit
def sees_several(positions, length, window, CAUSAL: tl.constexpr):
    """Whether the query at a position sees more than one key. A softmax over one is constant: its gradient is exactly
    0, not the rounding of dP - delta.
    """
    several = length > 1
    if CAUSAL:
        several = positions > 0
    if window is not None:
        several = several & (window > 1)
    return several


def window_argument(window: int, key_count: int) -> int | None:
    """`window` as the kernels take it: None for 0, and never so large that sums with it overflow."""
    return min(window, key_count) or None
