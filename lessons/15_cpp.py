# %% [markdown]
# # 15. Kernels 2: C++
#
# **GELU and a product of matrices, from the obvious loop to the machine's limit, one idea and one measurement a step.**
#
# Lesson 14 said how fast a kernel can be. Here is how to get there, in plain C++, compiled in the notebook. Each step
# changes one thing, is checked against PyTorch, and is drawn under the roof. The first product reaches 1 % of what this
# machine can do. The last one reaches more than two thirds, if nothing else runs.

# %%
import torch

from llmfast import ops
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.compiling import compile_cpp, why_not
from llmfast.lessons.material import machine, shortest
from llmfast.lessons.pictures import bars, roofline

assert why_not() is None, why_not()
torch.manual_seed(0)
here = machine(min(torch.get_num_threads(), 4))
print(f"{here.bandwidth:.0f} GB/s; {here.peak:.0f} GFLOP/s on {here.threads} threads, {here.peak_of_one:.0f} on one")

# %% [markdown]
# ## GELU 1: the formula
#
# $x\,\sigma(2u)$ with $u = \sqrt{2/\pi}\,(x + 0.044715\,x^3)$ (Hendrycks and Gimpel, 2016). One element after another;
# `std::exp` is a call of a function, about 20 ns each.

# %%
gelu_loop = compile_cpp(r"""
#include "vectors.h"
EXPORT gelu(const float* x, float* y, long n) {
  for (long i = 0; i < n; i++) y[i] = x[i] / (1 + std::exp(-1.5957691f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
}
""", "-O1")  # fmt: skip

# %% [markdown]
# ## GELU 2: vectors, 3: threads
#
# A core has registers of 8 or 16 floats, and instructions that do the same to all of them. GCC and Clang let you write
# that as arithmetic on a type, here `vec`; `vexp` computes e to each lane by a polynomial. The two lines at the end of
# the loop handle the elements that don't fill a register: forgetting them is the classic bug, and lengths that are a
# multiple of 16 never show it.
#
# `vectors.h` is forty lines, in `llmfast/lessons/vectors.h`: the type, `vexp`, and `in_parallel`, which deals a range
# out to threads.

# %%
gelu_vectors = compile_cpp(r"""
#include "vectors.h"
static vec gelu_of(vec x) { return x / (1.0f + vexp(-1.5957691f * (x + 0.044715f * x * x * x))); }
static void some(const float* x, float* y, long first, long last) {
  long i = first;
  for (; i + W <= last; i += W) *(vec*)(y + i) = gelu_of(*(const vec*)(x + i));
  for (; i < last; i++) y[i] = gelu_of(vec{} + x[i])[0];
}
EXPORT gelu(const float* x, float* y, long n) { some(x, y, 0, n); }
EXPORT threaded(const float* x, float* y, long n, long threads) {
  in_parallel(n, W, threads, [=](long first, long last) { some(x, y, first, last); });
}
""")  # fmt: skip

# %% tags=["given"]
x = torch.randn((effort(quick=2, full=16) << 20) + 11)  # 64 MB in full, of an odd length
y = torch.full((x.numel() + 1,), 7.0)  # one more, which must stay
steps = {
    "1. a loop": lambda: gelu_loop.gelu(x, y, x.numel()),
    "2. vectors": lambda: gelu_vectors.gelu(x, y, x.numel()),
    f"3. {here.threads} threads": lambda: gelu_vectors.threaded(x, y, x.numel(), here.threads),
}
reached = {}
for name, call in steps.items():
    y[:-1] = 0
    call()
    confirm(f"GELU, {name}: all elements and not one more", y, torch.cat([ops.gelu(x), torch.tensor([7.0])]), 1e-5)
    reached[name] = 8 * x.numel() / shortest(call) / 1e9  # GB/s: 4 bytes in, 4 bytes out
reached["PyTorch"] = 8 * x.numel() / shortest(lambda: torch.nn.functional.gelu(x, approximate="tanh")) / 1e9

