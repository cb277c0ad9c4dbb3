# %% [markdown]
# # 17. Kernels 4: fewer bits
#
# **A weight as 8 or 4 bits: what is lost, who loses it, what it costs in nats, and why decoding gets twice as fast.**
#
# One token reads every weight once (lesson 14). So weights of half the bytes are read in half the time. float32 has 24
# bits of precision, and a model needs far fewer: its weights are full of noise anyway.

# %%
import torch

import llmfast
from llmfast import ops
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.material import random_llm, step_seconds
from llmfast.lessons.pictures import COLOURS, bars, curves, panels
from llmfast.quantization.formats import quantize

torch.manual_seed(0)
llm = llmfast.load("stories", precision="fp32")
weight = llm.model.transformer.h[3].mlp.c_fc.weight.detach()  # (1024, 256)

# %% [markdown]
# ## int8
#
# Each row has a **scale**: its largest number becomes 127, and everything is rounded to a multiple of scale.


# %%
def int8(w):
    scale = w.abs().amax(dim=-1, keepdim=True) / 127  # (N, 1)
    return (w / scale).round().to(torch.int8), scale  # (N, K) of 1 byte each


def error(w, again):
    return float((w - again).norm() / w.norm())


values, scale = int8(weight)
theirs = quantize(weight, "int8")
confirm("the integers are the package's", values, theirs.values, within=0)
size = values.numel() + 4 * len(values)
print(f"int8: off by {error(weight, values * scale):.2%}, in {size:,} bytes of {weight.nbytes:,}")

# %% [markdown]
# ## Outliers, and groups
#
# One large weight makes the steps of its whole row coarse. That is what spoils 8 bits in large models (Dettmers et al.,
# 2022), and 4 bits everywhere. So a scale is given to each **group** of 32 numbers: an outlier costs its neighbours
# only, and the scales cost half a bit a weight.


# %%
def rounded(w, bits, group):
    largest = 2 ** (bits - 1) - 1
    groups = w.view(len(w), -1, group)  # (N, K) -> (N, K / group, group)
    scale = groups.abs().amax(dim=-1, keepdim=True) / largest  # (N, K / group, 1)
    return ((groups / scale).round() * scale).view_as(w)


spoiled = weight.clone()
spoiled[:, 7] = 20 * weight.std()  # one channel of 256, as large models have them
sizes = [16, 32, 64, 128, 256]
errors = {
    f"{bits} bits, {name}": [error(w, rounded(w, bits, group)) for group in sizes]
    for bits in (8, 4)
    for name, w in (("as it is", weight), ("with an outlier a row", spoiled))
}
confirm("a group of a whole row is int8", rounded(weight, 8, 256), values * scale, within=1e-6)

# %% tags=["picture"]
curves(
    {n: (sizes, e) for n, e in errors.items()},
    x="numbers that share a scale",
    y="error",
    log="xy",
    marks=True,
    title="Groups confine an outlier",
)
figure, axes = panels(2, 4.2, 2.4)
for ax, group in zip(axes, (256, 32)):
    row, steps = spoiled[0], spoiled[0].view(-1, group).abs().amax(-1) / 7  # 4 bits: -7 … 7
    ax.hist(row.tolist(), bins=120, color=COLOURS[0])
    for level in range(-7, 8):
        ax.axvline(level * float(steps[-1]), color=COLOURS[1], linewidth=0.8)
    ax.set_xlim(-5 * float(weight.std()), 5 * float(weight.std()))
    ax.set_title(
        f"groups of {group}: the steps of 4 bits beside the outlier" if group == 256 else "groups of 32: of the others"
    )

# %% [markdown]
# ## int4, packed
#
# Two numbers share a byte: the low four bits and the high ones. The largest number need not be the end of the scale
# either. The package tries a few dozen scales for each group, and keeps the one with the smallest squared error.

