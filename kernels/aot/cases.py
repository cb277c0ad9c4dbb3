"""Calls of every op that together reach every kernel under every configuration that a family ships.

A call is (dtype, what it is in words, a function that launches). Tensors are empty and on the CPU: nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from llmfast.quantization.formats import layout

from .. import (
    attention_forward,
    causal_attention,
    gated_linear,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    quantized_linear,
    rms_norm,
    rotary,
)
from ..attention_forward import ForwardTile
from ..configurations import configuration, configurations, using
from ..launch import gpu_family
from ..matmul import MatrixTile

Call = tuple[str, str, Callable[[], object]]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128, 256)
# A width for every line of the norms' tables, GPT-2's narrowest and widest, and one that is read in pieces.
WIDTHS = (48, 127, 256, 512, 768, 1600, 3072, 8192, 10240)
# The plainest call, and for each configuration, ordinary or "heavy", the most burdened one that it serves.
PLAIN, ORDINARY, HEAVY = "", "ragged, padded, negative scale", "dropout, grouped, ragged, padded"
WINDOW, HEAVY_WINDOW = "window, ragged, padded", "window, dropout, grouped, ragged, padded"
BIDIRECTIONAL, HEAVY_BIDIRECTIONAL = "bidirectional, ragged, padded", "bidirectional, dropout, ragged, padded"


def calls(family: str) -> Iterator[Call]:
    """bfloat16 in full; float32, whose kernels multiply without matrix units, and float16, which takes what bfloat16
    takes, at the calls that say the most.
    """
    yield from _attention("bfloat16", HEAD_DIMS, (ORDINARY, HEAVY, WINDOW, HEAVY_WINDOW, BIDIRECTIONAL))
    yield from _attention("bfloat16", HEAD_DIMS, (HEAVY_BIDIRECTIONAL,))
    yield from _attention("bfloat16", (64, 128), (PLAIN,))
    yield from _attention("float32", HEAD_DIMS, (ORDINARY, HEAVY, HEAVY_WINDOW))
    yield from _attention("float16", (64,), (PLAIN,))
    yield from _decoding("bfloat16", HEAD_DIMS, (PLAIN, "grouped, ragged", "window, grouped, ragged"))
    yield from _decoding("float32", HEAD_DIMS, ("grouped, ragged", "window, grouped, ragged"))
    yield from _decoding("float16", (64,), (PLAIN,))
    if family in ("hopper", "blackwell"):
        yield from _descriptors("bfloat16", (64, 128))
    yield from _layer_norm("bfloat16", WIDTHS)
    yield from _layer_norm("float32", (768, 8192, 10240))
    yield from _layer_norm("float16", (768,))
    yield from _rms_norm("bfloat16", WIDTHS)
    yield from _rms_norm("float32", (768, 8192, 10240))
    yield from _rms_norm("float16", (768,))
    yield from _linear("bfloat16", family)
    yield from _linear("float32", family)
    yield from _linear("float16", family)
    yield from _gated_linear("bfloat16", family)
    yield from _gated_linear("float32", family)
    yield from _gated_linear("float16", family)
    for name in DTYPES:
        yield from _quantized_linear(name, family)
        yield from _gelu(name)
        yield from _rotary(name)
        yield from _cross_entropy(name)


# ------------------------------------------------------------------------------------------------------------ attention


def _tensors(dtype: torch.dtype, head_dim: int, case: str, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of one projection, as the model makes them; grouped ones each on their own."""
    if "padded" in case and head_dim > 32:  # 48, 80 or 160 channels in tiles of 64, 128 or 256
        head_dim = head_dim * 5 // 8 // 16 * 16 + (16 if head_dim == 64 else 0)
    if "grouped" in case or queries != keys:
        group = 2 if "grouped" in case else 1
        k = torch.empty(2, 2, keys, head_dim, dtype=dtype)
        return torch.empty(2, 2 * group, queries, head_dim, dtype=dtype), k, torch.empty_like(k)
    return torch.empty(2, keys, 3, 2, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)


def _attention(name: str, head_dims: tuple[int, ...], cases: tuple[str, ...]) -> Iterator[Call]:
    for head_dim in head_dims:
        for case in cases:

            def call(head_dim: int = head_dim, case: str = case) -> None:
                q, k, v = _tensors(DTYPES[name], head_dim, case, 256, 256)
                arguments = (
                    -0.1 if "negative" in case else 0.1,
                    0.1 if "dropout" in case else 0.0,
                    torch.zeros(1, dtype=torch.int64) if "dropout" in case else None,
                    torch.zeros(2, dtype=torch.int64) if "ragged" in case else None,
                    100 if "window" in case else 0,
                    "bidirectional" not in case,
                )
                out, lse = causal_attention.causal_attention(q, k, v, *arguments)
                causal_attention.causal_attention_backward(out, q, k, v, out, lse, *arguments)

            yield name, _words(f"head dim {head_dim}", case), call