# %% tags=["picture"]
bars({**reached, "the machine's limit": here.bandwidth}, "GELU: bytes moved a second", x="GB/s", form="{:.1f}")

# %% [markdown]
# With vectors and enough threads GELU is bound by memory: no better exp would help. The package's own goes one further
# and looks up a polynomial for each of 16 segments in one instruction (`csrc/ops/gelu.inl`); most of all it computes
# GELU inside the product before it, where it moves nothing.
#
# ## A product 1: three loops
#
# $y_{mn} = \sum_k x_{mk} w_{nk}$, as `ops.linear` has it: x (M, K), w (N, K), y (M, N). Each sum waits for itself: an
# addition takes 4 cycles, and the next one needs its result. And the compiler may not use vectors, since that would
# change the order of the additions, and with it the rounding.

# %%
loops = compile_cpp(r"""
#include "vectors.h"
EXPORT product(const float* x, const float* w, float* y, long M, long N, long K) {
  for (long m = 0; m < M; m++)
    for (long n = 0; n < N; n++) {
      float sum = 0;
      for (long k = 0; k < K; k++) sum += x[m * K + k] * w[n * K + k];
      y[m * N + n] = sum;
    }
}
""")  # fmt: skip

# %% [markdown]
# ## A product 2: another order
#
# The same operations, with n innermost and the weight transposed, wt (K, N): now neighbours in the loop are neighbours
# in memory and don't wait for each other, and the compiler makes vectors by itself. But y is read and written K times.

# %%
order = compile_cpp(r"""
#include "vectors.h"
EXPORT product(const float* x, const float* wt, float* y, long M, long N, long K) {
  for (long m = 0; m < M; m++) {
    for (long n = 0; n < N; n++) y[m * N + n] = 0;
    for (long k = 0; k < K; k++)
      for (long n = 0; n < N; n++) y[m * N + n] += x[m * K + k] * wt[k * N + n];
  }
}
""")  # fmt: skip

# %% [markdown]
# ## A product 3: a tile in registers; 4: packed weights; 5: threads
#
# Keep a block of y in registers, 12 rows of 2 vectors (6 rows with 16 registers). For each k load two vectors of the
# weight, use each 12 times, and store the block once at the end: 24 fused multiply-adds for 2 loads and 12 broadcasts,
# and 24 sums that don't wait for each other (Goto and van de Geijn, 2008).
#
# The tile walks down two vectors' width of wt, in strides of a whole row: each k is another page of memory. So
# **pack**: store each panel of 2 W columns for itself, (N / 2W, K, 2W), and the tile reads straight on. Weights are
# packed once, when a model is loaded. Last, the panels are dealt out to threads.

# %%
tiles = compile_cpp(r"""
#include "vectors.h"
static void tile(const float* x, const float* w, float* y, long N, long K, long stride) {
  vec sum[ROWS][2] = {};
  for (long k = 0; k < K; k++)
    for (long m = 0; m < ROWS; m++)
      for (long i = 0; i < 2; i++) sum[m][i] += x[m * K + k] * ((const vec*)(w + k * stride))[i];
  for (long m = 0; m < ROWS; m++)
    for (long i = 0; i < 2; i++) ((vec*)(y + m * N))[i] = sum[m][i];
}
EXPORT tiled(const float* x, const float* wt, float* y, long M, long N, long K) {
  for (long n = 0; n < N; n += 2 * W)
    for (long m = 0; m < M; m += ROWS) tile(x + m * K, wt + n, y + m * N + n, N, K, N);
}
EXPORT packed(const float* x, const float* panels, float* y, long M, long N, long K, long threads) {
  in_parallel(N, 2 * W, threads, [=](long first, long last) {
    for (long n = first; n < last; n += 2 * W)
      for (long m = 0; m < M; m += ROWS) tile(x + m * K, panels + n * K, y + m * N + n, N, K, 2 * W);
  });
}
EXPORT width(long* lanes) { *lanes = W; }
""")  # fmt: skip

