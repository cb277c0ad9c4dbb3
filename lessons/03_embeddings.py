# %% [markdown]
# # 3. Embeddings and positions
#
# **A token becomes a row of numbers, learned so that words in like places are alike; then it is told where it stands.**
#
# To a table of counts "king" and "queen" are as different as "king" and "of". A model gives each token a **vector**.
# What two words have in common then shows as an angle.

# %%
from collections import Counter

import regex
import torch

import llmfast
from llmfast import ops
from llmfast.lessons import check, confirm, corpus, effort
from llmfast.lessons.pictures import curves, heats, points
from llmfast.models.rotary import RotarySettings

torch.manual_seed(0)
words = regex.findall(r"\w+", corpus().train.lower())
kinds = [word for word, _ in Counter(words).most_common(effort(quick=300, full=1500))]
number = {word: i for i, word in enumerate(kinds)}
V, C = len(kinds), 48  # kinds of words, channels

# %% [markdown]
# ## A word is known by the company it keeps
#
# Which words stand within three of which? Count it once, as a (V, V) table. Then learn two vectors for each word, one
# as itself and one as a neighbour, so that softmax of their products predicts the neighbours (after Mikolov et al.,
# 2013, who draw pairs one by one; with all counts at hand each step can use them all).

# %%
ids = torch.tensor([number.get(word, -1) for word in words])  # (N,), -1 for rare words
near = torch.zeros(V, V)
for distance in (1, 2, 3):
    a, b = ids[:-distance], ids[distance:]
    both = (a >= 0) & (b >= 0)
    near.index_put_((a[both], b[both]), torch.ones(int(both.sum())), accumulate=True)
near = near + near.T  # on either side
share = near / near.sum()  # (V, V): how often this pair, of all

E = torch.nn.Parameter(0.1 * torch.randn(V, C))  # the word itself
N = torch.nn.Parameter(0.1 * torch.randn(V, C))  # the word as a neighbour
optimizer = torch.optim.Adam([E, N], lr=0.03)
losses = []
for _ in range(effort(quick=40, full=250)):
    loss = -(share * torch.log_softmax(E @ N.T, dim=-1)).sum()  # (V, C) @ (C, V) -> (V, V)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
frequency = share.sum(dim=0)  # (V,)
independent = float(-(frequency * frequency.log()).nan_to_num().sum())
print(f"nats a neighbour: {losses[-1]:.3f}; by its frequency alone {independent:.3f}")
confirm("neighbours are predicted better than by their frequency", losses[-1] < independent, True)

# %% [markdown]
# ## Nearest words
#
# Two vectors are alike if the angle between them is small: the **cosine**, their product divided by their lengths.

# %%
table = torch.nn.functional.normalize(E.detach() - E.detach().mean(dim=0), dim=-1)  # (V, C), rows of length 1
alike = table @ table.T  # (V, V), cosines
for word in ("king", "father", "good", "his", "come", "function", "string", "list"):
    if word in number:
        best = alike[number[word]].topk(6).indices[1:].tolist()
        print(f"{word:9} {', '.join(kinds[i] for i in best)}")
confirm("each word is most like itself", alike.argmax(dim=-1), torch.arange(V))

# %% tags=["picture"]
wanted = "king queen lord duke father mother brother son his her my thy good great fair sweet come go give take is are"
shown = [word for word in wanted.split() if word in number] or kinds[20:44]
rows = table[[number[word] for word in shown]]  # (n, C)
_, _, axes = torch.pca_lowrank(rows, q=2)
points(rows @ axes, shown, f"{len(shown)} words: the two directions in which they differ most", width=7, height=5)

# %% [markdown]
# A model's embedding is this table, learned together with everything above it. Looking a row up is the same as a
# product with a vector that has a single 1:

# %%
one_hot = torch.nn.functional.one_hot(ids[:5].clamp(min=0), V).float()  # (5, V)
confirm("a row is a product with a one-hot vector", one_hot @ E, E[ids[:5].clamp(min=0)])

