# %% [markdown]
# # 13. Retrieval
#
# **A model knows what it has read. For all else: find the passage, put it before the question, and let it read.**
#
# No training, and the answer has a source. The model stays as it is; what is to be built is a search (Lewis et al.,
# 2020), by words or by meaning; the two go wrong at different questions, and can be joined.

# %%
import math
import tempfile
from collections import Counter

import regex
import torch

import llmfast
from llmfast.lessons import check, confirm
from llmfast.lessons.pictures import bars, heats
from llmfast.weights.fetching import is_there

# %% [markdown]
# ## Pieces
#
# A search returns pieces, not books: small enough to be about one thing. Cut at blank lines, then at sentences, with a
# little overlap so that nothing is cut in two. Here is a manual that no model has read.

# %%
manual = """To switch the Borealis kettle on, press the copper button for two seconds. The ring turns blue.

If the ring blinks red, the water is too low. Fill it at least to the line with the fox on it.

The kettle remembers the last temperature. To make it forget, hold both buttons until it sings.

Descale it every forty days: two spoons of citric acid, one litre of water, the programme named Frost.

The lid opens only below 60 degrees. This protects your hands from steam, and can't be changed.

Error 7 means that the base is wet. Dry it with a cloth, wait ten minutes, and try again.

The warranty lasts five years, if the kettle is registered under the number below its foot.

The travel adapter fits sockets of 110 volts, where boiling takes twice as long."""
pieces = manual.split("\n\n")
questions = {
    "The light is flashing in an angry colour. Is there enough in it?": 1,
    "How do I reset it?": 2,
    "What does error 7 mean?": 5,
    "How often must limescale be removed?": 3,
    "Why can't I open the top?": 4,
    "How long is the guarantee?": 6,
}  # question: the piece that answers it

# %% [markdown]
# ## Words: BM25
#
# A piece is good if it has the question's words: rare ones count more (idf), a word that comes again counts less each
# time, and long pieces have no advantage (Robertson et al., 1994):
#
# $$\sum_w \ln(1 + \frac{N - n_w + 0.5}{n_w + 0.5}) \frac{f_w (k + 1)}{f_w + k (1 - b + b\,\ell / \bar\ell)}$$


# %%
def words(text):
    return regex.findall(r"\w+", text.lower())


counts = [Counter(words(piece)) for piece in pieces]
lengths = [c.total() for c in counts]
mean, having = sum(lengths) / len(lengths), Counter(w for c in counts for w in c)


def bm25(question, k=1.2, b=0.75):
    scores = []
    for c, length in zip(counts, lengths):
        score = 0.0
        for w in words(question):
            idf = math.log(1 + (len(pieces) - having[w] + 0.5) / (having[w] + 0.5))
            score += idf * c[w] * (k + 1) / (c[w] + k * (1 - b + b * length / mean))
        scores.append(score)
    return torch.tensor(scores)  # (N,)


# %% [markdown]
# ## Meaning: vectors
#
# An encoder (lesson 11) makes a vector of each piece and of the question; near is alike. A search over a few thousand
# is one product. `llmfast get minilm` brings the encoder (92 MB). Without it the lesson goes on with a poor stand-in:
# counts of three letters in a row, which finds "kettles" for "kettle" and no meaning at all.

# %% tags=["given"]
if is_there("minilm"):
    embed = llmfast.Embedder("minilm").embed
else:

    def embed(texts):
        rows = torch.zeros(len(texts), 512)
        for row, text in zip(rows, texts):
            for i in range(len(text) - 2):
                row[sum(ord(c) * 31**n for n, c in enumerate(text[i : i + 3].lower())) % 512] += 1
        return torch.nn.functional.normalize(rows, dim=-1)


table = embed(pieces)  # (N, C), rows of length 1
asked = embed(list(questions))  # (Q, C)
by_meaning = asked @ table.T  # (Q, N), cosines
by_words = torch.stack([bm25(question) for question in questions])  # (Q, N)
confirm("vectors have length 1", table.norm(dim=-1), torch.ones(len(pieces)), within=1e-4)

# %% [markdown]
# ## Both: reciprocal ranks
#
# Scores of different kinds can't be added, ranks can (Cormack et al., 2009): each search gives a piece
# $1 / (60 + \text{rank})$.


# %%
def ranks(scores):  # (Q, N): 1 for the best
    return scores.argsort(dim=-1, descending=True).argsort(dim=-1) + 1