# %%
M, N, K = 192, 3072, 768  # GPT-2's widening layer on 192 tokens
x, w, y = torch.randn(M, K), torch.randn(N, K), torch.empty(M, N)
lanes = torch.zeros(1, dtype=torch.int64)
tiles.width(lanes)
wt = w.T.contiguous()  # (K, N)
panels = wt.view(K, -1, 2 * int(lanes)).transpose(0, 1).contiguous()  # (K, N / 2W, 2W) -> (N / 2W, K, 2W)

# %% tags=["given"]
steps = {
    "1. three loops": lambda: loops.product(x, w, y, M, N, K),
    "2. another order": lambda: order.product(x, wt, y, M, N, K),
    "3. a tile in registers": lambda: tiles.tiled(x, wt, y, M, N, K),
    "4. packed weights": lambda: tiles.packed(x, panels, y, M, N, K, 1),
    f"5. {here.threads} threads": lambda: tiles.packed(x, panels, y, M, N, K, here.threads),
    "PyTorch": lambda: torch.mm(x, wt, out=y),
    "llmfast": lambda: y.copy_(ops.linear(x, w)),
}
expected, rates = x @ w.T, {}  # (M, N)
for name, call in steps.items():
    y.zero_()
    call()
    confirm(f"the product, {name}", y, expected, within=2e-3)
    rates[name] = 2 * M * N * K / shortest(call) / 1e9
share = {name: 100 * rate / (here.peak_of_one if name[0] in "1234" else here.peak) for name, rate in rates.items()}
for name, rate in rates.items():
    print(f"{name:24} {rate:7.1f} GFLOP/s, {share[name]:5.1f} % of the limit of its threads")
first = [rates[name] for name in list(steps)[:3]]
confirm("a tile beats another order beats three loops", sorted(first), first, within=0.0)

# %% tags=["picture"]
bars(share, "A product: per cent of the arithmetic limit of its threads", form="{:.1f} %")
intensity = 2 * M * N * K / (4 * (M * K + K * N + M * N))  # FLOP a byte
roofline(
    here.bandwidth, here.peak, {name: (intensity, rate) for name, rate in rates.items()},
    f"{M} × {K} × {N} in float32: the same operations and bytes, seven programs",
)  # fmt: skip

# %% [markdown]
# All marks stand above each other, since the work is the same: what differs is how much of it waits. What is left to
# the limit is in what a real library adds: tiles for sizes that are no multiple of 12 and 32, blocks of k that stay
# in the first cache, prefetching, and threads that are already awake (starting one costs 20 µs and more).
#
# ## Exercises
#
# C++ as a Python string; each must be a function `EXPORT …` as above, with `#include "vectors.h"`.
#
# **15.1** `EXPORT relu(const float* x, float* y, long n)`: max(x, 0), for any n.
#
# **15.2** `EXPORT row_sums(const float* x, float* y, long rows, long columns)`: the sum of each row. Keep it exact to
# 1e-4 for 100,000 columns: one float that adds them all up is not.
#
# **15.3** How many floats of the weights does step 2 read from memory or cache for each multiply-add, and how many does
# the tile? Write `loads(rows)`: weight floats loaded for each multiply-add, in a tile of as many rows.


# %%
relu = None  # r""" #include … """
row_sums = None


def loads(rows): ...


check("15.1", relu)
check("15.2", row_sums)
check("15.3", loads)

# %% [markdown]
# Solutions are in `lessons/solutions/15_cpp.py`.
#
# **Read next**: `csrc/vector.h`, the package's vectors; `csrc/ops/gelu.inl`; `csrc/gemm/matmul.inl` and
# `csrc/gemm/tile_registers.inl`, where the tile lives for every format of weights; `docs/write-your-own-kernel.md`,
# on making a kernel of yours a backend.
