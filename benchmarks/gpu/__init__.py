"""Everything worth measuring on a GPU, in one command of ten minutes at most: `python -m benchmarks.gpu --out DIR`.

In reading order:

    __main__.py       the command: one section after another, each in a process of its own
    bench.py          what sections share: sizes, timing with a cold cache, contests that become records
    limits.py         what the GPU can do at most: copying, matrix products, exponentials
    correctness.py    the contract's cases on this GPU, before anything is timed
    attention.py      causal attention, forward and backward, against each of SDPA's backends
    layers.py         LayerNorm, GELU, linear layers, the loss and decode attention against torch and torch.compile
    decoding.py       tokens a second of GPT-2 124M, step by step and as a CUDA graph
    training.py       training GPT-2 124M against plain torch (`plain.py`) and torch.compile
    memory.py         the most memory, by sequence length
    targets.py        what this project wants to reach, and whether it does
    plots.py          pictures of it

On a machine without a GPU it runs at tiny sizes, with Triton's interpreter where `TRITON_INTERPRET=1`: that says that
the command works, and nothing about speed.
"""
