# %% [markdown]
# # 2. Tokens
#
# **A model reads numbers. Which pieces of text get one: characters, words, or pieces that a text chooses itself?**
#
# Lesson 1 counted characters. Then "the" is three steps, and a context of 1,000 is half a page. With words it is one
# step, and every new word is a stranger. Today's models take pieces in between, learned from text.

# %%
from collections import Counter

import regex

import llmfast
from llmfast.lessons import check, confirm, corpus, effort
from llmfast.lessons.pictures import bars, curves
from llmfast.tokenizers import CharTokenizer, WordTokenizer, train_tokenizer
from llmfast.tokenizers.byte_letters import BYTES
from llmfast.tokenizers.splitting import GPT2_SPLIT_PATTERN

book = corpus()
text, unseen = book.train[: effort(quick=60_000, full=300_000)], book.validation[:20_000]

# %% [markdown]
# ## Words, and what they miss
#
# Take each word and each sign. How many kinds are there, and how many words of the last tenth were never seen?

# %%
words = Counter(regex.findall(r"\w+|[^\w\s]", text))
others = regex.findall(r"\w+|[^\w\s]", unseen)
print(f"{len(words):,} kinds of words, {sum(n == 1 for n in words.values()) / len(words):.0%} of them seen once")
print(f"{sum(word not in words for word in others) / len(others):.1%} of the words of the last tenth are unknown")
unknown = WordTokenizer.train([text], 100)
confirm(
    "the package has one token for all that it does not know",
    unknown.decode(unknown.encode("☃")),
    WordTokenizer.UNKNOWN,
)

# %% [markdown]
# ## Byte pairs
#
# Sennrich et al. (2016): begin with small pieces, find the most frequent pair of neighbours, give it a number of its
# own, and again. GPT-2 (Radford et al., 2019) begins with the 256 **bytes**, so that nothing is ever unknown, and first
# splits a text into chunks (a word with the blank before it, a number, signs), over which no piece reaches.


# %%
def join(word: tuple, pair: tuple, new: int) -> tuple:
    joined: list = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] = new
        else:
            joined.append(piece)
    return tuple(joined)


def learn(text: str, merges: int) -> list[bytes]:
    pieces = list(BYTES)  # number -> bytes; the first 256 in GPT-2's order
    chunks = Counter(regex.findall(GPT2_SPLIT_PATTERN, text))
    spelled = {tuple(BYTES.index(bytes([b])) for b in chunk.encode()): n for chunk, n in chunks.items()}
    for _ in range(merges):
        pairs: Counter = Counter()
        for word, n in spelled.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # the most frequent; of equals the smallest
        pieces.append(pieces[best[0]] + pieces[best[1]])
        spelled = {join(word, best, len(pieces) - 1): n for word, n in spelled.items()}
    return pieces


count = effort(quick=30, full=120)
pieces = learn(text, count)
print("the first joins, in order:", [piece.decode() for piece in pieces[256:286]])
theirs = train_tokenizer("bpe", [text], 256 + count + 1, trainer="python")
confirm("the package learns the same joins", [a + b for a, b in theirs.merges], pieces[256:])

# %% [markdown]
# The package does it a thousand times faster: a join touches only the words that contain the pair
# (`llmfast/tokenizers/bpe_training.py`). To **encode** is to make the same joins, in the order in which they were
# learned. One word, join by join:

# %%
word = tuple(BYTES.index(bytes([b])) for b in b" therefore")
print(" | ".join(pieces[i].decode() for i in word))
for new in range(256, len(pieces)):
    for pair in zip(word, word[1:]):
        if pieces[pair[0]] + pieces[pair[1]] == pieces[new]:
            word = join(word, pair, new)
            print(" | ".join(pieces[i].decode() for i in word))
confirm("as the package encodes it", list(word), theirs.encode(" therefore"))

# %% [markdown]
# ## WordPiece
#
# BERT's pieces (Schuster and Nakajima, 2012; Devlin et al., 2019) are joined by another rule. Not the most frequent
# pair, but the one that its parts would least expect: count(ab) / (count(a) · count(b)). And to encode is to take the
# longest piece that fits, from the left; a word's later pieces are written with ##.
#
# ## The same sentence in all of them

