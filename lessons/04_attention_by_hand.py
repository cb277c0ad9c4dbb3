# %% [markdown]
# # 4. Attention without weights
#
# **Each word looks at all others, and becomes a mixture of what it finds alike: three steps, no parameter.**
#
# A table of counts (lesson 1) looks at the last few characters and treats "the cat" and "the dog" as strangers.
# Attention (Bahdanau et al., 2014; Vaswani et al., 2017) looks at all words at once, near or far, and asks of each how
# much it matters. Here it is by hand on six words, before anything is learned.

# %%
import math

import torch

from llmfast import ops
from llmfast.lessons import check, confirm
from llmfast.lessons.pictures import heats, points

torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## Six words in three dimensions
#
# "Your journey starts with one step", each word a vector of three numbers. These are the well-known numbers of
# Raschka's *Build a Large Language Model (From Scratch)* (2024), so that you can compare. A real model has hundreds of
# dimensions, and learns them (lesson 3).

# %%
words = ["Your", "journey", "starts", "with", "one", "step"]
x = torch.tensor([
    [0.43, 0.15, 0.89],
    [0.55, 0.87, 0.66],
    [0.57, 0.85, 0.64],
    [0.22, 0.58, 0.33],
    [0.77, 0.25, 0.10],
    [0.05, 0.80, 0.55],
])  # (6, 3): T = 6 tokens, C = 3 channels  # fmt: skip

# %% tags=["picture"]
points(x[:, :2], words, "The six words: the first two of their three channels", arrows=True)

# %% [markdown]
# ## Step 1: scores
#
# How much should "journey" look at each word? Take the **dot product** of its vector with each other: multiply channel
# by channel, and add. It is large where two vectors are long and point the same way.

# %%
query = x[1]  # (3,): "journey"
scores = torch.tensor([sum(a * b for a, b in zip(query, word, strict=True)) for word in x])  # (6,)
for word, score in zip(words, scores, strict=True):
    print(f"journey · {word:8} = {score:.4f}")
confirm("the scores of 'journey'", scores, [0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865])

# %% [markdown]
# "journey" is most like itself, then like "starts". All six sums at once are one product of a matrix and a vector:

# %%
confirm("x @ query is the same", x @ query, scores)  # (6, 3) @ (3,) -> (6,)

# %% [markdown]
# ## Step 2: weights
#
# Scores can be anything. Weights should be positive and sum to 1, so that a mixture stays on the scale of what is
# mixed. That is **softmax**: $w_i = e^{s_i} / \sum_j e^{s_j}$.
#
# $e^{100}$ does not fit a float32, so everybody subtracts the largest score first. Above and below the line of the
# fraction stands the same factor then, and the result does not change.


# %%
def softmax(scores):
    powers = (scores - scores.max()).exp()  # (6,), the largest is 1
    return powers / powers.sum()


weights = softmax(scores)  # (6,)
confirm("the weights of 'journey'", weights, [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581])
confirm("they sum to 1", weights.sum(), 1.0)
confirm("PyTorch agrees", torch.softmax(scores, dim=0), weights, within=1e-6)
big = softmax(torch.tensor([1000.0, 999.0]))  # without the subtraction: inf / inf, which is nan
confirm("large scores do no harm", big, [0.7311, 0.2689])

# %% [markdown]
# ## Step 3: the context vector
#
# Mix all six vectors by these weights. What comes out has the shape of a word, and is "journey" in this sentence.

# %%
context = sum(weight * word for weight, word in zip(weights, x, strict=True))  # (3,)
confirm("the context vector of 'journey'", context, [0.4419, 0.6515, 0.5683])
confirm("weights @ x is the same", weights @ x, context)  # (6,) @ (6, 3) -> (3,)

# %% [markdown]
# ## All words at once
#
# Nothing in this was special to "journey". With every word as the query, the scores are a matrix: row = who looks,
# column = at whom. Softmax goes **along each row**. Three lines for any number of words:


# %%
def attention(x):
    scores = x @ x.T  # (T, C) @ (C, T) -> (T, T)
    weights = torch.softmax(scores, dim=-1)  # (T, T), each row sums to 1
    return weights, weights @ x  # (T, T) @ (T, C) -> (T, C)


all_weights, contexts = attention(x)  # (6, 6), (6, 3)
confirm("row 1 is what we did by hand", contexts[1], context)
confirm("every row sums to 1", all_weights.sum(dim=-1), torch.ones(6))

# %% tags=["picture"]
heats(
    {"scores: row looks at column": x @ x.T, "weights: rows sum to 1": all_weights}, words, words, width=4.2, height=3.6
)

# %% [markdown]
# The scores are symmetric, the weights are not: "one" has small scores everywhere, but its row must sum to 1 too.
#
# ## What it does to the words
#
# Every context vector lies between the words it was mixed from, so attention pulls words together. Without learned
# weights it can do no more than that: a word can't look for anything but what is like itself. Lesson 5 gives it
# queries, keys and values.

# %% tags=["picture"]
mixed = torch.cat([x, contexts])[:, :2]  # (12, 2)
points(mixed, [*words, *[""] * 6], "Before (blue), and after: all six orange points", colours=[0] * 6 + [1] * 6)

# %% [markdown]
# ## Against the package
#
# `llmfast.ops.bidirectional_attention` is this function, with two things more: it divides the scores by $\sqrt{C}$
# (lesson 5 says why; `scale=1` switches it off), and takes (B, H, T, D): B sequences in H heads.

# %%
ours = contexts
four = x.view(1, 1, 6, 3)  # (B, H, T, D): one sequence, one head
theirs = ops.bidirectional_attention(four, four, four, scale=1.0)  # (1, 1, 6, 3)
confirm("the package's attention is ours", theirs[0, 0], ours, within=1e-5)

# %% [markdown]
# It never holds the (T, T) weights in memory: lesson 16 shows how. At T = 6 that saves nothing; at T = 8,192 the
# weights of one head would be 268 MB.

# %%
confirm("MB of weights at 8,192 tokens", 8192 * 8192 * 4 / 1e6, 268.4, within=0.1)
print(f"and among how many words does 'journey' divide its look? {math.exp(-(weights * weights.log()).sum()):.2f} of 6")

# %% [markdown]
# ## Exercises
#
# **4.1** Write `softmax_rows(scores)` for scores (T, T): each row becomes weights. It must hold for scores of 1000.
#
# **4.2** Write `sharper(x, factor)`: attention whose scores are multiplied by `factor` first. Return the context
# vectors (T, C). What happens for 0, and for 100?
#
# **4.3** The diagonal is mostly the largest. Write `looking_away(x)`: attention in which no word may look at itself.
# Return the weights (T, T).


# %%
def softmax_rows(scores): ...


def sharper(x, factor): ...


def looking_away(x): ...


check("4.1", softmax_rows)
check("4.2", sharper)
check("4.3", looking_away)

# %% [markdown]
# Solutions are in `lessons/solutions/04_attention_by_hand.py`.
#
# **Read next**: `llmfast/backends/reference.py`, where the formula stands in float64 for all kernels to be held to, and
# `bidirectional_attention` in `llmfast/ops.py`, its contract.
