# %% [markdown]
# # 14. Kernels 1: the roofline
#
# **Before a kernel is made faster: how fast can it be? Count bytes, count operations, measure the machine. Two lines.**
#
# A kernel moves data and computes on it. Both take time, and a good kernel does both at once. So it takes at least
#
# $$\text{seconds} \ge \max(\text{bytes moved} / \text{bandwidth},\; \text{operations} / \text{peak})$$
#
# That is the **roofline** (Williams, Waterman and Patterson, 2009). It needs no profiler, and it tells what can't be
# gained, which saves more work than any trick.

# %%
import torch

import llmfast
from llmfast import ops
from llmfast.benchmarking import op_cases
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.material import machine, shortest
from llmfast.lessons.pictures import bars, curves, roofline

# %% [markdown]
# ## Count
#
# Four operations of GPT-2, 1024 tokens, in float32. Count what has to be read and written **once**, and the additions
# and multiplications, whatever a clumsy program may do besides.

# %%
T, C, e = 1024, 768, 4  # tokens, channels, bytes a float32
# name: (bytes, operations)
work = {
    "layer_norm": (2 * T * C * e, 8 * T * C),  # (T, C) in, (T, C) out; mean, variance, scale, shift
    "gelu": (2 * T * 4 * C * e, 80 * T * C),  # (T, 4 C) in and out; about 20 operations an element, most of it exp
    "linear": ((T * C + 4 * C * C + T * 4 * C) * e, 2 * T * C * 4 * C),  # x, weight, y; a multiply and an add each
    "causal_attention": (4 * T * C * e, 2 * T * (T + 1) * C),  # q, k, v, out; two products over half a square
}
for name, (moved, operations) in work.items():
    print(f"{name:17} {moved / 1e6:6.1f} MB {operations / 1e6:8.1f} MFLOP  -> {operations / moved:6.1f} FLOP a byte")
    counted = getattr(op_cases, name)(T).forward  # what `llmfast bench ops` counts
    confirm(
        f"{name} as the package counts it",
        [moved / e, operations],
        [counted.read + counted.written, counted.operations],
    )

# %% [markdown]
# FLOP a byte is the **arithmetic intensity**. LayerNorm does one operation for each byte; a product of matrices does
# hundreds. No skill changes that: it is in the formula.
#
# ## Measure the machine
#
# How many bytes a second come from memory? Add up an array that is much larger than the cache. How many operations a
# second? Multiply matrices that fit into it.

# %%
array = torch.ones(effort(quick=16, full=64) << 20)  # 256 MB of float32
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
bandwidth = array.numel() * 4 / shortest(array.sum) / 1e9
peak = 2 * 1024**3 / shortest(lambda: a @ b) / 1e9
print(f"PyTorch reads {bandwidth:.0f} GB/s and computes {peak:.0f} GFLOP/s on {torch.get_num_threads()} threads")

# %% [markdown]
# These are lower bounds: PyTorch may not be the best program for either. The package has loops in C++ for nothing else
# (`csrc/ops/limits.inl`), in the instruction set that its kernels use.

# %%
here = machine()
bandwidth, peak = max(bandwidth, here.bandwidth), max(peak, here.peak)
ridge = peak / bandwidth  # FLOP a byte where both lines meet
print(f"{here.threads} threads: {bandwidth:.0f} GB/s, {peak:.0f} GFLOP/s; the ridge is at {ridge:.1f} FLOP a byte")
confirm("LayerNorm is bound by memory", work["layer_norm"][1] / work["layer_norm"][0] < ridge, True)

# %% [markdown]
# ## Where each operation sits
#
# Time the package's operations on inputs that were not used a moment ago (else they are in the cache, and seem faster
# than memory allows), and draw them under the roof.