# %% tags=["given"]
size = effort(quick=600, full=4000)
tokenizers = {
    "characters": CharTokenizer.train([text]),
    "words": train_tokenizer("word", [text], size),
    "byte pairs": train_tokenizer("bpe", [text], size),
    "WordPiece": train_tokenizer("wordpiece", [text], size),
    "stories' own": llmfast.load("stories").tokenizer,
}
try:
    tokenizers["GPT-2's"] = llmfast.tokenizers.gpt2_tokenizer()
except FileNotFoundError as error:
    print(error)
samples = {
    "the book": "Therefore the king unlocked his wooden chest.",
    "a new word": "The snowboarder tweeted unbelievably.",
    "numbers": "In 1997 it cost 12,345.67 dollars.",
    "code": "for i in range(10):\n    x[i] += 1",
    "Finnish": "Hyvää huomenta, mitä kuuluu?",
    "Japanese": "日本語の文章です。",
}
for name, tokenizer in tokenizers.items():
    shown = " | ".join(tokenizer.decode([i]) for i in tokenizer.encode(samples["the book"]))
    print(f"{name:13} {tokenizer.vocab_size:6,} kinds  {shown}")

# %% [markdown]
# ## What it costs to be a stranger
#
# Tokens for each sentence, divided by its characters: the fewer, the longer a context reaches, and the less a text
# costs. Only bytes come back whole from everywhere.

# %% tags=["given"]
for name, tokenizer in tokenizers.items():
    row = [f"{kind}: {len(tokenizer.encode(s)) / len(s):.2f}" for kind, s in samples.items()]
    lost = [kind for kind, s in samples.items() if tokenizer.decode(tokenizer.encode(s)) != s]
    print(f"{name:13} {', '.join(row)}; lost: {', '.join(lost) or 'nothing'}")
for name in ("byte pairs", "stories' own"):
    for s in samples.values():
        confirm(f"{name} brings it back: {s[:14]!r}", tokenizers[name].decode(tokenizers[name].encode(s)), s)

# %% tags=["picture"]
each = {name: len(unseen) / len(t.encode(unseen)) for name, t in tokenizers.items()}
bars(each, "Characters a token, on the last tenth of the book (words: unknown ones count as one)", form="{:.2f}")
sizes = effort(quick=[257, 400, 800], full=[257, 500, 1000, 2000, 4000, 8000])
learned = [train_tokenizer("bpe", [text], n) for n in sizes]
curves(
    {"seen": (sizes, [len(text) / len(t.encode(text)) for t in learned]),
     "the last tenth": (sizes, [len(unseen) / len(t.encode(unseen)) for t in learned])},
    x="kinds of tokens", y="characters a token", log="x", marks=True, title="Each doubling of the vocabulary buys less",
)  # fmt: skip

# %% [markdown]
# A number is cut as its digits happened to stand in the training text, which is one reason why small models can't
# add; newer ones give every digit its own token. And a larger vocabulary is not free: each kind is a row of the
# embedding and of the head. In GPT-2 these are 31 % of all parameters (lesson 7).
#
# ## Exercises
#
# **2.1** Write `pairs(words)`: of a dict from tuples of pieces to counts, a `Counter` of neighbouring pairs.
#
# **2.2** Write `longest(word, vocabulary)`: WordPiece's encoding of a word, the longest piece first; later pieces begin
# with "##". `["[UNK]"]` where no piece fits.
#
# **2.3** Write `bits_a_byte(nats, tokens, text)`: from nats a token to bits for each byte of the text in UTF-8: the
# number that compares models with different tokenizers.


# %%
def pairs(words): ...


def longest(word, vocabulary): ...


def bits_a_byte(nats, tokens, text): ...


check("2.1", pairs)
check("2.2", longest)
check("2.3", bits_a_byte)

# %% [markdown]
# Solutions are in `lessons/solutions/02_tokens.py`.
#
# **Read next**: `llmfast/tokenizers/bpe_training.py` and `llmfast/tokenizers/wordpiece_training.py`, both rules with
# their bookkeeping; `docs/tokenizers.md`. On your own text: `llmfast tokenizer train book.txt`, and `inspect`.
