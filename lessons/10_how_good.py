# %% [markdown]
# # 10. How good is it?
#
# **Three ways to judge a model: how surprised it is, what it prefers, and what it would gain from more; and what
# a number hides.**
#
# A text that reads well proves little: one can always draw again. What counts is measured on text the model has not
# seen, in a unit that compares, with its uncertainty.

# %%
import math
import random
from collections import Counter, defaultdict

import torch

import llmfast
from llmfast.evaluation.perplexity import text_perplexity
from llmfast.lessons import check, confirm, corpus, effort
from llmfast.lessons.pictures import bars, curves

llm, book = llmfast.load("stories", precision="fp32"), corpus()

# %% [markdown]
# ## Surprise, in a unit that compares
#
# Nats a token depend on the tokens: longer ones are harder, and fewer. Spread over the **bytes** of the text, in bits,
# every model can stand beside every other (lesson 2, exercise 2.3).

# %%
story = "Tom had a red kite. One day the wind took it up into a big tree. Tom was sad. His mom got a long stick. "
story += "She pulled the kite down, and Tom was happy. He said thank you and gave her a big hug."
score = llm.score(story)
nats = -float(score.log_probabilities.nansum())
counted = int((~score.log_probabilities.isnan()).sum())  # (T,): the first token may have nothing before it
found = text_perplexity(llm, story)
print(f"{nats / counted:.3f} nats a token, perplexity {math.exp(nats / counted):.1f}")
print(f"{found.bits_per_byte:.3f} bits a byte")
confirm("the package's perplexity", [found.nats, found.tokens], [nats, counted], within=0.01)
other = text_perplexity(llm, book.validation[:2000])
print(f"on {book.name}: {other.bits_per_byte:.2f} bits a byte. A number without its text says nothing")
confirm("a strange text surprises more", other.bits_per_byte > found.bits_per_byte, True)

# %% [markdown]
# ## What the mean hides
#
# A mean of −ln p is mostly about a few tokens: names, and first words of sentences.

# %% tags=["picture"]
pieces = [llm.tokenizer.decode([i]) for i in score.ids]
cost = {
    f"{n}: {piece}": -float(p) for n, (piece, p) in enumerate(zip(pieces, score.log_probabilities)) if not math.isnan(p)
}
worst = dict(sorted(cost.items(), key=lambda item: -item[1])[:12])
bars(worst, f"12 of {counted} tokens cost {sum(worst.values()) / nats:.0%} of all nats", x="nats", form="{:.1f}")

# %% [markdown]
# ## Preference: minimal pairs
#
# Two sentences that differ in one thing, one of them wrong (BLiMP: Warstadt et al., 2020). Which one is likelier? No
# scale, no unit, and chance is 50 %. With n pairs the standard error is $\sqrt{p(1-p)/n}$: with twelve it is large,
# which is the second half of every result.

# %%
pairs = """The cat is happy. / The cat are happy.
The dogs run fast. / The dogs runs fast.
She saw herself in the pond. / She saw himself in the pond.
Tom and Lily were friends. / Tom and Lily was friends.
He did not want to go. / He did not wanted to go.
There was a big tree. / There were a big tree.
The boys played with their toys. / The boys played with his toys each.
She has eaten the cake. / She has eat the cake.
Where did he go? / Where did he went?
He gave her the ball. / He gave she the ball.
They like to play. / They likes to play.
The old man sat down. / The man old sat down."""
wins = []
for line in pairs.splitlines():
    right, wrong = (llm.score(sentence).total for sentence in line.split(" / "))
    wins.append(right > wrong)
    print("✓" if wins[-1] else "✗", f"{right - wrong:6.2f} nats  {line}")
share = sum(wins) / len(wins)
margin = math.sqrt(share * (1 - share) / len(wins))
print(f"{share:.0%} ± {margin:.0%}; `llmfast eval blimp` does this with 67,000 pairs")
confirm("better than a coin", share > 0.5, True)

