# %% [markdown]
# # 1. Counting
#
# **A language model is a table of counts: what came next, after what. How far does that go?**
#
# A language model gives every next character a probability. The simplest one looks into a book and counts. It is made
# in seconds, it has no weights, and it is better than many small neural networks. Every later lesson has to beat it.

# %%
import math
import random
from collections import Counter, defaultdict

import torch

import llmfast
from llmfast import ops
from llmfast.lessons import check, confirm, corpus
from llmfast.lessons.pictures import bars, curves

book = corpus()
train, validation = book.train, book.validation  # the first 90 % of the characters, and the last 10 %
alphabet = sorted(set(book.text))
print(f"{book.name}: {len(train):,} characters to count, {len(validation):,} to be judged on, of {len(alphabet)} kinds")

# %% [markdown]
# ## What follows what
#
# After the `n - 1` characters before it, how often did each character come? That is an **n-gram** table. For `n = 1`
# nothing is before it, and the table is the frequency of the letters.


# %%
def count(text: str, n: int) -> dict[str, Counter]:
    """For each run of n - 1 characters: how often each character came after it."""
    table: dict[str, Counter] = defaultdict(Counter)
    for i in range(n - 1, len(text)):
        table[text[i - n + 1 : i]][text[i]] += 1
    return table


tables = [count(train, n) for n in range(1, 7)]  # tables[k] looks back at k characters
for context in ("q", "th", "the "):
    print(repr(context), tables[len(context)][context].most_common(6))

# %% tags=["picture"]
shares = {repr(c): k / len(train) for c, k in tables[0][""].most_common(16)}
bars(shares, "The 16 most frequent characters", form="{:.1%}")

# %% [markdown]
# ## Text from a table
#
# Draw a character from the counts after the last ones, append it, and go on. That loop is the same in every language
# model. Only the table will change.


# %%
def write(n: int, length: int = 160, seed: int = 0) -> str:
    draw = random.Random(seed)
    text = train[: n - 1]
    for _ in range(length):
        counts = tables[n - 1].get(text[len(text) - n + 1 :]) or tables[0][""]
        text += draw.choices(list(counts), list(counts.values()))[0]
    return text


for n in (1, 2, 4, 6):
    print(f"--- n = {n}\n{write(n)}")

# %% [markdown]
# With `n = 6` it looks like a play. It is also nearly a quotation: after five characters the book often shows only one
# way to go on.
#
# ## Why counting ends
#
# How many of the contexts in the last tenth of the book were ever seen in the first nine tenths? And how many contexts
# of the table were seen a single time?

# %%
seen, single = [], []
for n in range(1, 7):
    table = tables[n - 1]
    places = range(n - 1, len(validation))
    seen.append(sum(validation[i] in table.get(validation[i - n + 1 : i], ()) for i in places) / len(places))
    single.append(sum(c.total() == 1 for c in table.values()) / len(table))

# %% tags=["picture"]
curves(
    {"next character known": (range(1, 7), seen), "contexts seen once": (range(1, 7), single)},
    x="n", y="share", title="Longer contexts know more, and are known less", marks=True,
)  # fmt: skip

# %% [markdown]
# With `n = 6` one character in five comes as a surprise: the table calls it impossible. A probability of zero makes
# the whole text impossible. So some probability has to be set aside for what was never seen: **smoothing**.
#
# Witten and Bell (1991) estimate how much from the table itself. After context $h$ there were $N$ characters, $T$ of
# them different. Then something new came $T$ times out of $N$, and the next character is new with probability
# $T / (N + T)$. What is new is asked of the shorter context $h'$:
#
# $$p(c \mid h) = \frac{\mathrm{count}(h, c) + T(h)\; p(c \mid h')}{N(h) + T(h)}$$
#
# At the very bottom every character is equally likely.

# %%
sums = [{context: (c.total(), len(c)) for context, c in table.items()} for table in tables]


def probability(c: str, context: str) -> float:
    shorter = probability(c, context[1:]) if context else 1 / len(alphabet)
    if context not in sums[len(context)]:
        return shorter
    N, T = sums[len(context)][context]
    return (tables[len(context)][context][c] + T * shorter) / (N + T)


