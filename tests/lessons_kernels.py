"""Wrong answers to lesson 16's exercises: kernels, which Triton must find in a file."""

import triton
import triton.language as tl


@triton.jit
def scale_without_mask(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, factor * tl.load(x + at))


@triton.jit
def scale_without_program(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, factor * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def scale_adds(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, factor + tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def rms_without_weight(x, weight, out, N, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * N + at, mask=at < N, other=0.0)
    tl.store(out + row * N + at, values / tl.sqrt(tl.sum(values * values, axis=0) / N + eps), mask=at < N)


@triton.jit
def rms_over_block(x, weight, out, N, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * N + at, mask=at < N, other=0.0)
    normed = values / tl.sqrt(tl.sum(values * values, axis=0) / BLOCK + eps)
    tl.store(out + row * N + at, normed * tl.load(weight + at, mask=at < N), mask=at < N)


@triton.jit
def rms_without_eps(x, weight, out, N, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * N + at, mask=at < N, other=0.0)
    normed = values / tl.sqrt(tl.sum(values * values, axis=0) / N)
    tl.store(out + row * N + at, normed * tl.load(weight + at, mask=at < N), mask=at < N)


@triton.jit
def max_from_zero(x, out, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(x + row * N + at, mask=at < N, other=0.0))
    tl.store(out + row, tl.max(largest, axis=0))


@triton.jit
def max_of_first_block(x, out, N, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + row, tl.max(tl.load(x + row * N + at, mask=at < N, other=-float("inf")), axis=0))


@triton.jit
def max_of_whole_blocks(x, out, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    largest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    for start in range(0, N - BLOCK + 1, BLOCK):
        largest = tl.maximum(largest, tl.load(x + row * N + start + tl.arange(0, BLOCK)))
    tl.store(out + row, tl.max(largest, axis=0))
