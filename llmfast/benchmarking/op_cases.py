"""Single operations at GPT-2's width, forward and backward, by backend, precision and number of tokens.

T tokens of C = 768 channels in 12 heads of 64, a feed-forward layer of 4 C (where it is gated of N = 2048), a
vocabulary of V = 50257, a window of 256; e bytes an element. What the work needs, counted once, however often a kernel
really reads:

    op                        bytes read            written         operations
    causal_attention          3 T C e               T C e           2 T (T + 1) C: two products over half a square
      backward                5 T C e               3 T C e         5 T (T + 1) C: five, the scores made again
    window_attention          3 T C e               T C e           4 P C, for P pairs of a query and a key it sees
      backward                5 T C e               3 T C e         10 P C
    bidirectional_attention   3 T C e               T C e           4 T² C
      backward                5 T C e               3 T C e         10 T² C
    decode_attention          (2 S + 1) C e         C e             4 S C, for S keys
    layer_norm                T C e                 T C e           8 T C
      backward                2 T C e               T C e           12 T C
    add_layer_norm            2 T C e               2 T C e         9 T C
      backward                3 T C e               T C e           13 T C
    rms_norm                  T C e                 T C e           4 T C
      backward                2 T C e               T C e           9 T C
    add_rms_norm              2 T C e               2 T C e         5 T C
      backward                3 T C e               T C e           10 T C
    rotary                    T C e                 T C e           3 T C
      backward                T C e                 T C e           3 T C
    gelu (of 4 C)             4 T C e               4 T C e         80 T C
      backward                8 T C e               4 T C e         120 T C
    linear (C to 4 C)         (T C + 4 C²) e        4 T C e         8 T C²
      backward                (5 T C + 4 C²) e      (T C + 4 C²) e  16 T C²
    gated_linear (C to N)     (T C + 2 C N) e       T N e           4 T C N
      backward                (T C + 3 T N + 2 C N) e  (T C + 2 C N) e  8 T C N
    linear_cross_entropy      (T + V) C e           –               2 T C V
      backward                (T + V) C e           (T + V) C e     6 T C V: the logits made again

Inputs come from a rotation twice as large as the caches. Results are written where the allocator has just had memory
back, as in a model; where they are small that is the cache, and a share of the limit may come out above 1.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llmfast import ops
from llmfast.backends import backends, pytorch, use_backend
from llmfast.benchmarking.comparison import Comparison, Contestant, Entry, Work
from llmfast.benchmarking.op_check import OpCheck
from llmfast.benchmarking.timing import Rotation, timed
from llmfast.contract import cases as contract
from llmfast.contract.cases import Case, Tensors

COMPILED = "pytorch compiled"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH, HEADS, VOCABULARY, GATED, WINDOW = 768, 12, 50257, 2048, 256


@dataclass(frozen=True)
class OpWork:
    """Elements read and written, and operations, of one direction of an op at T tokens."""

    read: int
    written: int
    operations: int


@dataclass(frozen=True)
class Op:
    """What the contract calls `case.op` at one size, and its work forward and, where it has one, backward."""

    name: str
    case: Case
    forward: OpWork
    backward: OpWork | None
    sizes: dict[str, int]
    products: bool = False  # bounded by the arithmetic of its dtype; the others compute in float32


def causal_attention(T: int) -> Op:
    case = contract.causal_attention("", 1, HEADS, HEADS, T, T, WIDTH // HEADS, fused=True)
    return _attention("causal_attention", case, T, T * (T + 1) // 2)


def window_attention(T: int) -> Op:
    case = contract.causal_attention("", 1, HEADS, HEADS, T, T, WIDTH // HEADS, fused=True, window=WINDOW)
    short = min(T, WINDOW)  # the queries that see all before them
    return _attention("window_attention", case, T, short * (short + 1) // 2 + (T - short) * WINDOW)


def bidirectional_attention(T: int) -> Op:
    case = contract.bidirectional_attention("", 1, HEADS, HEADS, T, T, WIDTH // HEADS, fused=True)
    return _attention("bidirectional_attention", case, T, T * T)


def _attention(name: str, case: Case, T: int, pairs: int) -> Op:
    """With `pairs` of a query and a key that it sees."""
    n = T * WIDTH
    forward, backward = OpWork(3 * n, n, 4 * pairs * WIDTH), OpWork(5 * n, 3 * n, 10 * pairs * WIDTH)
    return Op(name, case, forward, backward, _sizes(T), products=True)


def decode_attention(S: int) -> Op:
    case = contract.causal_attention("", 1, HEADS, HEADS, 1, S, WIDTH // HEADS)
    C = WIDTH
    work = OpWork((2 * S + 1) * C, C, 4 * S * C)
    return Op("decode_attention", case, work, None, {"batch": 1, "context": S, "width": C}, products=True)


def layer_norm(T: int) -> Op:
    n = T * WIDTH
    case = contract.layer_norm("", (T, WIDTH))
    return Op("layer_norm", case, OpWork(n, n, 8 * n), OpWork(2 * n, n, 12 * n), _sizes(T))


def add_layer_norm(T: int) -> Op:
    n = T * WIDTH
    case = contract.add_layer_norm("", (T, WIDTH))
    return Op("add_layer_norm", case, OpWork(2 * n, 2 * n, 9 * n), OpWork(3 * n, n, 13 * n), _sizes(T))


def rms_norm(T: int) -> Op:
    n = T * WIDTH
    case = contract.rms_norm("", (T, WIDTH))
    return Op("rms_norm", case, OpWork(n, n, 4 * n), OpWork(2 * n, n, 9 * n), _sizes(T))


def add_rms_norm(T: int) -> Op:
    n = T * WIDTH
    case = contract.add_rms_norm("", (T, WIDTH))
    return Op("add_rms_norm", case, OpWork(2 * n, 2 * n, 5 * n), OpWork(3 * n, n, 10 * n), _sizes(T))


def rotary(T: int) -> Op:
    n, D = T * WIDTH, WIDTH // HEADS
    case = contract.rotary("", 1, HEADS, T, D, D, fused=True)
    return Op("rotary", case, OpWork(n, n, 3 * n), OpWork(n, n, 3 * n), _sizes(T))


def gelu(T: int) -> Op:
    n = 4 * T * WIDTH
    case = contract.gelu("", (T, 4 * WIDTH), "tanh")
    sizes = _sizes(T) | {"width": 4 * WIDTH}
    return Op("gelu", case, OpWork(n, n, 20 * n), OpWork(2 * n, n, 30 * n), sizes)


def linear(T: int) -> Op:
    C, N = WIDTH, 4 * WIDTH
    case = contract.linear("", (T, C), N)
    forward = OpWork(T * C + C * N, T * N, 2 * T * C * N)
    backward = OpWork(T * (C + N) + C * N, T * C + C * N, 4 * T * C * N)
    return Op("linear", case, forward, backward, _sizes(T) | {"outputs": N}, products=True)


def gated_linear(T: int) -> Op:
    C, N = WIDTH, GATED
    case = contract.gated_linear("", (T, C), N)
    forward = OpWork(T * C + 2 * C * N, T * N, 4 * T * C * N)
    backward = OpWork(T * (C + 3 * N) + 2 * C * N, T * C + 2 * C * N, 8 * T * C * N)
    return Op("gated_linear", case, forward, backward, _sizes(T) | {"outputs": N}, products=True)


def linear_cross_entropy(T: int) -> Op:
    C, V = WIDTH, VOCABULARY
    case = contract.linear_cross_entropy("", (T,), C, V)
    operands = (T + V) * C
    forward, backward = OpWork(operands, 0, 2 * T * C * V), OpWork(operands, operands, 6 * T * C * V)
    return Op("linear_cross_entropy", case, forward, backward, _sizes(T) | {"vocabulary": V}, products=True)


def _sizes(T: int) -> dict[str, int]:
    return {"batch": 1, "tokens": T, "width": WIDTH}


OPS: dict[str, Callable[[int], Op]] = {
    "causal_attention": causal_attention,
    "window_attention": window_attention,
    "bidirectional_attention": bidirectional_attention,
    "decode_attention": decode_attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rotary": rotary,
    "gelu": gelu,
    "linear": linear,
    "gated_linear": gated_linear,
    "linear_cross_entropy": linear_cross_entropy,
}


def comparisons(
    lengths: Sequence[int],
    most_operations: float,
    precisions: Sequence[str] = ("fp32", "bf16"),
    device: str = "cpu",
    chosen: Sequence[str] = (),
    compiled: bool = True,
) -> Iterator[Comparison]:
    """Every op at every length that needs no more than `most_operations`, forward and backward.

    The backends are those `chosen` (always beside PyTorch's own), or all that can run the op here.
    """
    for make in OPS.values():
        name = make(1).case.op
        entries = {precision: competitors(name, precision, device, chosen, compiled) for precision in precisions}
        for direction in ("forward", "backward"):
            for precision in precisions:
                for T in lengths:
                    op = make(T)
                    work = op.forward if direction == "forward" else op.backward
                    if work is not None and work.operations <= most_operations:
                        yield _comparison(op, direction, work, precision, device, entries[precision])


def competitors(
    op: str, precision: str, device: str, chosen: Sequence[str] = (), compiled: bool = False
) -> tuple[Entry, ...]:
    """The backends that run `op` here at a speed that means something, PyTorch's own first: those `chosen`, or all.

    The reference is left out, and so is, unless chosen, Triton's interpreter, which stands in for a GPU. None where
    none of those chosen can.
    """
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    rows = [row for row in backends() if (row.op, row.device, row.dtype) == (op, device, dtype) and row.available]
    able = [row.backend for row in rows if row.backend != "reference"]
    if chosen:
        able = [name for name in chosen if name in able]
    elif device == "cpu":
        able = [name for name in able if name != "triton"]
    names = dict.fromkeys(["pytorch", *[COMPILED] * compiled, *able] if able else [])
    return tuple(Entry(name, precision) for name in names)


def _comparison(
    op: Op, direction: str, work: OpWork, precision: str, device: str, entries: tuple[Entry, ...]
) -> Comparison:
    size = DTYPES[precision].itemsize
    needed = Work(
        tokens=op.sizes.get("tokens", 1),
        read=work.read * size,
        written=work.written * size,
        operations=work.operations,
        arithmetic=precision if op.products else "fp32",
    )
    return Comparison(
        group="ops",
        name=f"{op.name} {direction}",
        device=device,
        entries=entries,
        start=functools.partial(_start, op.case, DTYPES[precision], device, direction == "backward"),
        work=lambda entry: needed,
        sizes=op.sizes,
    )


def _start(case: Case, dtype: torch.dtype, device: str, backward: bool) -> Callable[[Entry], Contestant]:
    """Makes the inputs and what their results have to be, for all competitors."""
    tensors = case.make(dtype, device)
    check = OpCheck(case, tensors, backward)
    rotation = Rotation(tensors | {f"given {i}": g for i, g in enumerate(check.given)} if backward else tensors)
    note = "the inputs lie in the cache" if rotation.hot else None

    def ready(entry: Entry) -> Contestant:
        functions, choice = functions_of(entry.backend, case.op)
        turn = _backward(case, functions, rotation, device) if backward else _forward(case, functions, rotation, device)

        def with_backend() -> float:
            with choice(), contextlib.nullcontext() if backward else torch.inference_mode():
                return turn()

        with choice():
            checked = check(functions)
        return Contestant(with_backend, round(checked, 4), note)

    return ready


def functions_of(backend: str, op: str) -> tuple[Any, Callable[[], contextlib.AbstractContextManager[None]]]:
    """What to call for a competitor, and the choice of backend to call it under."""
    if backend == COMPILED:
        return SimpleNamespace(**{op: _compiled(op)}), contextlib.nullcontext
    return ops, functools.partial(use_backend, backend)


@functools.cache
def _compiled(op: str) -> Callable[..., Any]:
    """PyTorch's op, compiled once for every number of tokens."""
    return torch.compile(getattr(pytorch, op), dynamic=True)


def _forward(case: Case, functions: Any, rotation: Rotation, device: str) -> Callable[[], float]:
    return timed(lambda tensors: case.call(functions, tensors), rotation.next, device)


def _backward(case: Case, functions: Any, rotation: Rotation, device: str) -> Callable[[], float]:
    """Times the backward pass of a forward pass made half a rotation ago: its inputs have left the cache since."""
    waiting: deque[tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]] = deque()

    def forward() -> None:
        tensors = rotation.next()
        given = [t for n, t in tensors.items() if n.startswith("given") and t is not None]
        inputs: Tensors = {n: t for n, t in tensors.items() if not n.startswith("given")}
        leaves = case.leaves(inputs)
        wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
        waiting.append((case.call(functions, leaves), wanted, given))

    def prepare() -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
        while len(waiting) <= len(rotation) // 2:
            forward()
        return waiting.popleft()

    def backward(prepared: tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]) -> None:
        results, leaves, given = prepared
        torch.autograd.grad(results, leaves, given, allow_unused=True)

    return timed(backward, prepare, device)