def _decoding(name: str, head_dims: tuple[int, ...], cases: tuple[str, ...]) -> Iterator[Call]:
    for head_dim in head_dims:
        for case in cases:

            def call(head_dim: int = head_dim, case: str = case) -> None:
                q, k, v = _tensors(DTYPES[name], head_dim, case, 1, 1024)
                lengths = torch.zeros(2, dtype=torch.int64) if "ragged" in case else None
                window = 100 if "window" in case else 0
                causal_attention.causal_attention(q, k, v, 0.1, 0.0, None, lengths, window, True)

            yield name, _words(f"head dim {head_dim}", case), call


def _descriptors(name: str, head_dims: tuple[int, ...]) -> Iterator[Call]:
    """What the shipped tiles would be with descriptors: off by default, but there to be timed."""
    for head_dim in head_dims:

        def call(head_dim: int = head_dim) -> None:
            q, k, v = _tensors(DTYPES[name], head_dim, PLAIN, 256, 256)
            tile = configuration("attention_forward", ForwardTile, gpu_family(q), **attention_forward.key(q, False))
            with using("attention_forward", replace(tile, descriptors=True)):
                causal_attention.causal_attention(q, k, v, 0.1, 0.0, None, None, 0, True)

        yield name, f"head dim {head_dim}, descriptors", call


# --------------------------------------------------------------------------------------------------- element by element


def _layer_norm(name: str, widths: tuple[int, ...]) -> Iterator[Call]:
    for width in widths:

        def call(width: int = width) -> None:
            x, weight = torch.empty(4096, width, dtype=DTYPES[name]), torch.empty(width, dtype=DTYPES[name])
            y, mean, rstd = layer_norm.layer_norm(x, weight, weight, 1e-5)
            layer_norm.layer_norm_backward(y, x, weight, mean, rstd)

        def call_add(width: int = width) -> None:
            x, weight = torch.empty(4096, width, dtype=DTYPES[name]), torch.empty(width, dtype=DTYPES[name])
            bias = weight if width == 768 else None
            y, total, mean, rstd = layer_norm.add_layer_norm(x, x, weight, bias, 1e-5)
            layer_norm.add_layer_norm_backward(y, y, total, weight, mean, rstd)

        yield name, f"width {width}", call
        yield name, f"width {width}, add", call_add


def _rms_norm(name: str, widths: tuple[int, ...]) -> Iterator[Call]:
    for width in widths:

        def call(width: int = width) -> None:
            x, weight = torch.empty(4096, width, dtype=DTYPES[name]), torch.empty(width, dtype=DTYPES[name])
            y, rstd = rms_norm.rms_norm(x, weight, 1e-6)
            rms_norm.rms_norm_backward(y, x, weight, rstd)

        def call_add(width: int = width) -> None:
            x, weight = torch.empty(4096, width, dtype=DTYPES[name]), torch.empty(width, dtype=DTYPES[name])
            y, total, rstd = rms_norm.add_rms_norm(x, x, weight, 1e-6)
            rms_norm.add_rms_norm_backward(y, y, total, weight, rstd)

        yield name, f"width {width}", call
        yield name, f"width {width}, add", call_add


