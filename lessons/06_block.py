# %% [markdown]
# # 6. A block
#
# **Attention, a small network for each token, two norms and two additions: each is there so that gradients get
# through.**
#
# Attention mixes tokens (lesson 5). A transformer (Vaswani et al., 2017) stacks it dozens of times, with a network
# between that works on each token alone. Stacking is the hard part. This lesson takes the parts off one by one, and
# looks at what reaches the bottom.

# %%
import torch
from torch import nn

from llmfast import ops
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.pictures import curves
from llmfast.models.gpt2 import Block as GPT2Block
from llmfast.models.gpt2 import GPTConfig

# %% [markdown]
# ## Norms
#
# **LayerNorm** (Ba et al., 2016) gives each token's channels mean 0 and variance 1, then a learned scale and shift.
# **RMSNorm** (Zhang and Sennrich, 2019) only divides by the root of the mean square. Llama and all its kin take the
# second: as good, and a pass less.


# %%
def layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(dim=-1, keepdim=True)  # (..., C)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm(x, weight, eps=1e-6):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


torch.manual_seed(0)
x = 5 + 3 * torch.randn(2, 7, 48)  # (B, T, C)
weight, bias = torch.randn(48), torch.randn(48)
confirm("LayerNorm is the package's", ops.layer_norm(x, weight, bias), layer_norm(x, weight, bias), 1e-4)
confirm("RMSNorm is the package's", ops.rms_norm(x, weight), rms_norm(x, weight), 1e-4)

# %% [markdown]
# ## What bends
#
# Without something that is not a straight line, two matrices are one. **ReLU** is max(x, 0). **GELU** (Hendrycks and
# Gimpel, 2016) is x times the probability that a normal number is smaller: no corner, and a small slope below 0.
# **SwiGLU** (Shazeer, 2020) lets one product open and close another: $\mathrm{silu}(x W_g) \cdot x W_u$.

# %%
z = torch.linspace(-4, 4, 81)  # (81,)
bends = {"ReLU": z.relu(), "GELU": ops.gelu(z), "SiLU, x · sigmoid(x)": z * z.sigmoid()}
gate, up, down = torch.randn(96, 48) / 7, torch.randn(96, 48) / 7, torch.randn(48, 96) / 10
swiglu = nn.functional.silu(x @ gate.T) * (x @ up.T)  # (B, T, 48) -> (B, T, 96)
confirm("SwiGLU is the package's gated_linear", ops.gated_linear(x, gate, up), swiglu, 1e-3)

# %% tags=["picture"]
curves({name: (z, y) for name, y in bends.items()}, x="x", title="Three bends")

# %% [markdown]
# ## A stack, with and without
#
# Four ways to put a branch f (attention or the network) into the stream x:
#
# | | |
# |---|---|
# | plain | $f(x)$ |
# | residual (He et al., 2015) | $x + f(x)$ |
# | post-norm (2017's transformer) | $\mathrm{norm}(x + f(x))$ |
# | pre-norm (GPT-2, Llama) | $x + f(\mathrm{norm}(x))$ |


# %%
class Block(nn.Module):
    def __init__(self, C, way):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.widen, self.narrow = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.norms, self.way = nn.ModuleList([nn.LayerNorm(C), nn.LayerNorm(C)]), way

    def attention(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, 4, C // 4).permute(2, 0, 3, 1, 4)  # each (B, 4, T, C / 4)
        return self.out(ops.causal_attention(q, k, v).transpose(1, 2).reshape(B, T, C))

    def network(self, x):
        return self.narrow(ops.gelu(self.widen(x)))  # (B, T, C) -> (B, T, 4 C) -> (B, T, C)

    def forward(self, x):
        for branch, norm in zip((self.attention, self.network), self.norms):
            ways = {"plain": lambda: branch(x), "residual": lambda: x + branch(x)}
            ways |= {"post-norm": lambda: norm(x + branch(x)), "pre-norm": lambda: x + branch(norm(x))}
            x = ways[self.way]()
        return x  # (B, T, C)


ways, depth = ("plain", "residual", "post-norm", "pre-norm"), effort(quick=12, full=24)
sizes, slopes = {}, {}
for way in ways:
    torch.manual_seed(1)
    blocks, x = [Block(64, way) for _ in range(depth)], torch.randn(4, 32, 64)
    stream = [x]
    for block in blocks:
        stream.append(block(stream[-1]))
    (stream[-1] * torch.randn(4, 32, 64)).mean().backward()
    sizes[way] = [float(s.detach().std()) for s in stream]
    slopes[way] = [float(block.widen.weight.grad.norm()) for block in blocks]
confirm(
    "plain: the first block's gradient is less than 1 / 1000 of the last's",
    slopes["plain"][0] < slopes["plain"][-1] / 1e3,
    True,
)
confirm("pre-norm: they are within a factor of 5", max(slopes["pre-norm"]) / min(slopes["pre-norm"]) < 5, True)

# %% tags=["picture"]
curves(sizes, x="after block", y="deviation of the stream", log="y", title="What goes up …")
curves(slopes, x="block", y="norm of a gradient", log="y", title="… and what comes down")

# %% [markdown]
# Plain, every block shrinks what passes, and the first ones learn nothing. With the addition a gradient has a way
# around. Without norms the stream grows with each block. Post-norm holds it, at a price: at the start its last blocks
# get the largest gradients, and such models need a long warm-up (Xiong et al., 2020). With pre-norm the stream itself
# is never touched and grows slowly. That is also why GPT-2 starts the last layer of each branch smaller by $\sqrt{2
# L}$.
#
# ## GPT-2's block
#
# The package's is this one, pre-norm. It is written so that each addition is one kernel with the norm after it: a block
# gets the branch that is not added yet, and hands on its own.

# %%
config = GPTConfig(n_embd=48, n_head=4, n_layer=1).without_dropout()
theirs, x = GPT2Block(config), torch.randn(2, 7, 48)  # (B, T, C)
middle = x + theirs.attn(layer_norm(x, theirs.ln_1.weight, theirs.ln_1.bias))
ours = middle + theirs.mlp(layer_norm(middle, theirs.ln_2.weight, theirs.ln_2.bias))
branch, residual = theirs(None, x)  # each (B, T, C)
confirm("x + attention(norm(x)), then x + network(norm(x))", branch + residual, ours, 1e-4)

# %% [markdown]
# ## Exercises
#
# **6.1** Write `rms(x, weight, eps)`: RMSNorm over the last dimension.
#
# **6.2** Write `swiglu_network(x, gate, up, down)`: Llama's network, x (..., C), gate and up (N, C), down (C, N).
#
# **6.3** Write `pre_norm(x, norm_1, attention, norm_2, network)`: a block from its four functions.


# %%
def rms(x, weight, eps): ...


def swiglu_network(x, gate, up, down): ...


def pre_norm(x, norm_1, attention, norm_2, network): ...


check("6.1", rms)
check("6.2", swiglu_network)
check("6.3", pre_norm)

# %% [markdown]
# Solutions are in `lessons/solutions/06_block.py`.
#
# **Read next**: `Block` in `llmfast/models/gpt2.py` and in `llmfast/models/llama.py`, side by side; `add_layer_norm` in
# `llmfast/ops.py`, and its kernel in `csrc/ops/norm.inl`.
