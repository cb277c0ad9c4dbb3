# %% [markdown]
# # 16. Kernels 3: Triton
#
# **From adding two vectors to attention that never stores its weights: five kernels, run here without a GPU.**
#
# On a GPU thousands of small **programs** run at once. In Triton (Tillet et al., 2019) you write one of them: which
# block of the data is mine, load it, compute, store it. The compiler makes threads, registers and matrix instructions
# of it. Without a GPU Triton's interpreter runs the same source in Python: slow, and good enough to be right.
#
# Three of the five leave a mark wherever they read, for a picture of which program reads what.

# %%
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch
import triton
import triton.language as tl

from llmfast import ops
from llmfast.lessons import check, confirm
from llmfast.lessons.machine_code import machine_code
from llmfast.lessons.pictures import bars, heats

# %% [markdown]
# ## 1. Adding two vectors
#
# `tl.program_id(0)` says which program this is, `tl.arange` makes a block of offsets. The last block may hang over the
# end: a **mask** says what is real. Tensors come as pointers to their first number.


# %%
@triton.jit
def add(x, y, out, marks, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask), mask=mask)
    tl.store(marks + program * n + at, 1.0, mask=mask)


# %% tags=["given"]
torch.manual_seed(0)
n, BLOCK = 100, 16
x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
programs = triton.cdiv(n, BLOCK)  # 7, the last with 4 numbers
add_marks = torch.zeros(programs, n)
add[(programs,)](x, y, out, add_marks, n, BLOCK=BLOCK)
confirm("the sum", out, x + y, within=0.0)

# %% [markdown]
# ## 2. Softmax and 3. LayerNorm: a program a row
#
# A row fits into a block, so it is read once, and the maximum, the sum and the division happen in registers. PyTorch's
# operators one after another would read it three times.


# %%
@triton.jit
def softmax(x, out, N, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    scores = tl.load(x + row * N + at, mask=at < N, other=-float("inf"))  # what is not there weighs nothing
    powers = tl.exp(scores - tl.max(scores, axis=0))
    tl.store(out + row * N + at, powers / tl.sum(powers, axis=0), mask=at < N)


@triton.jit
def layer_norm(x, weight, bias, out, N, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    mask = at < N
    values = tl.load(x + row * N + at, mask=mask, other=0.0)
    centred = tl.where(mask, values - tl.sum(values, axis=0) / N, 0.0)  # or the padding would have a variance
    scaled = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps)
    tl.store(out + row * N + at, scaled * tl.load(weight + at, mask=mask) + tl.load(bias + at, mask=mask), mask=mask)


# %% tags=["given"]
x, weight, bias = torch.randn(5, 48), torch.randn(48), torch.randn(48)
out = torch.empty_like(x)
softmax[(5,)](x, out, 48, BLOCK=64)
confirm("softmax", out, x.softmax(-1), within=1e-6)
layer_norm[(5,)](x, weight, bias, out, 48, 1e-5, BLOCK=64)
confirm("LayerNorm is the package's", out, ops.layer_norm(x, weight, bias), within=1e-5)

# %% [markdown]
# ## 4. A product with GELU at its end
#
# A program computes a tile of y = GELU(x Wᵀ). It walks along K, loads a tile of x and one of W, and multiplies them:
# `tl.dot`, which becomes the GPU's matrix instructions. GELU is applied to the sum in registers: it reads and writes
# nothing (lesson 14, exercise 3).


# %%
@triton.jit
def linear_gelu(x, w, y, x_marks, w_marks, M, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)  # (DEPTH,)
        left = tl.load(x + m * K + k[None, :], mask=(m < M) & (k[None, :] < K), other=0.0)  # (ROWS, DEPTH)
        right = tl.load(w + n * K + k[:, None], mask=(n < N) & (k[:, None] < K), other=0.0)  # (DEPTH, COLUMNS)
        total = tl.dot(left, right, total)
        tl.store(x_marks + program * M * K + m * K + k[None, :], 1.0, mask=(m < M) & (k[None, :] < K))
        tl.store(w_marks + program * N * K + n * K + k[:, None], 1.0, mask=(n < N) & (k[:, None] < K))
    u = 1.5957691216057308 * (total + 0.044715 * total * total * total)
    tl.store(y + m * N + n, total / (1.0 + tl.exp(-u)), mask=(m < M) & (n < N))


# %% tags=["given"]
M, N, K = 40, 48, 32
x, w, y = torch.randn(M, K), torch.randn(N, K) * K**-0.5, torch.empty(M, N)
grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))  # 3 × 3 programs
x_marks, w_marks = torch.zeros(9, M, K), torch.zeros(9, N, K)
linear_gelu[grid](x, w, y, x_marks, w_marks, M, N, K, ROWS=16, COLUMNS=16, DEPTH=16)
confirm("linear with GELU is the package's", y, ops.linear(x, w, activation="gelu_tanh"), within=1e-4)

# %% tags=["picture"]
heats({"adding: program × what it reads": add_marks}, width=6, height=1.8)
heats(
    {f"{what}, program {p}": marks[p] for what, marks in (("x", x_marks), ("w", w_marks)) for p in (0, 1, 3, 8)},
    width=2.2, height=2.0, numbers=False,
)  # fmt: skip