def _rotary(name: str) -> Iterator[Call]:
    # Channels of a head, and of those that turn: Llama's, a part of them, and an odd part of rows that start anywhere.
    for head_dim, turned in ((64, 64), (128, 128), (80, 32), (50, 20)):
        for interleaved in (False, True):

            def call(head_dim: int = head_dim, turned: int = turned, interleaved: bool = interleaved) -> None:
                x = torch.empty(2, 256, 8, head_dim, dtype=DTYPES[name]).transpose(1, 2)
                angles = torch.empty(1, 256, turned // 2)
                rotary.rotary(x, angles, angles, interleaved)
                rotary.rotary_backward(x, angles, angles, interleaved)

            pairs = "interleaved" if interleaved else ""
            yield name, _words(f"head dim {head_dim}", f"{turned} turned" if turned < head_dim else "", pairs), call


def _gelu(name: str) -> Iterator[Call]:
    for approximate in ("tanh", "none"):

        def call(approximate: str = approximate) -> None:
            x = torch.empty(4096, dtype=DTYPES[name])
            gelu.gelu_backward(gelu.gelu(x, approximate), x, approximate)

        yield name, approximate, call


# ------------------------------------------------------------------------------------------------ matrix multiplication


def _linear(name: str, family: str) -> Iterator[Call]:
    for key, tile in configurations("matrix_multiply", MatrixTile, family).items():
        line = dict(key)
        if line["element_bytes"] != DTYPES[name].itemsize:
            continue
        for odd in (False, True) if name == "bfloat16" else (False,):

            def call(odd: bool = odd, tile: MatrixTile = tile) -> None:
                inner, columns = (765, 3071) if odd else (768, 3072)
                x = torch.empty(4096, inner, dtype=DTYPES[name])
                weight, bias = torch.empty(columns, inner, dtype=x.dtype), torch.empty(columns, dtype=x.dtype)
                with using("matrix_multiply", tile):
                    y, before = linear.linear(x, weight, bias, "gelu_tanh", True)
                    linear.linear_backward(y, x, weight, before, "gelu_tanh", True, True, True)
                    if name == "bfloat16" and not odd:
                        linear.linear(x, weight, None, "", False)
                        linear.linear(x, weight, bias, "gelu", False)
                        few = x[:256]  # backward splits the inner dimension
                        linear.linear_backward(y[:256], few, weight, before[:256], "gelu", True, True, True)

            yield name, _words(f"{line['size']} tile", "odd" if odd else ""), call


def _gated_linear(name: str, family: str) -> Iterator[Call]:
    for key, tile in configurations("gated_linear", MatrixTile, family).items():
        line = dict(key)
        if line["element_bytes"] != DTYPES[name].itemsize:
            continue
        for odd in (False, True) if name == "bfloat16" else (False,):

            def call(odd: bool = odd, tile: MatrixTile = tile) -> None:
                inner, columns = (573, 1535) if odd else (576, 1536)
                x = torch.empty(4096, inner, dtype=DTYPES[name])
                weight, bias = torch.empty(columns, inner, dtype=x.dtype), torch.empty(columns, dtype=x.dtype)
                with using("gated_linear", tile):
                    y, gate, up = gated_linear.gated_linear(x, weight, weight, bias, bias, "gelu", True)
                    gated_linear.gated_linear(x, weight, weight, None, None, "silu", False)
                for activation, biases in (("gelu", True), ("silu", False)):
                    gated_linear.gated_linear_backward(
                        y, x, weight, weight, gate, up, activation, False, False, False, biases, biases
                    )

            yield name, _words(f"{line['size']} tile", "odd" if odd else ""), call


def _quantized_linear(name: str, family: str) -> Iterator[Call]:
    for key, tile in configurations("quantized_linear", MatrixTile, family).items():
        line = dict(key)
        if line["element_bytes"] != DTYPES[name].itemsize or (name == "float16" and line["size"] == "medium"):
            continue
        for form in ("int8", "q8_0") if line["bits"] == 8 else ("int4", "q4_1", "q4_k"):

            def call(form: str = form, tile: MatrixTile = tile) -> None:
                x, bias = torch.empty(1, 768, dtype=DTYPES[name]), torch.empty(3072, dtype=DTYPES[name])
                parts = {p: torch.empty(size, dtype=dtype) for p, (size, dtype) in layout(form, (3072, 768)).items()}
                with using("quantized_linear", tile):
                    quantized_linear.quantized_linear(x, bias=bias, activation="gelu_tanh", **parts)
                    if name == "bfloat16":  # so few columns that the inner dimension is in parts
                        few = {part: tensor[:64] for part, tensor in parts.items()}
                        quantized_linear.quantized_linear(x, bias=bias[:64], activation="", **few)

            yield name, f"{form}, {line['size']} tile", call


def _cross_entropy(name: str) -> Iterator[Call]:
    def call() -> None:
        # So many rows that backward takes several rounds; so few classes that it is quick.
        hidden, weight = torch.empty(40000, 768, dtype=DTYPES[name]), torch.empty(1001, 768, dtype=DTYPES[name])
        targets = torch.empty(len(hidden), dtype=torch.int64)
        loss, lse = linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, -100)
        linear_cross_entropy.linear_cross_entropy_backward(loss, hidden, weight, targets, lse, -100)

    yield name, "large tile", call


def _words(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
