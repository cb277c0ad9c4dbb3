# %% [markdown]
# # 12. Fine-tuning
#
# **A model that exists learns something new: a class, a style, an answer; with all its weights, or with a hundredth.**
#
# Training from nothing takes a corpus. But a model that has read stories already knows what words mean, and a few dozen
# examples move it. Which weights may move, and which tokens are learned from: that is all of fine-tuning.

# %%
import random

import torch
from torch import nn

import llmfast
from llmfast.finetuning.lora import LowRank
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.pictures import bars, curves
from llmfast.models.layers import Linear

torch.manual_seed(0)
torch.set_num_threads(1)  # tiny tensors gain nothing from more

# %% [markdown]
# ## A task
#
# Sentences about what went well or badly. The words that decide are others in the test than in training: a model that
# only counts words (lesson 1) must guess.

# %% tags=["given"]
draw = random.Random(0)
good = ["happy", "glad", "smiled", "laughed", "proud", "kind", "warm", "fun", "gentle", "hugged", "pretty", "safe"]
bad = ["sad", "angry", "cried", "yelled", "scared", "mean", "cold", "hurt", "rude", "broke", "ugly", "lost"]
frames = ["{n} was very {w}.", "They were all {w} that day.", "It made {n} feel {w}.", "{n} said it was {w}."]
names = ["Tom", "Lily", "Sam", "Mia", "Ben", "Sue"]


def examples(count, words):  # words: which of the twelve
    rows = []
    for _ in range(count):
        label = draw.randrange(2)
        word = draw.choice([(bad, good)[label][i] for i in words])
        rows.append((draw.choice(frames).format(n=draw.choice(names), w=word), label))
    return rows


train, test = examples(effort(quick=32, full=96), range(8)), examples(200, range(8, 12))
seen = {word for text, _ in train for word in text.strip(".").split()}
new = sum(not seen.issuperset(text.strip(".").split()) for text, _ in test)
print(train[:2], f"\n{new} of {len(test)} tests have a word that is new")

# %% [markdown]
# ## LoRA by hand
#
# Low-rank adaptation (Hu et al., 2021): the weight stays, and a product of two thin matrices is added, $x W^T + s\,(x
# A^T) B^T$ with A (r, in) and B (out, r). B begins at zero: at first nothing has changed. For r = 4 and a square of 256
# these are 2,048 numbers instead of 65,536.


# %%
class LoRA(nn.Module):
    def __init__(self, linear, rank, scale=2.0):
        super().__init__()
        out, within = linear.weight.shape
        self.linear, self.scale = linear, scale
        self.a = nn.Parameter(torch.empty(rank, within).uniform_(-(within**-0.5), within**-0.5))
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x, activation=None):
        y = self.linear(x) + self.scale * (x @ self.a.T) @ self.b.T  # (..., in) -> (..., r) -> (..., out)
        return y if activation is None else nn.functional.gelu(y, approximate="tanh")


layer, x = Linear(6, 5), torch.randn(3, 6)
mine, theirs = LoRA(layer, 2), LowRank(6, 5, rank=2, scale=2.0)
confirm("at first nothing is added", mine(x), layer(x), within=0.0)
nn.init.normal_(mine.b)
theirs.load_state_dict({"a": mine.a.detach(), "b": mine.b.detach()})
confirm("the package's adapter is this one", theirs(x, layer), mine(x), within=1e-5)

# %% [markdown]
# ## A classifier, three ways
#
# The last token's hidden state has seen the whole sentence: a new head (C, 2) reads the class off it. Train the
# **head** alone on a frozen model; or a **LoRA** with it; or **all** weights.


# %%
def classifier(way):
    torch.manual_seed(1)
    model = llmfast.load("stories", precision="fp32").model
    model.requires_grad_(way == "all")
    if way == "LoRA":
        for block in model.transformer.h:
            block.attn.c_attn, block.mlp.c_fc = LoRA(block.attn.c_attn, 4), LoRA(block.mlp.c_fc, 4)
    return model, nn.Linear(model.config.n_embd, 2)


encode = llmfast.load("stories").tokenizer.encode