# %% [markdown]
# ## Where a token stands
#
# Attention (lesson 4) sees a set: "dog bites man" is "man bites dog". So each token is told its position. Three ways:
#
# * **learned** (GPT-2): a second table, a row for each position, added;
# * **sinusoidal** (Vaswani et al., 2017): a fixed table of waves, $\sin(p\,\omega_i)$ and $\cos(p\,\omega_i)$ with
#   $\omega_i = 10000^{-2i/C}$, from fast to slow;
# * **rotary** (Su et al., 2021; Llama): nothing is added. Queries and keys are turned, each pair of channels by the
#   angle $p\,\omega_i$.

# %%
T, D = 64, 64
omega = 10000.0 ** (-torch.arange(0, D, 2) / D)  # (D/2,)
angles = torch.arange(T)[:, None] * omega  # (T, D/2)
sinusoidal = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (T, D)
learned = llmfast.load("stories", precision="fp32").model.transformer.wpe.weight.detach()[:T]  # (T, 256)


def turn(x):
    a, b = x.chunk(2, dim=-1)  # pairs are (i, i + D/2): (T, D/2) each
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


confirm("the package's frequencies", RotarySettings().rotary(D, T).inverse_frequencies, omega)
x = torch.randn(1, 1, T, D)  # (B, H, T, D)
theirs = ops.rotary(x, angles.cos()[None], angles.sin()[None])
confirm("the package's rotation", theirs[0, 0], turn(x[0, 0]), within=1e-5)

# %% tags=["picture"]
heats(
    {"sinusoidal: position × channel": sinusoidal, "learned by the embedded model": learned,
     "rotary: the angle's sine": angles.sin()}, width=3.6, across=3,
)  # fmt: skip

# %% [markdown]
# ## What each knows about distance
#
# Take the product of position p with position p + d. For waves and rotations it depends on **d alone**, not on p: a
# model that learned "two words back" once knows it everywhere. A learned table knows what its training showed it.

# %%
cosine = torch.nn.functional.cosine_similarity
one = torch.ones(T, D)  # the same vector at each position, turned
turned = turn(one)
products = {
    "sinusoidal": sinusoidal @ sinusoidal.T / (D / 2),
    "learned": cosine(learned[:, None], learned[None], dim=-1),
    "rotary": turned @ turned.T / D,
}  # each (T, T)
for name in ("sinusoidal", "rotary"):
    confirm(f"{name}: the same at positions 0 and 40", products[name][0, :20], products[name][40, 40:60], within=1e-4)
confirm("a rotation keeps lengths", turned.norm(dim=-1), one.norm(dim=-1))

# %% tags=["picture"]
heats(products, width=3.4, across=3)
curves(
    {name: product[0, :40] for name, product in products.items()}, x="distance from position 0", y="likeness",
    title="Likeness by distance: near positions are alike",
)  # fmt: skip

# %% [markdown]
# ## Exercises
#
# **3.1** Write `nearest(table, i)`: the number of the row with the largest cosine to row i, other than i. The rows of
# `table` (V, C) have different lengths.
#
# **3.2** Write `sinusoids(T, C)`: the (T, C) table of sines, then cosines.
#
# **3.3** Write `score(q, k, m, n, omega)`: the product of a pair q (2,) turned to position m with k (2,) turned to n,
# by the angle position · omega.


# %%
def nearest(table, i): ...


def sinusoids(T, C): ...


def score(q, k, m, n, omega): ...


check("3.1", nearest)
check("3.2", sinusoids)
check("3.3", score)

# %% [markdown]
# Solutions are in `lessons/solutions/03_embeddings.py`.
#
# **Read next**: `Transformer` in `llmfast/models/gpt2.py` (`wte` and `wpe`, what a token is and where it stands);
# `llmfast/models/rotary.py`, where contexts are stretched by changing the frequencies; `csrc/ops/rotary.inl`, the
# shortest kernel of the package.