# %% [markdown]
# Programs 0, 1 and 2 read the same rows of x, programs 0, 3 and 6 the same rows of w. The larger the tile, the less is
# read twice, until the tile no longer fits the registers.
#
# ## 5. Attention that stores no weights
#
# Softmax needs the largest score and the sum before it can weigh anything. **Online softmax** (Milakov and Gimelshein,
# 2018; FlashAttention, Dao et al., 2022) keeps both while it walks along the keys. When a larger score turns up, all
# that was summed so far was too large by a known factor, and is multiplied by it:
#
# $$m' = \max(m, \max_j s_j),\quad c = e^{m - m'}$$
#
# $$l' = c\,l + \sum_j e^{s_j - m'}$$
#
# $$o' = c\,o + \sum_j e^{s_j - m'} v_j$$


# %%
@triton.jit
def attention(q, k, v, out, marks, T, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    query, channel = first + tl.arange(0, BLOCK), tl.arange(0, D)
    mine = tl.load(q + query[:, None] * D + channel[None, :], mask=query[:, None] < T, other=0.0)  # (BLOCK, D)
    largest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    total, mixed = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK, D), dtype=tl.float32)
    for start in range(0, first + BLOCK, BLOCK):  # keys after this block's queries are never read
        key = start + tl.arange(0, BLOCK)
        keys = tl.load(k + key[None, :] * D + channel[:, None], mask=key[None, :] < T, other=0.0)  # (D, BLOCK)
        values = tl.load(v + key[:, None] * D + channel[None, :], mask=key[:, None] < T, other=0.0)  # (BLOCK, D)
        scores = scale * tl.dot(mine, keys)  # (BLOCK, BLOCK)
        scores = tl.where((key[None, :] <= query[:, None]) & (key[None, :] < T), scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        correction, powers = tl.exp(largest - larger), tl.exp(scores - larger[:, None])
        total = correction * total + tl.sum(powers, axis=1)
        mixed = tl.dot(powers.to(values.dtype), values, correction[:, None] * mixed)
        largest = larger
        tl.store(marks + tl.program_id(0) * T + key, 1.0, mask=key < T)
    tl.store(out + query[:, None] * D + channel[None, :], mixed / total[:, None], mask=query[:, None] < T)


# %% tags=["given"]
T, D = 75, 16
q, k, v = torch.randn(3, 1, 1, T, D)  # each (B, H, T, D): one sequence, one head
out, key_marks = torch.empty_like(q), torch.zeros(5, T)
attention[(triton.cdiv(T, 16),)](q, k, v, out, key_marks, T, D**-0.5, D=D, BLOCK=16)
confirm("attention is the package's", out, ops.causal_attention(q, k, v), within=1e-5)

# %% tags=["picture"]
heats({"attention: program × the keys that it reads": key_marks}, width=6, height=1.8)

# %% [markdown]
# A staircase: the keys above it, four tenths here and half in a long text, are never read. Nothing of size (T, T)
# exists anywhere.
#
# ## The machine code
#
# Triton carries NVIDIA's assembler, and compiles for any GPU on any machine. What the compiler says of a kernel is
# worth more than guesses: **registers** a thread (255 at most), what it **spilled** to slow memory (should be 0), the
# shared memory a program takes, and which **matrix instruction** the dots became. For tiles of 64 × 64 in bfloat16:

# %% tags=["given"]
pointers = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | {"marks": "*fp32", "T": "i32", "scale": "fp32"}
signature = pointers | {"D": "constexpr", "BLOCK": "constexpr"}
rows = {block: machine_code([attention], signature, {"D": 64, "BLOCK": block}) for block in (64, 128)}
for block, found in rows.items():
    for row in found:
        print(
            f"tiles of {block:3}, {row['chip']:18} {row['registers']:3} registers, {row['spilled']:4} bytes spilled, ",
            end="",
        )
        print(f"{row['shared'] // 1024:3} KiB shared, occupancy {row['occupancy']:.0%}, {row['instruction']}")
confirm("all use matrix instructions", all(row["instruction"] for row in rows[64]), True)
print("bytes spilled with tiles of 64:", [row["spilled"] for row in rows[64]])

# %% tags=["picture"]
taken = {f"{row['chip']}, tiles of {block}": row["registers"] for block, found in rows.items() for row in found}
bars(taken, "Registers a thread takes, of 255 (MI300: 512)", form="{:.0f}")

# %% [markdown]
# With tiles of 64 everything stays in registers. With tiles of 128, four warps and this simple source, NVIDIA's chips
# spill: each of these bytes is written to memory and read back, for every block of keys. The package's kernel has more
# warps for larger tiles, and configurations for each family of chips (`kernels/configs/`).
#
# All of the package's kernels are held to this in its tests: `python -m llmfast.kernels.aot --check` compiles every
# kernel and every shipped configuration, and fails on a spilled byte. `docs/kernels.md` has the table.
#
# ## Exercises
#
# Write kernels with `@triton.jit`; each is launched as given.
#
# **16.1** `scale(x, out, n, factor, BLOCK: tl.constexpr)`: out = factor · x, launched with ⌈n / BLOCK⌉ programs.
#
# **16.2** `rms_norm(x, weight, out, N, eps, BLOCK: tl.constexpr)`: a program a row, N ≤ BLOCK.
#
# **16.3** `row_max(x, out, N, BLOCK: tl.constexpr)`: the maximum of each row, for rows **longer** than a block: a loop.

# %%
scale = None  # @triton.jit def scale(x, out, n, factor, BLOCK: tl.constexpr): …
rms_norm = None
row_max = None

check("16.1", scale)
check("16.2", rms_norm)
check("16.3", row_max)

# %% [markdown]
# Solutions are in `lessons/solutions/16_triton.py`.
#
# **Read next**: `kernels/gelu.py`, `kernels/layer_norm.py`, `kernels/matmul.py`, `kernels/attention_forward.py`, in
# this order; `docs/kernels.md`.
