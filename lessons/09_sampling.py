# %% [markdown]
# # 9. Sampling
#
# **A model gives every token a probability. Which one to take is another matter, and half of what a text feels like.**
#
# Here is one distribution, and what each way of choosing makes of it. Then the search that sounds best and reads worst,
# and the memory that makes all of it affordable.

# %%
import torch

import llmfast
from llmfast.inference.cache import KVCache
from llmfast.inference.sampling import apply_repetition_penalty, keep_min_p, keep_top_k, keep_top_p
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.material import shortest
from llmfast.lessons.pictures import COLOURS, curves, panels

llm = llmfast.load("stories", precision="fp32")
model, tokenizer = llm.model, llm.tokenizer


def logits_after(text):
    ids = torch.tensor([tokenizer.encode(text)])  # (1, T)
    with torch.no_grad():
        return model(ids)[0, -1]  # (1, T, V) -> (V,)


prompt = "Once upon a time, there was a little"
logits = logits_after(prompt)  # (V,)
top = logits.softmax(-1).topk(12)
names = [tokenizer.decode([i]) for i in top.indices.tolist()]
print({name.strip(): round(float(p), 3) for name, p in zip(names, top.values)})

# %% [markdown]
# ## Shaping it
#
# **Temperature** t divides the logits: below 1 the likely get likelier, towards 0 only the likeliest is left (greedy).
# **top-k** (Fan et al., 2018) keeps k tokens. **top-p** (Holtzman et al., 2019) keeps as many as it takes for a
# probability of p. **min-p** (Nguyen et al., 2024) keeps what is at least min-p times as likely as the likeliest: few
# where the model is sure, many where it is not.


# %%
def top_k(logits, k):
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def top_p(logits, p):
    ordered, order = logits.softmax(-1).sort(descending=True)  # (V,) each
    before = ordered.cumsum(-1) - ordered  # what the likelier ones have together
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before >= p), -torch.inf)


def min_p(logits, least):
    return logits.masked_fill(logits < logits.max() + torch.tensor(least).log(), -torch.inf)


shapes = {
    "as it is": logits,
    "temperature 0.5": logits / 0.5,
    "temperature 1.5": logits / 1.5,
    "top-k 4": top_k(logits, 4),
    "top-p 0.8": top_p(logits, 0.8),
    "min-p 0.2": min_p(logits, 0.2),
}
confirm("top-k is the package's", top_k(logits, 4), keep_top_k(logits[None], 4)[0])
confirm("top-p is the package's", top_p(logits, 0.8), keep_top_p(logits[None], 0.8)[0])
confirm("min-p is the package's", min_p(logits, 0.2), keep_min_p(logits[None], 0.2)[0])

# %% tags=["picture"]
figure, axes = panels(6, 3.0, 2.3, columns=3)
for ax, (name, shaped) in zip(axes, shapes.items()):
    chosen = shaped.softmax(-1)[top.indices]
    ax.bar(range(12), chosen, color=[COLOURS[0 if p > 0 else 1] for p in chosen])
    ax.set_xticks(range(12), [n.strip() for n in names], rotation=70, fontsize=7)
    ax.set_title(f"{name}: {int((shaped > -torch.inf).sum()):,} tokens left")

# %% [markdown]
# ## Drawing
#
# Lay the probabilities end to end on a line from 0 to 1, and put a finger down at random. One number a token: the same
# seed gives the same text.

# %%
generator = torch.Generator().manual_seed(0)
sums = shapes["top-p 0.8"].softmax(-1).cumsum(-1)  # (V,), ends at 1
fingers = torch.rand(20_000, generator=generator)
drawn = torch.searchsorted(sums, fingers, right=True)  # (20000,)
shares = torch.bincount(drawn, minlength=len(sums)) / len(drawn)
confirm("20,000 draws have the distribution", shares, shapes["top-p 0.8"].softmax(-1), within=0.015)
for t in (0, 0.7, 1.5):
    print(f"temperature {t}: {llm.generate(prompt, max_new_tokens=40, temperature=t, seed=1)}\n")
confirm("greedy has no choice", *(llm.generate(prompt, max_new_tokens=20, temperature=0, seed=s) for s in (1, 2)))

