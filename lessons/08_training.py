# %% [markdown]
# # 8. Training
#
# **A loss is a landscape. Four ways to walk down, from their formulas, in one valley and in one model.**
#
# Training is one idea repeated: how does the loss change if this number grows a little? Go the other way. What differs
# is how far, and how much of the past is remembered.

# %%
import copy

import torch

import llmfast
from llmfast.lessons import check, confirm, corpus, effort
from llmfast.lessons.pictures import curves, panels
from llmfast.tokenizers import CharTokenizer
from llmfast.training.configuration import OptimizationSettings
from llmfast.training.schedules import learning_rate

torch.set_num_threads(1)  # tiny tensors gain nothing from more

# %% [markdown]
# ## Three formulas
#
# With the gradient g of a weight w, and a learning rate:
#
# * **SGD**: w ← w − lr · g
# * **momentum** (Polyak, 1964): m ← β m + g, w ← w − lr · m. A ball that rolls.
# * **AdamW** (Kingma and Ba, 2014; Loshchilov and Hutter, 2017): m and v are running means of g and g², corrected for
#   having begun at 0. w ← (1 − lr λ) w − lr · m / (√v + ε): every weight moves about lr, however large its gradient.


# %%
def sgd(w, g, state, lr, step):
    return w - lr * g


def momentum(w, g, state, lr, step, beta=0.9):
    state["m"] = beta * state.get("m", 0) + g
    return w - lr * state["m"]


def adamw(w, g, state, lr, step, betas=(0.9, 0.999), decay=0.0, eps=1e-8):
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g * g
    m, v = state["m"] / (1 - betas[0] ** step), state["v"] / (1 - betas[1] ** step)
    return (1 - lr * decay) * w - lr * m / (v**0.5 + eps)


torch.manual_seed(0)
mine, state = torch.randn(5), {}
theirs = torch.nn.Parameter(mine.clone())
optimizer = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
for step in range(1, 20):
    theirs.grad = torch.randn(5)
    mine = adamw(mine, theirs.grad, state, 0.1, step, decay=0.01)
    optimizer.step()
confirm("19 steps of PyTorch's AdamW", mine, theirs, within=1e-6)

# %% [markdown]
# ## One valley
#
# $f(x, y) = (x^2 + 30 y^2) / 2$: thirty times steeper across than along. SGD must take steps that are small enough for
# the steep side, and creeps along the other.

# %% tags=["given"]
paths = {}
for name, update, lr in (("SGD", sgd, 0.06), ("momentum", momentum, 0.02), ("AdamW", adamw, 0.5)):
    w, state, paths[name] = torch.tensor([-9.0, 1.5]), {}, []
    for step in range(1, 61):
        paths[name].append(w)
        w = update(w, w * torch.tensor([1.0, 30.0]), state, lr, step)  # the gradient of f is (x, 30 y)
confirm("all reach the ground", [float(path[-1].norm()) < 1.0 for path in paths.values()], [True] * 3)

# %% tags=["picture"]
figure, axes = panels(3, 3.4, 2.2)
x, y = torch.meshgrid(torch.linspace(-10, 4, 80), torch.linspace(-2.2, 2.2, 60), indexing="xy")
for ax, (name, path) in zip(axes, paths.items()):
    ax.contour(x, y, (x * x + 30 * y * y) ** 0.5, levels=12, cmap="Greys", linewidths=0.7)
    ax.plot(*torch.stack(path).T, "o-", markersize=2.5, linewidth=1)
    ax.set_title(name)

# %% [markdown]
# ## Muon
#
# For a **matrix**, Muon (Jordan et al., 2024) takes the momentum and makes all its singular values about 1: every
# direction is walked equally far, also those in which the gradient is small. Five products do it (Newton and Schulz),
# without a decomposition.


# %%
def orthogonal(m, rounds=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m / (m.norm() + 1e-7)  # (N, K); all singular values at most 1
    for _ in range(rounds):
        s = x @ x.T  # (N, N)
        x = a * x + (b * s + c * s @ s) @ x
    return x


m = torch.randn(32, 64) @ torch.diag(torch.logspace(0, -2, 64))  # (32, 64), singular values over two powers of ten
before, after = torch.linalg.svdvals(m), torch.linalg.svdvals(orthogonal(m))
print(f"singular values from {before.min():.3f} … {before.max():.1f} to {after.min():.2f} … {after.max():.2f}")
confirm("they are near 1", after, torch.ones(32), within=0.45)

# %% [markdown]
# ## One model
#
# The same walks on a small GPT over characters (lesson 7), on batches of the book, with PyTorch's optimizers and a Muon
# of four lines. It gets the matrices of the blocks, AdamW the rest, scaled so that both take one learning rate (Liu et
# al., 2025): so does the package (`llmfast/training/optimizers.py`).

# %%
book = corpus()
tokenizer = CharTokenizer.train([book.text])
train, held = (torch.tensor(tokenizer.encode(text)) for text in (book.train, book.validation[:20_000]))
steps, T = effort(quick=12, full=200), 64


def batch(ids, size, generator):
    at = torch.randint(len(ids) - T - 1, (size, 1), generator=generator) + torch.arange(T + 1)  # (B, T + 1)
    return ids[at[:, :-1]], ids[at[:, 1:]]  # (B, T) each: what is read, and what comes next


def new_model(width=64):
    torch.manual_seed(1)
    shape = dict(vocab_size=tokenizer.vocab_size, n_positions=T, n_embd=width, n_layer=2, n_head=4)
    return llmfast.GPT(llmfast.GPTConfig(**shape).without_dropout())


def run(model, optimizers, lrs, ids=train, size=16, steps=steps, seed=0):
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        for optimizer, lr in zip(optimizers, lrs):
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20)  # a warm-up of 20 steps
            optimizer.zero_grad()
        loss = model.loss(*batch(ids, size, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # one wild batch moves no further than others
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


class Muon(torch.optim.SGD):
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w]["m"] = 0.95 * self.state[w].get("m", 0) + w.grad
                w.data -= group["lr"] * 0.2 * max(w.shape) ** 0.5 * orthogonal(0.95 * m + w.grad)  # AdamW's scale


# %% tags=["given"]
def optimizers_of(kind, model):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for p in model.parameters() if not any(p is q for q in matrices)]
    if kind == "Muon":
        return [Muon(matrices), torch.optim.AdamW(rest)], [0.01, 0.003]
    made = {"SGD": lambda p: torch.optim.SGD(p), "momentum": lambda p: torch.optim.SGD(p, momentum=0.9)}
    return [made.get(kind, torch.optim.AdamW)(model.parameters())], [{"SGD": 0.5, "momentum": 0.1}.get(kind, 0.003)]