# %%
integers = torch.randint(-8, 8, (4, 32))
packed = (integers[:, 0::2] + 8) + 16 * (integers[:, 1::2] + 8)  # (4, 16) bytes: neighbours in a byte
again = torch.stack([packed % 16, packed // 16], dim=-1).view(4, 32) - 8  # (4, 16, 2) -> (4, 32)
confirm("two in a byte, and back", again, integers, within=0)
best = quantize(weight, "int4")
plain = error(weight, rounded(weight, 4, 32))
print(f"4 bits: off by {plain:.1%} with the largest as the end, {error(weight, best.dequantize()):.1%} searched for")
confirm("searching for a scale helps", error(weight, best.dequantize()) < plain, True)
confirm(
    "bytes: half a byte a weight, and two for each scale",
    best.nbytes,
    weight.numel() // 2 + weight.numel() // 32 * 2,
    within=0,
)

# %% [markdown]
# ## A product with such weights
#
# `ops.quantized_linear` unpacks while it multiplies: a weight is never in memory as a float. On a CPU with the C++
# kernels the activations get 8 bits too, for integer instructions; as an op on its own they stay floats.

# %%
x = torch.randn(5, 256)  # (T, K)
for form in ("int8", "int4"):
    stored = quantize(weight, form)
    product = ops.quantized_linear(x, **stored.parts)  # (5, 256) × (1024, 256) -> (5, 1024)
    confirm(f"{form}: the product with the weights that it stands for", product, x @ stored.dequantize().T, within=1e-3)

# %% [markdown]
# ## What it costs in nats
#
# The error of a weight is not what counts. Let the model read text, with each precision: how many nats a token does it
# lose? The text is one that it wrote itself in float32, so that its own loss is the text's entropy.

# %%
text = llm.generate("Once upon a time", max_new_tokens=effort(quick=150, full=400), temperature=1.0, seed=1)
starts = ("One day", "Tom and Lily", "The little dog")[: effort(quick=1, full=3)]
texts = [text, *(llm.generate(s, max_new_tokens=400, temperature=1.0, seed=2) for s in starts)]


def nats(model):
    found = torch.cat([model.score(text).log_probabilities for text in texts])
    return -float(found.nanmean())


base = nats(llm)
lost = {p: nats(llmfast.load("stories", precision=p)) - base for p in ("bf16", "int8", "int4", "int4-all")}
print(f"fp32: {base:.4f} nats a token;", ", ".join(f"{p} {loss:+.4f}" for p, loss in lost.items()))
confirm("int8 costs less than a hundredth of a nat", abs(lost["int8"]) < 0.01, True)
confirm("4 bits cost more than 8", lost["int4-all"] > lost["int8"], True)

# %% tags=["picture"]
bars(lost, "Nats a token lost, by the embedded model on its own text", form="{:+.4f}")

# %% [markdown]
# ## What it gains
#
# A model of 35 million random weights, 138 MB in float32. How long does a step take, and how many bytes does it read?

# %%
seconds, sizes = {}, {}
for precision in ("fp32", "bf16", "int8", "int4", "int4-all"):
    other = random_llm(precision, n_layer=effort(quick=1, full=4))
    seconds[precision] = step_seconds(other, least=effort(quick=0.05, full=0.5))
    packed = other.native()  # None where the native decoder can't run
    sizes[precision] = packed.nbytes if packed is not None else 4 * other.config.num_parameters
    print(f"{precision:9} {sizes[precision] / 1e6:6.1f} MB, {seconds[precision] * 1e3:5.2f} ms a token, "
          f"{sizes[precision] / seconds[precision] / 1e9:5.1f} GB/s")  # fmt: skip
confirm("int8 takes about a quarter of the bytes", sizes["int8"] / sizes["fp32"], 0.27, within=0.04)

# %% tags=["picture"]
bars({p: seconds["fp32"] / s for p, s in seconds.items()}, "Times as fast as float32", form="{:.2f} ×")

# %% [markdown]
# Prompts are another matter: they are bound by arithmetic, and gain only where the CPU multiplies small integers faster
# (README, "prefill").
#
# ## Exercises
#
# **17.1** Write `bits_a_weight(bits, group, scale_bits)`: what a weight takes, with its share of its group's scale.
#
# **17.2** Write `unpack(packed)`: bytes (N, K / 2) as uint8 -> integers (N, K) from −8 to 7; the low four bits are the
# even columns.
#
# **17.3** Write `asymmetric(w, bits)`: of a vector w the dequantised w, by a scale **and a minimum**: w becomes whole
# numbers from 0 to 2^bits − 1, which stand for minimum + scale · n (ggml's q4_1 does that).


# %%
def bits_a_weight(bits, group, scale_bits): ...


def unpack(packed): ...


def asymmetric(w, bits): ...


check("17.1", bits_a_weight)
check("17.2", unpack)
check("17.3", asymmetric)

# %% [markdown]
# Solutions are in `lessons/solutions/17_fewer_bits.py`.
#
# **Read next**: `llmfast/quantization/encodings.py`, every format in a page; `llmfast/quantization/plan.py`, which role
# gets which; `csrc/gemm/packed.inl`, where they are multiplied; `kernels/quantized_linear.py`, on a GPU.
