# %% [markdown]
# # 18. One token
#
# **Where does a token's time go? A profile of one step against the bytes it must read, and two ways to share them.**
#
# Everything comes together here: the model of lesson 7, the cache of lesson 9, the roofline of lesson 14, the packed
# weights of lessons 15 and 17. On a CPU a step of this package is one call into C++, by a team of threads that stays
# awake. What does it do with its time?

# %%
import math

import torch

import llmfast
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.material import machine, random_llm, shortest, step_seconds
from llmfast.lessons.pictures import bars, curves

L = effort(quick=2, full=6)
shape = dict(n_layer=L, n_embd=768, n_head=12, vocab_size=effort(quick=8192, full=32768), n_positions=1024)
llm, here = random_llm("fp32", **shape), machine()
print(llm, f"\n{here.bandwidth:.0f} GB/s, {here.peak:.0f} GFLOP/s on {here.threads} threads")

# %% [markdown]
# ## What a step must read
#
# Each weight once (of the token table one row, but as the head all of it), and the keys and values of all tokens so
# far. Nothing can be left out.

# %%
C, V, context = 768, shape["vocab_size"], 512
reads = {
    "queries, keys, values": L * 3 * C * C,
    "attention's output": L * C * C,
    "the network": L * 8 * C * C,
    "the head": V * C,
    f"cache of {context} tokens": L * 2 * context * C,
}  # numbers of 4 bytes each
total = 4 * sum(reads.values())
weights = 4 * (sum(reads.values()) - reads[f"cache of {context} tokens"])
stated = sum(
    math.prod(p.shape) for p in llm.config.parameters() if len(p.shape) == 2 and p.role != "position_embedding"
)
confirm("the package's count of matrices", weights // 4, stated, within=0)
seconds = step_seconds(llm, context=context)
least = total / here.bandwidth / 1e9
print(f"{total / 1e6:.0f} MB: at least {least * 1e3:.2f} ms; a step takes {seconds * 1e3:.2f}: {least / seconds:.0%}")

# %% tags=["picture"]
bars({name: 4 * n / 1e6 for name, n in reads.items()}, "What a step reads, in MB", form="{:.1f}")

# %% [markdown]
# ## A profile by differences
#
# A step is over in a millisecond or two: too short for a profiler that stops the world. But a model can be made longer,
# wider in vocabulary, or given more context, and each difference is a phase's time.

# %% tags=["given"]
long = effort(quick=0.05, full=0.5)
base = step_seconds(llm, context=32, least=long)
deeper = step_seconds(random_llm("fp32", **shape | {"n_layer": 2 * L}), context=32, least=long)
wordier = step_seconds(random_llm("fp32", **shape | {"vocab_size": 2 * V}), context=32, least=long)
remembering = step_seconds(llm, context=800, least=long)
blocks, head = max(deeper - base, 0.0), max(wordier - base, 0.0)
attention = max(remembering - base, 0.0) / (800 - 32) * context
phases = {
    f"{L} blocks": (blocks, 4 * L * 12 * C * C),
    "the head": (head, 4 * V * C),
    f"attention to {context} tokens": (attention, 4 * L * 2 * context * C),
    "all else: waking, norms, choosing": (max(base - blocks - head, 0.0), 0),
}
for name, (took, size) in phases.items():
    print(f"{name:34} {took * 1e3:6.3f} ms, {size / 1e6:6.1f} MB, at least {size / here.bandwidth / 1e6:6.3f} ms")
confirm(
    "the parts make up the whole", blocks + head + phases["all else: waking, norms, choosing"][0] >= 0.5 * base, True
)

# %% tags=["picture"]
bars({name: took * 1e3 for name, (took, _) in phases.items()}, "Where a step's time goes, in ms", form="{:.3f}")
speeds = {name: size / took / 1e9 for name, (took, size) in phases.items() if size and took}
bars(speeds | {"the machine's limit": here.bandwidth}, "Each phase's bytes a second, in GB/s", form="{:.1f}")

# %% [markdown]
# A phase above the limit finds its bytes in the cache: on a CPU with a large one a small model lives there.
#
# ## Batches: the same bytes for several texts
#
# Two texts read the same weights. A step for B sequences reads them once and computes B times as much, which was free:
# lesson 14's slope, climbed. Only the cache is each text's own.

# %%
batches = effort(quick=[1, 2, 4], full=[1, 2, 4, 8, 16, 32])
rates = [B / step_seconds(llm, batch=B, context=32, least=effort(quick=0.05, full=0.3)) for B in batches]
bound = [1 / max(weights / (here.bandwidth * 1e9) / B, 2 * weights / 4 / (here.peak * 1e9)) for B in batches]
for B, rate in zip(batches, rates):
    print(f"{B:2} texts: {rate:7.0f} tokens a second, {rate / rates[0]:.1f} times one text's")
confirm("a larger batch writes more in all", rates[-1] > rates[0], True)

# %% tags=["picture"]
curves(
    {"reached": (batches, rates), "the roof": (batches, bound)},
    x="texts at once", y="tokens a second, of all", log="xy", marks=True,
    title="Batches are nearly free until arithmetic is the limit",
)  # fmt: skip

# %% [markdown]
# ## Guessing ahead: the same bytes for several tokens of one text
#
# One text can share reads too, with its own future. Guess the next k tokens cheaply, let the model read them all in one
# step, and keep as many as it would have said itself (Stern et al., 2018; Leviathan et al., 2022). The text does not
# change, by a bit. If each guess is right with probability a, a step gives $1 + a + a^2 + \dots + a^k$ tokens.
#
# llmfast guesses without a second model: where the text repeats itself, what came after last time comes again.


# %%
def tokens_a_step(a, k):
    return sum(a**i for i in range(k + 1))


draw = torch.rand(20_000, 6, generator=torch.Generator().manual_seed(0)) < 0.7  # each guess right with 0.7
accepted = 1 + draw.cumprod(dim=-1).sum(dim=-1)  # (20000,): until the first that is wrong
confirm("the formula is what happens", accepted.float().mean(), tokens_a_step(0.7, 6), within=0.05)

stories = llmfast.load("stories", precision="fp32")
song = "The sun is up. The bird sings. The dog runs. The cat sleeps. " * 4
plain = stories.generate(song, max_new_tokens=60, temperature=0, speculate=0)
guessed = stories.generate(song, max_new_tokens=60, temperature=0, speculate=6)
confirm("guessing ahead does not change the text", guessed, plain)
slow, fast = (
    shortest(
        lambda k=k: stories.generate(song, max_new_tokens=60, temperature=0, speculate=k), effort(quick=0.1, full=1.0)
    )
    for k in (0, 6)
)
print(f"a text that repeats itself: {slow / fast:.2f} times as fast with 6 guesses")

# %% tags=["picture"]
shares = [i / 20 for i in range(20)]
curves(
    {f"{k} guesses": (shares, [tokens_a_step(a, k) for a in shares]) for k in (2, 4, 8)},
    x="how often a guess is right", y="tokens a step",
    title="What guessing ahead can give, if k + 1 cost no more than one",
)  # fmt: skip

# %% [markdown]
# That "if" is lesson 14 again: reading a few tokens more costs nothing only while memory is the limit. In a full batch
# there is no slack left, and guessing costs more than it gives. `llmfast` stops guessing where it does not pay.
#
# ## Exercises
#
# **18.1** Write `tokens_a_second(weight_bytes, cache_bytes, batch, bandwidth)`: of all texts together, at most, by
# memory; each text has a cache of its own; GB/s.
#
# **18.2** Write `speedup(a, k, cost)`: of guessing k tokens that are right with probability a each, where a step that
# reads k + 1 tokens takes `cost` times a usual one.
#
# **18.3** Write `largest_batch(memory, weight_bytes, cache_bytes)`: how many texts fit beside the weights.


# %%
def tokens_a_second(weight_bytes, cache_bytes, batch, bandwidth): ...


def speedup(a, k, cost): ...


def largest_batch(memory, weight_bytes, cache_bytes): ...


check("18.1", tokens_a_second)
check("18.2", speedup)
check("18.3", largest_batch)

# %% [markdown]
# Solutions are in `lessons/solutions/18_one_token.py`.
#
# **Read next**: `csrc/decoder/decoder_step.inl`, the step; `csrc/decoder/team.cpp`, the threads that stay awake;
# `llmfast/inference/decoders/speculating.py`; and `docs/performance.md`, everything that was tried, failures too. From
# here on you know what to try next.
