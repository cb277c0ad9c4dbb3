"""Rotary positions (RoPE: Su et al., arXiv:2104.09864): pairs of channels turned by an angle, forward and backward.

    a' = a cos - b sin        b' = b cos + a sin

The first R channels of a head are its pairs: channels i and i + R/2, or if INTERLEAVED 2i and 2i + 1; the others
pass. A rotation's gradient is the gradient turned the other way, so that backward is the same kernel with -sin.

A program turns a tile of rows, of which a token has one for each head, the heads of a token together: they share their
angles.
"""

import torch
import triton
import triton.language as tl

from .attention_tiles import UNIT, empty_heads_last
from .gelu import CANDIDATES, ElementwiseTile
from .launch import ceil_div, next_power_of_2, on_device, scheduled
from .tuning import choose
from .tuning import describe as describe_tile


@triton.jit(do_not_specialize=[
    "rows", "heads", "tiles", "angle_batch", "x_batch", "x_head", "x_row", "out_batch", "out_head", "out_row",
])  # fmt: skip
def _rotary_kernel(
    x, cos, sin, out, rows, heads, tiles, angle_batch, x_batch, x_head, x_row, out_batch, out_head, out_row,
    STRIDE_UNIT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS of a sequence's rows, in the order (token, head). Strides of rows come in units of STRIDE_UNIT elements."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    token, head = (row // heads).to(tl.int64)[:, None], (row % heads).to(tl.int64)[:, None]
    there = (row < rows)[:, None]
    x += (batch * x_batch + token * x_row + head * x_head) * STRIDE_UNIT
    out += (batch * out_batch + token * out_row + head * out_head) * STRIDE_UNIT
    if HALF > 0:
        pair = tl.arange(0, HALF_BLOCK)[None, :]
        mask = there & (pair < HALF)
        angle = batch * angle_batch + token * HALF + pair
        cosine = tl.load(cos + angle, mask=mask, other=0.0)
        sine = tl.load(sin + angle, mask=mask, other=0.0)
        if INVERSE:
            sine = -sine
        if INTERLEAVED:
            channel = tl.arange(0, 2 * HALF_BLOCK)[None, :]
            both = tl.load(x + channel, mask=there & (channel < 2 * HALF), other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(both, [ROWS, HALF_BLOCK, 2]))
            turned = tl.join(a * cosine - b * sine, b * cosine + a * sine)
            turned = tl.reshape(turned, [ROWS, 2 * HALF_BLOCK]).to(out.dtype.element_ty)
            tl.store(out + channel, turned, mask=there & (channel < 2 * HALF))
        else:
            a = tl.load(x + pair, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x + HALF + pair, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + pair, (a * cosine - b * sine).to(out.dtype.element_ty), mask=mask)
            tl.store(out + HALF + pair, (b * cosine + a * sine).to(out.dtype.element_ty), mask=mask)
    if REST > 0:
        channel = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        mask = there & (channel < 2 * HALF + REST)
        tl.store(out + channel, tl.load(x + channel, mask=mask, other=0.0), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launching


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool) -> torch.Tensor:
    out = empty_heads_last(x)
    if x.numel() == 0:
        return out
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, head_dim = x.shape
    half = cos.shape[2]
    rest = head_dim - 2 * half
    strides = (*x.stride()[:3], *out.stride()[:3])
    unit = UNIT.value if all(stride % UNIT.value == 0 for stride in strides) else 1  # aligned rows load as vectors

    def launch(tile: ElementwiseTile) -> None:
        rows = max(1, tile.block // next_power_of_2(head_dim))
        tiles = ceil_div(tokens * heads, rows)
        with on_device(x):
            _rotary_kernel[(tiles * batch,)](
                x, cos, sin, out, tokens * heads, heads, tiles, 0 if cos.shape[0] == 1 else tokens * half,
                *(stride // unit for stride in strides), STRIDE_UNIT=unit, HALF=half, REST=rest,
                INTERLEAVED=interleaved, INVERSE=inverse, ROWS=rows, HALF_BLOCK=next_power_of_2(half),
                REST_BLOCK=next_power_of_2(rest), **scheduled(tile),
            )  # fmt: skip

    launch(choose("rotary", ElementwiseTile, x, CANDIDATES, launch))
    return out


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (B, H, T, D), cos and sin (B or 1, T, R/2) in float32 -> (B, H, T, D)."""
    return _turn(x, cos, sin, interleaved, False)


def rotary_backward(grad_out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The gradient of x."""
    return _turn(grad_out, cos, sin, interleaved, True)


def describe(x: torch.Tensor, *_: object, **__: object) -> str:
    """Which configuration `rotary` takes for this tensor."""
    return describe_tile("rotary", ElementwiseTile, x)