# %%
many = [torch.randn(T, 4 * C) for _ in range(effort(quick=4, full=24))]  # 12.6 MB each
weight, scale, shift = torch.randn(4 * C, C), torch.ones(C), torch.zeros(C)
qkv = [torch.randn(3, 1, 12, T, 64) for _ in many]  # (3, B, H, T, D)
turn = iter(range(10**9))
calls = {
    "layer_norm": lambda i: ops.layer_norm(many[i].view(-1, C)[:T], scale, shift),
    "gelu": lambda i: ops.gelu(many[i]),
    "linear": lambda i: ops.linear(many[i].view(-1, C)[:T], weight),
    "causal_attention": lambda i: ops.causal_attention(*qkv[i]),
}
reached = {name: shortest(lambda call=call: call(next(turn) % len(many))) for name, call in calls.items()}
backend = str(llmfast.explain("gelu", many[0])).split()[2]
marks = {name: (operations / moved, operations / reached[name] / 1e9) for name, (moved, operations) in work.items()}
for name, seconds in reached.items():
    least = max(work[name][0] / bandwidth, work[name][1] / peak) / 1e9
    print(f"{name:17} {seconds * 1e3:6.2f} ms, at least {least * 1e3:6.2f}: {least / seconds:4.0%} of the limit")
confirm(
    "nothing is much faster than the roof", all(w / reached[n] / 1e9 < 3 * peak for n, (_, w) in work.items()), True
)

# %% tags=["picture"]
roofline(bandwidth, peak, marks, f"Four operations of GPT-2, 1024 tokens, float32, by {backend}")

# %% [markdown]
# A small operation may lie above the slope: its result stays in the cache, and was never moved.
#
# ## One product, from one token to many
#
# The same weights with one token (decoding) and with a thousand (a prompt). With T tokens a product reads the weights
# once and computes 2 T operations for each: about T / 2 FLOP a byte. It climbs the slope, reaches the ridge, and turns.

# %%
tokens = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
weights = [torch.randn(4 * C, C) for _ in range(effort(quick=4, full=32))]  # 9.4 MB each: larger than most caches
rates = []
for t in tokens:
    x = torch.randn(t, C)
    seconds = shortest(lambda x=x: ops.linear(x, weights[next(turn) % len(weights)]), 0.1)
    rates.append(2 * t * C * 4 * C / seconds / 1e9)
intensity = [2 * t * C * 4 * C / ((t * C + 4 * C * C + t * 4 * C) * e) for t in tokens]
confirm("one token: half an operation for each byte", intensity[0], 0.5, within=0.01)

# %% tags=["picture"]
roof = [min(bandwidth * i, peak) for i in intensity]
curves(
    {"roof": (tokens, roof), "reached": (tokens, rates)}, x="tokens at once", y="GFLOP/s", log="xy", marks=True,
    title="768 → 3072: one token waits for memory, many for arithmetic",
)  # fmt: skip

# %% [markdown]
# So a token costs what its weights weigh. GPT-2 has 124 million: in float32 494 MB pass by for every token, and no
# program writes more than bandwidth / 494 MB tokens a second. Half the bytes, twice the tokens: that is all there is to
# bfloat16, int8 and int4 in decoding (lesson 17), and why a batch is nearly free (lesson 18).

# %% tags=["picture"]
sizes = {"float32": 494, "bfloat16": 247, "int8": 124, "int4": 69.5}
bars(
    {name: bandwidth * 1e3 / mb for name, mb in sizes.items()},
    "GPT-2 124M: tokens a second at most, here",
    form="{:.0f}",
)

# %% [markdown]
# ## Exercises
#
# **14.1** Write `intensity(T, K, N, e)`: FLOP a byte of a product (T, K) × (K, N), with e bytes an element.
#
# **14.2** Write `at_least(moved, operations, bandwidth, peak)`: seconds, from bytes, FLOP, GB/s and GFLOP/s.
#
# **14.3** GELU after a product: as a kernel of its own it reads the (T, N) result and writes it again. Fused into the
# product it does neither. Write `fused_saves(T, K, N, e)`: the share of the bytes of both that fusing saves.


# %%
def intensity(T, K, N, e): ...


def at_least(moved, operations, bandwidth, peak): ...


def fused_saves(T, K, N, e): ...


check("14.1", intensity)
check("14.2", at_least)
check("14.3", fused_saves)

# %% [markdown]
# Solutions are in `lessons/solutions/14_roofline.py`.
#
# **Read next**: `llmfast/benchmarking/op_cases.py` counts every operation, `csrc/ops/limits.inl` measures the machine,
# `llmfast/benchmarking/roofline.py` draws; `llmfast bench ops --report out/` does all of it for your kernel too
# (`docs/write-your-own-kernel.md`).
