# %% [markdown]
# # 11. Encoder or decoder
#
# **The same block with and without a mask: one fills gaps and knows both sides, the other goes on and can write.**
#
# BERT (Devlin et al., 2019) and GPT are made of the same parts. The one difference is the mask of lesson 5, and with it
# what can be asked. Here both are trained on the same text, and given the same task.

# %%
import torch
from torch import nn

import llmfast
from llmfast import ops
from llmfast.lessons import check, confirm, corpus, effort
from llmfast.lessons.pictures import bars, curves, heats
from llmfast.tokenizers import CharTokenizer
from llmfast.weights.fetching import is_there

torch.set_num_threads(1)  # tiny tensors gain nothing from more

# %% [markdown]
# ## Three drawings
#
# Who may look at whom: rows look at columns. In an **encoder** all at all. In a **decoder** at what came before. In an
# **encoder–decoder** (T5, translation) the text that is written looks back at itself, and at all of the text that was
# given.

# %% tags=["picture"]
given, written = 4, 5
mixed = torch.ones(given + written, given + written).tril()
mixed[:given] = torch.tensor([1.0] * given + [0.0] * written)
mixed[given:, :given] = 1
drawings = {
    "encoder: BERT": torch.ones(9, 9),
    "decoder: GPT": torch.ones(9, 9).tril(),
    "encoder, then decoder: T5": mixed,
}
heats(drawings, numbers=False, width=2.6, height=2.5)

# %% [markdown]
# ## One model, one switch


# %% tags=["given"]
def parts(C):
    layers = {
        "qkv": nn.Linear(C, 3 * C),
        "out": nn.Linear(C, C),
        "up": nn.Linear(C, 4 * C),
        "down": nn.Linear(4 * C, C),
    }
    return layers | {"norm_1": nn.LayerNorm(C), "norm_2": nn.LayerNorm(C)}


# %%
class Model(nn.Module):
    def __init__(self, V, C, T, both_sides):
        super().__init__()
        self.tokens, self.positions, self.both_sides = nn.Embedding(V + 1, C), nn.Embedding(T, C), both_sides
        self.blocks = nn.ModuleList(nn.ModuleDict(parts(C)) for _ in range(2))
        self.head = nn.Linear(C, V)

    def forward(self, ids):
        attention = ops.bidirectional_attention if self.both_sides else ops.causal_attention
        B, T = ids.shape
        x = self.tokens(ids) + self.positions.weight[:T]  # (B, T, C)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm_1"](x)).view(B, T, 3, 4, -1).permute(2, 0, 3, 1, 4)  # each (B, 4, T, D)
            x = x + block["out"](attention(q, k, v).transpose(1, 2).reshape(B, T, -1))
            x = x + block["down"](ops.gelu(block["up"](block["norm_2"](x))))
        return self.head(x)  # (B, T, V)


book = corpus()
tokenizer = CharTokenizer.train([book.text])
V, T, GAP = tokenizer.vocab_size, 48, tokenizer.vocab_size  # GAP: a token of its own, which stands for what is hidden
train, held = (torch.tensor(tokenizer.encode(text)) for text in (book.train, book.validation))


def batch(ids, size, generator):
    return ids[torch.randint(len(ids) - T - 1, (size, 1), generator=generator) + torch.arange(T + 1)]  # (B, T + 1)


def loss_of(model, rows, generator):
    """Both see windows of T. The encoder is asked for the hidden ones, the decoder for each next one."""
    if not model.both_sides:
        return nn.functional.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:])
    rows = rows[:, :-1]
    hidden = torch.rand(rows.shape, generator=generator) < 0.15  # 15 %, as BERT has it
    logits = model(rows.masked_fill(hidden, GAP))
    return nn.functional.cross_entropy(logits[hidden], rows[hidden])