# %% [markdown]
# ## What more would bring
#
# Losses fall along a power law (Kaplan et al., 2020; Hoffmann et al., 2022): $L(D) = E + B / D^{\beta}$, for D
# characters read. Here is a ladder that is climbed in seconds: lesson 1's table (n = 4) on ever more of the book. Fit
# the law to the lower rungs, and foretell the highest.


# %%
def loss(train, text, n=4):
    tables = [defaultdict(Counter) for _ in range(n)]
    for k, table in enumerate(tables):
        for i in range(k, len(train)):
            table[train[i - k : i]][train[i]] += 1
    alphabet, total = len(set(book.text)), 0.0
    for i in range(n - 1, len(text)):
        p = 1 / alphabet
        for k, table in enumerate(tables):
            if seen := table.get(text[i - k : i]):
                N, kinds = seen.total(), len(seen)
                p = (seen[text[i]] + kinds * p) / (N + kinds)  # Witten–Bell, from the shortest context up
        total -= math.log(p)
    return total / (len(text) - n + 1)


places = list(range(0, len(book.train), 200))
random.Random(0).shuffle(places)  # or the lower rungs would read one play, and the higher ones others
mixed = "".join(book.train[place : place + 200] for place in places)
sizes = [int(effort(quick=4e3, full=2e4) * 2**k) for k in range(6)]
rungs = [loss(mixed[:size], book.validation[: effort(quick=5000, full=60000)]) for size in sizes]
D, L = torch.tensor(sizes[:-1], dtype=torch.float64), torch.tensor(rungs[:-1], dtype=torch.float64)


def line(E):  # with E known, ln(L − E) is a straight line in ln D
    X = torch.stack([torch.ones_like(D), D.log()], dim=1)  # (rungs, 2)
    y = (L - E).log()
    solution = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    return float((X @ solution - y).square().sum()), E, float(solution[0].exp()), -float(solution[1])


_, E, B, beta = min(line(E) for E in torch.linspace(0.0, float(L.min()) - 0.02, 200).tolist())
foretold = E + B / sizes[-1] ** beta
print(
    f"L(D) = {E:.2f} + {B:.1f} / D^{beta:.2f}: {foretold:.3f} is foretold for {sizes[-1]:,}, and {rungs[-1]:.3f} came"
)
confirm("the law foretells the next rung", foretold, rungs[-1], within=effort(quick=0.3, full=0.1))

# %% tags=["picture"]
further = sizes + [sizes[-1] * 4**k for k in (1, 2, 3)]
law = [E + B / size**beta for size in further]
curves(
    {"reached": (sizes, rungs), "the law": (further, law)},
    x="characters read", y="nats a character", title="Fitted to all rungs but the last", log="x",
)  # fmt: skip

# %% [markdown]
# It promised a little more than came: on tiny Shakespeare 1.63 nats, and 1.70 came. A table that looks back three
# characters can't use ever more text, and the lower rungs do not know that yet. A law foretells what bounds the rungs
# that it was fitted to.
#
# The package fits the law with parameters **and** data (`llmfast eval scaling`), with intervals from a bootstrap: five
# constants from a dozen runs are less sure than they look.
#
# ## Exercises
#
# **10.1** Write `bits(nats, size)`: bits a byte, of a whole text's nats and its size in bytes.
#
# **10.2** Write `standard_error(wins)`: of a list of True and False, of their share.
#
# **10.3** Write `needed(E, B, beta, target)`: how much text the law E + B / D^β asks for to reach a loss of `target`;
# infinity where it never does.


# %%
def bits(nats, size): ...


def standard_error(wins): ...


def needed(E, B, beta, target): ...


check("10.1", bits)
check("10.2", standard_error)
check("10.3", needed)

# %% [markdown]
# Solutions are in `lessons/solutions/10_how_good.py`.
#
# **Read next**: `llmfast/evaluation/perplexity.py`, `llmfast/evaluation/minimal_pairs.py`,
# `llmfast/evaluation/scaling.py`; `docs/evaluation.md` and `docs/scaling.md`.