def logits_of(model, head, texts):
    rows = [encode(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # (B, T), padded after the end
    last = torch.tensor([len(row) - 1 for row in rows])  # (B,)
    return head(model.hidden(ids)[torch.arange(len(rows)), last])  # (B, T, C) -> (B, C) -> (B, 2)


def fit(way, epochs=effort(quick=2, full=8)):
    model, head = classifier(way)
    moving = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    tools = torch.optim.AdamW(moving, lr={"head": 1e-2, "LoRA": 3e-3, "all": 3e-4}[way])
    for _ in range(epochs):
        for i in range(0, len(train), 16):
            texts, labels = zip(*train[i : i + 16])
            loss = nn.functional.cross_entropy(logits_of(model, head, texts), torch.tensor(labels))
            tools.zero_grad()
            loss.backward()
            tools.step()
    with torch.no_grad():
        said = logits_of(model, head, [text for text, _ in test]).argmax(-1)
    return float((said == torch.tensor([label for _, label in test])).float().mean()), sum(p.numel() for p in moving)


found = {way: fit(way) for way in ("head", "LoRA", "all")}
for way, (share, numbers) in found.items():
    print(f"{way:5} moves {numbers:9,} numbers: {share:.1%} of {len(test)} right")
if effort(quick=False, full=True):
    confirm("words that were never in training are understood", max(share for share, _ in found.values()) > 0.65, True)

# %% tags=["picture"]
bars({way: share * 100 for way, (share, _) in found.items()} | {"a coin": 50.0}, "Right, in per cent", form="{:.0f}")

# %% [markdown]
# Against a baseline, always: on the well-known SMS spam task counting words and characters reaches 97.8 %, and a
# transformer under 98 % has shown nothing.
#
# ## What low rank can't learn
#
# A sum of r products of a column and a row has at most rank r. What a task changes in a weight is often of low rank,
# and then little is lost. A change that turns every direction has full rank, and no small r will do.

# %% tags=["given"]
low = torch.randn(64, 3) @ torch.randn(3, 64)  # of rank 3
full = torch.linalg.qr(torch.randn(64, 64))[0] * low.norm() / 8  # a rotation
ranks = [1, 2, 3, 4, 8, 16, 32, 64]
left = {}
for name, change in (("a change of rank 3", low), ("a rotation", full)):
    singular = torch.linalg.svdvals(change)  # (64,)
    left[name] = [float(singular[r:].square().sum() / singular.square().sum()) ** 0.5 for r in ranks]
confirm("rank 3 is enough for the first", left["a change of rank 3"][2], 0.0, within=1e-3)
confirm("half the ranks leave much of a rotation", left["a rotation"][6], 0.5**0.5, within=1e-3)

# %% tags=["picture"]
curves(
    {n: (ranks, e) for n, e in left.items()},
    x="rank",
    y="what is left of the change",
    log="x",
    marks=True,
    title="The best that a rank can do",
)

# %% [markdown]
# ## Instructions, and loss masks
#
# To teach answers, write question and answer as one text, and count the loss of the **answer's** tokens only: the model
# is not to learn to ask. Targets of −100 are not counted, here as everywhere.

# %%
model = llmfast.load("stories", precision="fp32").model
question, answer = encode("Q: What did Tom see?\nA:"), encode(" Tom saw a big dog.\n")
ids = torch.tensor([question + answer])  # (1, T)
targets = ids[:, 1:].clone()
targets[:, : len(question) - 1] = -100  # position i is asked for token i + 1
with torch.no_grad():
    masked = model.loss(ids[:, :-1], targets)
    each = nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")  # (T - 1,)
confirm("the loss is that of the answer", masked, each[len(question) - 1 :].mean(), within=1e-4)
confirm("as many as the answer has", int((targets != -100).sum()), len(answer), within=0)

# %% [markdown]
# `llmfast finetune smollm2 chats.jsonl --out mine` does this with templates, packing, resuming and reports.
#
# ## Exercises
#
# **12.1** Write `lora_parameters(out, within, rank)`: how many numbers an adapter of a layer has.
#
# **12.2** Write `merged(W, A, B, scale)`: the one weight (out, in) that does what layer and adapter do.
#
# **12.3** Write `answer_targets(question, answer)`: of two lists of ids the list of targets for
# `(question + answer)[:-1]`, −100 where nothing of the answer is asked for.


# %%
def lora_parameters(out, within, rank): ...


def merged(W, A, B, scale): ...


def answer_targets(question, answer): ...


check("12.1", lora_parameters)
check("12.2", merged)
check("12.3", answer_targets)

# %% [markdown]
# Solutions are in `lessons/solutions/12_fine_tuning.py`.
#
# **Read next**: `llmfast/finetuning/lora.py`, `llmfast/finetuning/conversations.py` (which tokens are learned from),
# `llmfast/finetuning/head.py`, `llmfast/finetuning/classifier.py`; `docs/fine-tuning.md`.