# %% [markdown]
# ## Beam search, and why it repeats
#
# Greedy takes the best token; it may lead nowhere. **Beam search** keeps the best few beginnings and extends all. It
# finds texts of higher probability. But what is likeliest is not what people write: they say what is new. The likeliest
# continuation of a repeated phrase is to repeat it (Holtzman et al., 2019).


# %%
def beam(text, width, length):
    beams = [(0.0, tokenizer.encode(text))]  # (log-probability, ids)
    for _ in range(length):
        with torch.no_grad():
            rows = model(torch.tensor([ids for _, ids in beams]))[:, -1].log_softmax(-1)  # (beams, V)
        best = rows.topk(width)  # (beams, width)
        longer = [
            (score + float(p), [*ids, int(i)])
            for (score, ids), values, indices in zip(beams, best.values, best.indices)
            for p, i in zip(values, indices)
        ]
        beams = sorted(longer, key=lambda b: -b[0])[:width]
    return beams[0]


length = effort(quick=15, full=50)
score, ids = beam(prompt, 4, length)
greedy = beam(prompt, 1, length)
print(f"beam 4, {score:.1f}: {tokenizer.decode(ids)}\n\ngreedy, {greedy[0]:.1f}: {tokenizer.decode(greedy[1])}")
confirm(
    "a beam of one is greedy", tokenizer.decode(greedy[1]), llm.generate(prompt, max_new_tokens=length, temperature=0)
)
loop = " The cat sat on the mat."
repeats = [llm.score(loop * n).log_probabilities[-8:].nanmean() for n in (1, 2, 4)]
print("the same sentence for the 1st, 2nd, 4th time, nats a token:", [f"{-float(r):.2f}" for r in repeats])
confirm("repeating gets ever likelier", sorted(map(float, repeats)), list(map(float, repeats)), within=0.0)

# %% [markdown]
# A **repetition penalty** (Keskar et al., 2019) makes what was said less likely: positive logits are divided by it,
# negative ones multiplied.

# %%
said = torch.zeros(1, len(logits), dtype=torch.bool)
said[0, tokenizer.encode(prompt)] = True
ours = torch.where(said[0], torch.where(logits > 0, logits / 1.3, logits * 1.3), logits)
confirm("the penalty is the package's", ours, apply_repetition_penalty(logits[None], said, 1.3)[0])

# %% [markdown]
# ## The cache
#
# A new token looks at all before it. Their keys and values don't change, so they are kept. Without that, each token
# computes the whole text again: the work grows with the square of the length.

# %% tags=["given"]
lengths = effort(quick=[32, 64], full=[32, 64, 128, 256, 448])
without, kept = [], []
for T in lengths:
    ids = torch.randint(model.config.vocab_size, (1, T + 1))
    cache = KVCache(model.config, 1, T + 200)
    with torch.no_grad():
        model(ids[:, :T], cache)
        by_cache = model(ids[:, T:], cache)  # (1, 1, V): one token, which sees T others
        confirm(f"{T} tokens: the cache changes nothing", by_cache[0, -1], model(ids)[0, -1], within=1e-3)
        without.append(shortest(lambda: model(ids), 0.1) * 1e3)
        kept.append(shortest(lambda: model(ids[:, T:], cache) if cache.longest < T + 190 else None, 0.02) * 1e3)

# %% tags=["picture"]
curves(
    {"all again": (lengths, without), "with the cache": (lengths, kept)}, x="tokens before", y="ms a token", marks=True,
    title="What the cache saves",
)  # fmt: skip

# %% [markdown]
# ## Exercises
#
# **9.1** Write `keep_k(logits, k)`: of (V,) logits the same with all but the k largest at −∞.
#
# **9.2** Write `nucleus(probabilities, p)`: the numbers of the tokens, likeliest first, that it takes for at least p.
#
# **9.3** Write `pick(probabilities, finger)`: the token at which the sum of (V,) probabilities passes `finger`.


# %%
def keep_k(logits, k): ...


def nucleus(probabilities, p): ...


def pick(probabilities, finger): ...


check("9.1", keep_k)
check("9.2", nucleus)
check("9.3", pick)

# %% [markdown]
# Solutions are in `lessons/solutions/09_sampling.py`.
#
# **Read next**: `llmfast/inference/sampling.py`, `llmfast/inference/cache.py`, and `llmfast/inference/decoding.py`, the
# loop itself. Which tokens may come at all can also be a grammar's: `llmfast/inference/constraint.py`.
