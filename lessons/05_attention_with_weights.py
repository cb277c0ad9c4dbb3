# %% [markdown]
# # 5. Attention with weights
#
# **Three matrices let a word ask for what it is not; a mask keeps it from the future; heads let it ask several
# things.**
#
# In lesson 4 a word could only find what is like itself. Here it gets three learned views of itself (Vaswani et al.,
# 2017): a **query**, what it looks for; a **key**, what others find it by; a **value**, what it gives when it is found.

# %%
import torch
from torch import nn

import llmfast
from llmfast import ops
from llmfast.lessons import check, confirm
from llmfast.lessons.material import journey
from llmfast.lessons.pictures import curves, heats
from llmfast.lessons.viewer import AttentionPage

words, x = journey()  # x: (6, 3), the six words of lesson 4

# %% [markdown]
# ## Queries, keys, values
#
# Three matrices, (3, 2) each, with the random numbers of the well-known example (Raschka, 2024; seed 123). Training
# will move them. The scores are queries times keys now, and what is mixed are the values.

# %%
torch.manual_seed(123)
W_query, W_key, W_value = torch.rand(3, 2), torch.rand(3, 2), torch.rand(3, 2)
q, k, v = x @ W_query, x @ W_key, x @ W_value  # each (6, 3) @ (3, 2) -> (6, 2)
scores = q @ k.T  # (6, 2) @ (2, 6) -> (6, 6), no longer symmetric
weights = torch.softmax(scores / 2**0.5, dim=-1)  # (6, 6); the root of the width 2, see below
context = weights @ v  # (6, 6) @ (6, 2) -> (6, 2)
confirm("the query of 'journey'", q[1], [0.4306, 1.4551])
confirm("its score with itself", scores[1, 1], 1.8524)
confirm("its context vector", context[1], [0.3061, 0.8210])

# %% [markdown]
# ## Why the root of d
#
# A dot product of two random vectors of d channels, each of variance 1, is a sum of d terms, and has variance d. For
# d = 1024 scores of ±32 are usual. Softmax of such numbers is nearly a 1 among zeros, whatever the words: and where
# softmax is flat, its gradient is gone. Dividing by $\sqrt{d}$ brings the variance back to 1, for every d.

# %%
torch.manual_seed(0)
widths = [4, 16, 64, 256, 1024]
scores = {d: torch.randn(400, 1, d) @ torch.randn(400, d, 16) for d in widths}  # (400, 1, 16): 400 queries, 16 keys
weights = {"without": [scores[d].softmax(-1) for d in widths]}  # each (400, 1, 16)
weights["with 1/√d"] = [(scores[d] / d**0.5).softmax(-1) for d in widths]
confirm("the variance of a score is d", scores[1024].var() / 1024, 1.0, within=0.1)

# %% tags=["picture"]
curves(
    {name: (widths, [w.amax(-1).mean() for w in found]) for name, found in weights.items()},
    x="d", y="largest of 16 weights", log="x", marks=True, title="Without the root, wide heads look at one word only",
)  # fmt: skip
curves(
    {name: (widths, [(w * (1 - w)).mean() for w in found]) for name, found in weights.items()},
    x="d", y="slope of a weight by its score", log="x", marks=True, title="… and learn nothing from the others",
)  # fmt: skip

# %% [markdown]
# ## The mask, three ways
#
# A model that writes must not look at words that are not written yet. Three tries, on the example's second set of
# weights (linear layers, seed 789).

# %%
torch.manual_seed(789)
ask, find, give = (nn.Linear(3, 2, bias=False) for _ in range(3))
with torch.no_grad():
    q, k, v = ask(x), find(x), give(x)  # each (6, 2)
scores = q @ k.T / 2**0.5  # (6, 6)
future = torch.ones(6, 6, dtype=torch.bool).triu(1)  # True above the diagonal: column after row

erased = torch.softmax(scores, dim=-1).masked_fill(future, 0.0)  # 1. erase weights after softmax, and divide again
after = erased / erased.sum(dim=-1, keepdim=True)
zeros = torch.softmax(scores.masked_fill(future, 0.0), dim=-1)  # 2. scores of 0: e⁰ is 1, so the future is seen
infinite = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)  # 3. scores of −∞: e to that is 0
confirm("'journey' looks at itself and what came before", infinite[1], [0.5517, 0.4483, 0, 0, 0, 0])
confirm("the first way gives the same", after, infinite)
print(f"the second does not: 'Your' gives the future {zeros[0, 1:].sum():.0%} of its look")

# %% tags=["picture"]
heats({"1. after softmax": after, "2. scores of 0: wrong": zeros, "3. scores of −∞": infinite}, words, words, width=3.6)

# %% [markdown]
# The first way needs a second division and has seen the future on its way: its sum was part of the softmax. Everybody
# uses the third.
#
# ## Dropout
#
# While training, some weights are set to 0 at random and the rest grow by $1 / (1 - p)$, so that their mean stays
# (Srivastava et al., 2014). A model that can't count on any single word learns to use several. When it writes, there is
# none.