confirm("the probabilities of all characters sum to 1", sum(probability(c, "the ") for c in alphabet), 1.0)

# %% [markdown]
# ## One number for a model
#
# Let the model read text that it has not counted. At each character it gave what came a probability. The mean of
# $-\ln p$ is the **cross-entropy**, in nats a character. $e$ to that power is the **perplexity**: among how many
# equally likely characters the model hesitates. Divide nats by $\ln 2$ to get bits.


# %%
def nats(n: int, text: str = validation) -> float:
    places = range(n - 1, len(text))
    return -sum(math.log(probability(text[i], text[i - n + 1 : i])) for i in places) / len(places)


losses = [nats(n) for n in range(1, 7)]
for n, loss in enumerate(losses, 1):
    print(f"n = {n}: {loss:.3f} nats a character, perplexity {math.exp(loss):5.2f}, {loss / math.log(2):.3f} bits")
if book.is_shakespeare:
    confirm("the losses", losses, [3.347, 2.486, 2.049, 1.774, 1.669, 1.698], within=0.0006)

# %% [markdown]
# The package's own loss, `llmfast.ops.linear_cross_entropy`, is this mean too. It takes logits: numbers of which the
# softmax are the probabilities. Logarithms of probabilities are logits. On the first 200 characters:

# %%
text = validation[:200]
logits = torch.tensor([[probability(c, text[i - 4 : i]) for c in alphabet] for i in range(4, 200)]).log()  # (196, 65)
targets = torch.tensor([alphabet.index(c) for c in text[4:]])  # (196,)
loss = ops.linear_cross_entropy(logits, torch.eye(len(alphabet)), targets)
confirm("the package's loss is our mean", loss, nats(5, text))

# %% [markdown]
# The best table looks back four characters, `n = 5`. With six it gets worse: most of its contexts were seen once, and
# what was seen once is a bad guide. More text moves that point, slowly.
#
# On tiny Shakespeare 1.669 nats is a bar that stands above small transformers: nanoGPT's well-known run on a CPU (4
# layers, 128 wide, 2000 steps) ends at 1.88 (its README). `llmfast train --preset shakespeare-char-cpu` is judged on
# the same last tenth: 1.77 after as many steps, and a smaller model under the bar, 1.57, after a minute (README).
# Lesson 8 says how.

# %% tags=["picture"]
curves(
    {"Witten–Bell": (range(1, 7), losses)}, x="n", y="nats a character", marks=True,
    level={"all characters alike": math.log(len(alphabet)), "nanoGPT on a CPU, 2000 steps": 1.88},
    title="A table of counts, judged on text it has not seen",
)  # fmt: skip

# %% [markdown]
# The package says the same of any model, character by character: `llmfast.load(...).score(text)`. Here is the embedded
# model, which has read stories and no Shakespeare, on one sentence, against the table:

# %%
sentence = "Once upon a time there was a little cat."
total = llmfast.load("stories").score(sentence).total  # the log-probability of all its tokens
table_total = sum(math.log(probability(c, sentence[max(0, i - 4) : i])) for i, c in enumerate(sentence))
print(f"nats a character: {-total / len(sentence):.2f} by the model, {-table_total / len(sentence):.2f} by counting")

# %% [markdown]
# ## Exercises
#
# **1.1** The oldest smoothing (Laplace, 1814) adds 1 to the count of every character. Write `laplace(counts, c, size)`:
# the probability of `c`, where `counts` is a `Counter` and there are `size` different characters in all.
#
# **1.2** Write `perplexity(probabilities)` of a text, from the probability that each of its characters got.
#
# **1.3** Which share of a table is empty? Write `sparsity(table, size)`: of all the pairs (context in the table,
# character), the share that was never counted.


# %%
def laplace(counts, c, size): ...


def perplexity(probabilities): ...


def sparsity(table, size): ...


check("1.1", laplace)
check("1.2", perplexity)
check("1.3", sparsity)

# %% [markdown]
# Solutions are in `lessons/solutions/01_counting.py`.
#
# **Read next** in the package: `llmfast/evaluation/perplexity.py`, which scores whole texts in windows, in nats a token
# and bits a byte; `llmfast/inference/scoring.py`, where a sentence's probability comes from. Words instead of
# characters are lesson 2's subject.