# %% tags=["given"]
models, losses = {}, {}
for name, both in (("encoder", True), ("decoder", False)):
    torch.manual_seed(0)
    models[name], losses[name] = Model(V, 64, T, both), []
    tools, generator = torch.optim.AdamW(models[name].parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    for _ in range(effort(quick=20, full=400)):
        loss = loss_of(models[name], batch(train, 32, generator), generator)
        tools.zero_grad()
        loss.backward()
        tools.step()
        losses[name].append(loss.item())

# %% [markdown]
# ## Who sees what
#
# Change one character, and look at which results move. That is the whole difference.

# %%
ids = held[None, :T].clone()  # (1, T)
changed = ids.clone()
changed[0, 20] = (changed[0, 20] + 1) % V
with torch.no_grad():
    moved = {name: (model(ids) - model(changed)).abs().amax(-1)[0] > 1e-6 for name, model in models.items()}  # (T,)
confirm("decoder: only what comes from there on", moved["decoder"], torch.arange(T) >= 20)
confirm("encoder: everything", moved["encoder"].all(), True)

# %% [markdown]
# ## Filling gaps
#
# Hide one character in the middle of a line. The encoder reads both sides; the decoder knows only what came before.

# %%
generator = torch.Generator().manual_seed(2)
rows = batch(held, effort(quick=100, full=1000), generator)[:, :T]  # (N, T)
middle, truth = T // 2, rows[:, T // 2].clone()
with torch.no_grad():
    gaps = rows.clone()
    gaps[:, middle] = GAP
    by_encoder = nn.functional.cross_entropy(models["encoder"](gaps)[:, middle], truth)
    by_decoder = nn.functional.cross_entropy(models["decoder"](rows)[:, middle - 1], truth)
print(f"the hidden character: {by_encoder:.2f} nats with both sides, {by_decoder:.2f} with the left one")
if effort(quick=False, full=True):
    confirm("both sides know more", float(by_encoder) < float(by_decoder), True)

# %% tags=["picture"]
smooth = {name: torch.tensor(line).unfold(0, min(20, len(line)), 10).mean(-1) for name, line in losses.items()}
curves(smooth, x="tens of steps", y="nats", title="Filling 15 % of gaps, and going on: other tasks, other losses")

# %% [markdown]
# An encoder learns from 15 % of its tokens a step, a decoder from all: one reason why decoders won where there is much
# text. The other is that a decoder can write, and be asked anything in words.
#
# ## A sentence as one vector
#
# For search one vector a text is wanted. Of an encoder: the mean over its tokens, trained for it (MiniLM, lesson 13).
# Of a decoder: the mean works too, or the last token, the only one that has seen everything.

# %%
sentences = "The cat slept in the sun. / A dog ran in the park. / She ate a red apple. / He cooked soup for dinner."
sentences = [*sentences.split(" / "), "The kitten took a nap."]
stories = llmfast.load("stories", precision="fp32")


def by_stories(text):
    with torch.no_grad():
        return stories.model.hidden(torch.tensor([stories.tokenizer.encode(text)]))[0].mean(dim=0)  # (T, C) -> (C,)


tables = {"decoder: stories": torch.stack([by_stories(s) for s in sentences])}  # (5, 256)
if is_there("minilm"):
    tables["encoder: MiniLM"] = llmfast.Embedder("minilm").embed(sentences)  # (5, 384)
alike = {}
for name, table in tables.items():
    unit = nn.functional.normalize(table, dim=-1)
    alike[name] = unit @ unit.T  # (5, 5), cosines
    print(f"{name}: nearest to {sentences[4]!r} is {sentences[int(alike[name][4, :4].argmax())]!r}")
if "encoder: MiniLM" in alike:
    confirm("the encoder knows that a kitten naps as a cat sleeps", alike["encoder: MiniLM"][4, :4].argmax(), 0)
confirm("each is most like itself", alike["decoder: stories"].argmax(-1), torch.arange(5))

# %% tags=["picture"]
heats(alike, [s.split()[1] for s in sentences], [s.split()[1] for s in sentences], width=3.2)
bars(
    {"both sides": float(by_encoder), "left side only": float(by_decoder)}, "A hidden character, in nats", form="{:.2f}"
)

# %% [markdown]
# The decoder's cosines are all near 1: its vectors share a large common part, and must be compared with care. That is
# what training for similarity removes.
#
# ## Exercises
#
# **11.1** Write `prefix_mask(given, written)`: the (T, T) mask of T5's drawing as one square, True where a row **may**
# look: the given tokens see all given ones, the written see the given and what was written before, themselves included.
#
# **11.2** Write `masked_loss(logits, ids, hidden)`: logits (B, T, V), ids (B, T), hidden (B, T) bool: the mean
# −log softmax of the hidden tokens only.
#
# **11.3** Write `mean_pooled(x, mask)`: x (B, T, C), mask (B, T) with 1 for real tokens: the mean of the real ones
# (B, C).


# %%
def prefix_mask(given, written): ...


def masked_loss(logits, ids, hidden): ...


def mean_pooled(x, mask): ...


check("11.1", prefix_mask)
check("11.2", masked_loss)
check("11.3", mean_pooled)

# %% [markdown]
# Solutions are in `lessons/solutions/11_encoder_or_decoder.py`.
#
# **Read next**: `llmfast/models/bert.py` beside `llmfast/models/gpt2.py`; `llmfast/inference/pooling.py`.
