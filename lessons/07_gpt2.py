# %% [markdown]
# # 7. GPT-2
#
# **The pieces of six lessons, stacked: 124,439,808 numbers, thirty lines, and a file that other programs open.**
#
# GPT-2 (Radford et al., 2019) is: token and position vectors, added; L blocks; a last norm; and the token table once
# more, as the head. Nothing here is new. What is to be learned is that nothing is missing.

# %%
import math
import tempfile

import torch

import llmfast
from llmfast import ops
from llmfast.lessons import check, confirm, effort
from llmfast.lessons.pictures import bars
from llmfast.models.llama import LlamaConfig

# %% [markdown]
# ## All of it
#
# A function of token ids and of a dictionary of weights, under the names of the checkpoint. x @ W + b with W (in, out):
# so GPT-2's files have it, while PyTorch's `Linear` holds it transposed.


# %%
def gpt2(ids, w, heads):
    B, T = ids.shape
    x = w["wte.weight"][ids] + w["wpe.weight"][:T]  # (B, T) -> (B, T, C)
    C, layer = x.shape[-1], 0
    while f"h.{layer}.ln_1.weight" in w:
        at = f"h.{layer}."

        def norm(x, name):
            return ops.layer_norm(x, w[at + name + ".weight"], w[at + name + ".bias"])

        def linear(x, name):
            return x @ w[at + name + ".weight"] + w[at + name + ".bias"]

        qkv = linear(norm(x, "ln_1"), "attn.c_attn")  # (B, T, 3 C)
        q, k, v = qkv.view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mixed = ops.causal_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(mixed, "attn.c_proj")
        x = x + linear(ops.gelu(linear(norm(x, "ln_2"), "mlp.c_fc")), "mlp.c_proj")  # (B, T, C) -> 4 C -> C
        layer += 1
    x = ops.layer_norm(x, w["ln_f.weight"], w["ln_f.bias"])
    return x @ w["wte.weight"].T  # (B, T, C) @ (C, V) -> (B, T, V)


# %% [markdown]
# ## 124 million random numbers
#
# The package makes a GPT-2 of that size; its file is read back as plain tensors, and our function runs on them.

# %%
config = llmfast.GPTConfig.preset("gpt2")
if effort(quick=True, full=False):
    config = config.replaced(n_layer=2, vocab_size=5000)
torch.manual_seed(0)
model = llmfast.GPT(config).eval()
folder = tempfile.mkdtemp()
model.save_pretrained(folder)
from safetensors.torch import load_file

weights = {name.removeprefix("transformer."): t for name, t in load_file(f"{folder}/model.safetensors").items()}
ids = torch.randint(config.vocab_size, (2, 32))  # (B, T)
with torch.no_grad():
    expected = model(ids)  # (B, T, V)
    ours = gpt2(ids, weights, config.n_head)
confirm("thirty lines and the package agree", ours, expected, within=1e-3)
try:
    from transformers import GPT2LMHeadModel
except ImportError:
    print("pip install transformers, and a third program opens the file")
else:
    with torch.no_grad():
        confirm(
            "transformers opens it, and agrees", GPT2LMHeadModel.from_pretrained(folder)(ids).logits, expected, 1e-3
        )

# %% [markdown]
# ## An untrained model knows nothing, and says so
#
# Each of V tokens gets about 1 / V: a loss of ln V, and a little more, since random logits prefer random tokens. A new
# model whose loss is far from ln V is wired wrongly: the cheapest test there is.

# %%
with torch.no_grad():
    loss = float(model.loss(ids, torch.randint(config.vocab_size, ids.shape)))
print(f"{loss:.2f} nats; ln {config.vocab_size:,} is {math.log(config.vocab_size):.2f}")
confirm("the loss is near ln V", loss, math.log(config.vocab_size), within=0.5)

# %% [markdown]
# ## Counted to the last one

# %%
V, P, C, L = 50257, 1024, 768, 12  # tokens, positions, channels, layers
block = {
    "two norms": 2 * 2 * C,
    "queries, keys, values": C * 3 * C + 3 * C,
    "attention's output": C * C + C,
    "widening": C * 4 * C + 4 * C,
    "narrowing": 4 * C * C + C,
}
count = V * C + P * C + L * sum(block.values()) + 2 * C
whole = llmfast.GPTConfig.preset("gpt2")
stated = sum(math.prod(parameter.shape) for parameter in whole.parameters())
confirm("GPT-2, the smallest", [count, stated], [124_439_808, 124_439_808], within=0)
confirm("without biases of queries, keys and values", count - L * 3 * C, 124_412_160, within=0)
confirm("and with a head of its own", count - L * 3 * C + V * C, 163_009_536, within=0)

# %% tags=["picture"]
parts = {"token table, also the head": V * C, "positions": P * C} | {f"12 × {n}": L * k for n, k in block.items()}
bars({name: k / 1e6 for name, k in parts.items()}, "Where 124 million parameters are, in millions", form="{:.2f}")

# %% [markdown]
# ## From 2019 to today, switch by switch
#
# | | GPT-2 (2019) | Llama and kin (2023 …) | why |
# |---|---|---|---|
# | norm | LayerNorm | RMSNorm | as good, one pass less |
# | positions | a learned table, added | rotary, turning q and k | knows distances, can be stretched |
# | network | 4 C wide, GELU | gated, SwiGLU, 8/3 C wide | better at equal size |
# | keys and values | a pair for each head | one for several heads (GQA) | the cache shrinks |
# | biases | everywhere | none (Qwen 2: on q, k and v) | not missed |
# | context | 1,024 | 8,192 and more | rotary, and the smaller cache |
#
# In this package that is two files, `gpt2.py` and `llama.py`, over the same ops. What the switches do to the count, for
# SmolLM2-135M, which `llmfast get smollm2` brings:

# %%
smol = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
C, N, KV = 576, 1536, 3 * 64
each = C * C + 2 * C * KV + C * C + 3 * C * N + 2 * C  # q, k and v, o, three of the network, two norms
confirm("SmolLM2-135M", 49152 * C + 30 * each + C, 134_515_008, within=0)
confirm("as the package states it", sum(math.prod(p.shape) for p in smol.parameters()), 134_515_008, within=0)

# %% [markdown]
# ## Exercises
#
# **7.1** Write `parameters(V, P, C, L)`: how many a GPT-2 has, tied.
#
# **7.2** Write `cache_bytes(L, key_heads, D, tokens, e)`: what keys and values of all layers take, e bytes a number.
#
# **7.3** Write `head_logits(x, table, last)`: from the last norm's result x (B, T, C) and the token table (V, C) the
# logits (B, V) of the next token after the sequence, of which only the first `last` (B,) tokens are real.


# %%
def parameters(V, P, C, L): ...


def cache_bytes(L, key_heads, D, tokens, e): ...


def head_logits(x, table, last): ...


check("7.1", parameters)
check("7.2", cache_bytes)
check("7.3", head_logits)

# %% [markdown]
# Solutions are in `lessons/solutions/07_gpt2.py`.
#
# **Read next**: `llmfast/models/gpt2.py`, all of it: you know every line. Then `llmfast/models/llama.py`, and
# `docs/add-an-architecture.md`.