# %%
torch.manual_seed(0)
dropped = torch.stack([nn.functional.dropout(infinite, 0.5) for _ in range(4000)])  # (4000, 6, 6)
confirm("each weight is 0 or twice itself", torch.minimum(dropped, (dropped - 2 * infinite).abs()).max(), 0.0)
confirm("the mean stays", dropped.mean(dim=0), infinite, within=0.06)

# %% [markdown]
# ## Several heads
#
# One softmax makes one mixture. To ask two things at once, split the channels into H groups of D and let each have its
# own attention: a **head**. No loop is needed, a `view` and a `transpose` do it. Written as GPT-2 has it:


# %%
def heads(x, H):
    B, T, C = x.shape
    return x.view(B, T, H, C // H).transpose(1, 2)  # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)


def attention(q, k, v, scale):
    T = q.shape[-2]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = scale * q @ k.transpose(-1, -2)  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
    weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    return weights, weights @ v  # (B, H, T, T) @ (B, H, T, D) -> (B, H, T, D)


torch.manual_seed(0)
q, k, v = (heads(torch.randn(2, 10, 12), H=3) for _ in range(3))  # each (2, 3, 10, 4)
_, ours = attention(q, k, v, 4**-0.5)  # (2, 3, 10, 4)
joined = ours.transpose(1, 2).reshape(2, 10, 12)  # (2, 10, 3, 4) -> (2, 10, 12): heads side by side again
confirm("three heads against the package's op", ops.causal_attention(q, k, v), ours, within=1e-5)

# %% [markdown]
# ## Your attention in a real model
#
# A backend of llmfast is anything with functions named as its ops. So put ours in, let it remember its weights, and run
# the embedded model with it. It must say the same as before.

# %%
seen = []


class Watching:
    @staticmethod
    def causal_attention(q, k, v, *, scale, **others):
        groups = q.shape[1] // k.shape[1]  # Llama-like models have a key head for several query heads
        weights, mixed = attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), scale)
        seen.append(weights[0])  # (H, T, T)
        return mixed


llmfast.register_backend("watching", Watching)
llm = llmfast.load("stories", precision="fp32")
ids = torch.tensor([llm.tokenizer.encode("Lily had a red ball. Tom took the ball, and Lily was sad.")])  # (1, T)
with torch.no_grad():
    expected = llm.model(ids)  # (1, T, V)
    with llmfast.use_backend({"causal_attention": "watching"}):
        logits = llm.model(ids)
confirm("the model says the same with our attention", logits, expected, within=1e-3)
tokens = [llm.tokenizer.decode([i]) for i in ids[0].tolist()]
AttentionPage(tokens, torch.stack(seen))  # (6 layers, 4 heads, T, T): hover over a head, then over a word

# %% tags=["picture"]
heats(
    {f"layer {i // 4 + 1}, head {i % 4 + 1}": w for i, w in enumerate(torch.cat(seen))}, width=1.9, height=1.9, across=8
)

# %% [markdown]
# Nobody told the heads what to do. In the first layer most look at near words. Later ones pick a word and keep to it:
# a column that is dark from some row on. Where nothing matters, a head looks at the first token, which every query can
# see: an attention sink (Xiao et al., 2023). Larger models do that most of the time. This is SmolLM2, once
# `llmfast get smollm2` has brought it: 30 layers of 9 heads, which share 3 key heads.

# %% tags=["picture"]
from llmfast.weights.fetching import is_there

if is_there("smollm2"):
    chatty, _ = llmfast.load("smollm2"), seen.clear()
    ids = torch.tensor([chatty.tokenizer.encode("The capital of France is Paris, and the capital of Italy is")])
    with torch.no_grad(), llmfast.use_backend({"causal_attention": "watching"}):
        best = int(chatty.model(ids)[0, -1].argmax())
    confirm("it goes on with ' Rome'", chatty.tokenizer.decode([best]), " Rome")
    heats({f"layer {n + 1}, head {h + 1}": seen[n][h] for n in (0, 9, 19, 29) for h in (0, 4)}, width=1.9, height=1.9)

# %% [markdown]
# ## Exercises
#
# **5.1** Write `causal_mask(T, S)` for a model that has S tokens, of which the last T are the queries: a bool tensor
# (T, S), True where a query must not look.
#
# **5.2** Write `join(y)`: heads (B, H, T, D) side by side, (B, T, H · D).
#
# **5.3** Mistral's queries see only the last W keys, their own included. Write `windowed(scores, W)`: from scores (T,
# T) the weights (T, T) of causal attention in a window.


# %%
def causal_mask(T, S): ...


def join(y): ...


def windowed(scores, W): ...


check("5.1", causal_mask)
check("5.2", join)
check("5.3", windowed)

# %% [markdown]
# Solutions are in `lessons/solutions/05_attention_with_weights.py`.
#
# **Read next**: `CausalSelfAttention` in `llmfast/models/gpt2.py`: the same dozen lines, with a cache. Its kernels are
# `csrc/ops/attention.inl` for CPUs and `kernels/attention_forward.py` for GPUs, where the (T, T) weights are never
# stored; `docs/write-your-own-kernel.md` goes on with backends of your own.