fused = 1 / (60 + ranks(by_meaning)) + 1 / (60 + ranks(by_words))  # (Q, N)
truth = torch.tensor(list(questions.values()))
hits = {}
for name, scores in (("words", by_words), ("meaning", by_meaning), ("both", fused)):
    place = ranks(scores)[torch.arange(len(truth)), truth]  # (Q,): where the right piece came
    hits[name] = float((1 / place).mean())
    first = (place == 1).float().mean()
    print(f"{name:8} the right piece came at {place.tolist()}; first in {first:.0%}, MRR {hits[name]:.2f}")
confirm("both together are not worse than the worse", hits["both"] >= min(hits["words"], hits["meaning"]) - 0.05, True)

# %% tags=["picture"]
short = [" ".join(p.split()[:3]) for p in pieces]
heats(
    {"words": by_words, "meaning": by_meaning}, [q[:22] for q in questions], short, numbers=False, width=4.6, height=3.8
)
bars(hits, "Mean of 1 / rank of the right piece", form="{:.2f}")

# %% [markdown]
# Both find "error 7". Only meaning knows that a guarantee is a warranty, and that limescale is what one descales: on
# eight pieces it is always right. On the package's test with many more, words alone are better than meaning alone, and
# both together better than either (`docs/retrieval.md`).
#
# ## A store
#
# The package keeps pieces and vectors in a file, and embeds only what changed. It adds the cosine and the share of the
# question's words that a piece has, where rare words weigh more. That does better than ranks on its tests, and worse
# on these eight pieces.

# %% tags=["given"]
if is_there("minilm"):
    from pathlib import Path

    from llmfast.retrieval.index import Index

    folder = Path(tempfile.mkdtemp())
    (folder / "kettle.md").write_text("\n\n".join(f"# Part {n}\n\n{piece}" for n, piece in enumerate(pieces)))
    index = Index(folder / "kettle.index")
    index.add(folder / "kettle.md")
    first = [index.search(question, 1)[0].text for question in questions]
    right = sum(pieces[n] in text for text, n in zip(first, questions.values()))
    print(f"the store finds {right} of {len(questions)} at the first place")
    confirm("it finds most of them first", right > len(questions) / 2, True)

# %% [markdown]
# ## With and without
#
# The same model, the same question, once with the best passage before it. (Ask "How do I reset the Borealis kettle?",
# and both searches find piece 0, where the name stands: a wrong passage gives a wrong answer, with a source.)

# %%
question = "How do I make the kettle forget the temperature?"
scores = 1 / (60 + ranks(embed([question]) @ table.T)) + 1 / (60 + ranks(bm25(question)[None]))
passage = pieces[int(scores.argmax())]
prompt = f"Answer from this text, in one sentence.\n\n{passage}\n\nQuestion: {question}"
print(prompt)
if is_there("smollm2"):
    chat = llmfast.load("smollm2")
    for name, asked_for in (("without", question), ("with", prompt)):
        print(f"\n--- {name}\n{chat.chat([{'role': 'user', 'content': asked_for}], max_new_tokens=60, temperature=0)}")
else:
    print("\nllmfast get smollm2 brings a model that answers")
confirm("the passage that is given holds the answer", "hold both buttons" in passage, True)

# %% [markdown]
# ## Exercises
#
# **13.1** Write `top(table, question, count)`: the numbers of the `count` rows of `table` (N, C) with the largest
# cosine to `question` (C,), best first; lengths differ.
#
# **13.2** Write `fuse(rankings, k=60)`: several lists of numbers of pieces, best first; the numbers of all that occur,
# by the sum of 1 / (k + rank), best first.
#
# **13.3** Write `reciprocal_rank(found, right)`: 1 / place of `right` in the list `found`, 0 where it is not there.


# %%
def top(table, question, count): ...


def fuse(rankings, k=60): ...


def reciprocal_rank(found, right): ...


check("13.1", top)
check("13.2", fuse)
check("13.3", reciprocal_rank)

# %% [markdown]
# Solutions are in `lessons/solutions/13_retrieval.py`.
#
# **Read next**: `llmfast/retrieval/pieces.py`, `llmfast/retrieval/index.py`, `llmfast/retrieval/answering.py`;
# `docs/retrieval.md`. On your own files: `llmfast index manuals/ -o manuals.index`, `llmfast ask "…" --index …`.