losses = {}
for kind in ("SGD", "momentum", "AdamW", "Muon"):
    model = new_model()
    losses[kind] = run(model, *optimizers_of(kind, model))
    print(f"{kind:9} {sum(losses[kind][-10:]) / 10:.3f} nats a character")
if effort(quick=False, full=True):  # a few steps are still the warm-up
    confirm("AdamW is ahead of SGD", sum(losses["AdamW"][-10:]) < sum(losses["SGD"][-10:]), True)

# %% tags=["picture"]
smooth = {name: torch.tensor(line).unfold(0, 10, 5).mean(-1) for name, line in losses.items()}
curves(
    {n: (torch.arange(len(s)) * 5 + 5, s) for n, s in smooth.items()}, x="step", y="nats a character", title="One model"
)

# %% [markdown]
# ## How fast, when
#
# At the first steps AdamW's means know two or three gradients, and a full step would follow noise: so the rate **warms
# up**. At the end it falls, since the ground is narrow. The package's schedule is a pure function of the step:

# %% tags=["picture"]
settings = OptimizationSettings(lr=1e-3, warmup=50, schedule="cosine", final_lr=0.1)
curves(
    {"cosine": [learning_rate(s, 500, settings) for s in range(500)]},
    x="step",
    y="learning rate",
    title="Warm-up, then half a cosine",
)

# %% [markdown]
# ## Seeing a model learn by heart
#
# Give it 3,000 characters and time. The loss on what it reads goes on falling; on what it doesn't read it turns. The
# distance is **overfitting**, and the turn is the moment to stop.

# %% tags=["given"]
model, small, seen, unseen = new_model(), train[:3000], [], []
tools = [torch.optim.AdamW(model.parameters(), weight_decay=0.0)]
for part in range(effort(quick=3, full=12)):
    seen.append(sum(run(model, tools, [0.003], small, steps=effort(quick=8, full=30), seed=part)[-5:]) / 5)
    with torch.no_grad():
        unseen.append(model.loss(*batch(held, 64, torch.Generator().manual_seed(1))).item())
if effort(quick=False, full=True):
    confirm("it knows better what it has read", seen[-1] < unseen[-1], True)

# %% tags=["picture"]
curves(
    {"3,000 characters it reads": seen, "text it does not": unseen}, x="part", y="nats a character", title="By heart"
)

# %% [markdown]
# ## Resume
#
# Stop after half, save, load, go on: the same bits as without a stop? Only if the optimizer's memory and the order of
# the batches are saved too. `llmfast train --resume` promises that, and its tests kill it to see.


# %% tags=["given"]
def ten_and_ten(keep_memory):
    model = new_model()
    tools = [torch.optim.AdamW(model.parameters())]
    run(model, tools, [0.003], steps=10, seed=1)
    other = new_model()
    other.load_state_dict(model.state_dict())
    fresh = [torch.optim.AdamW(other.parameters())]
    if keep_memory:
        fresh[0].load_state_dict(copy.deepcopy(tools[0].state_dict()))  # or both would write into one memory
    return [run(m, t, [0.003], steps=10, seed=2)[-1] for m, t in ((model, tools), (other, fresh))]


straight, resumed = ten_and_ten(True)
confirm("with the optimizer's memory, the same bits", resumed, straight, within=0.0)
straight, forgetful = ten_and_ten(False)
confirm("without it, not", straight == forgetful, False)

# %% [markdown]
# To go under lesson 1's bar of 1.669 nats takes a minute: `llmfast train tinyshakespeare.txt --preset
# shakespeare-char-cpu` with a shape of 3 layers, 3,000 steps of 32 ends at 1.57 (README).
#
# ## Exercises
#
# **8.1** Write `nesterov(w, g, m, lr, beta)`: m ← β m + g, then w ← w − lr (g + β m). Return (w, m).
#
# **8.2** Write `clip(gradients, most)`: of a list of tensors the same, scaled by one factor so that the norm of all
# together is at most `most`.
#
# **8.3** Write `rate(step, steps, warmup, lr)`: linear from lr / warmup at step 0 to lr at step warmup − 1; then from
# lr at step warmup linear to 0, which step `steps` would have.


# %%
def nesterov(w, g, m, lr, beta): ...


def clip(gradients, most): ...


def rate(step, steps, warmup, lr): ...


check("8.1", nesterov)
check("8.2", clip)
check("8.3", rate)

# %% [markdown]
# Solutions are in `lessons/solutions/08_training.py`.
#
# **Read next**: `llmfast/training/loop.py` and `llmfast/training/optimizers.py`; `docs/training.md`.
