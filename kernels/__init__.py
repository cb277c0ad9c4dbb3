"""Triton kernels, one op family a file, forward and backward.

    causal_attention.py       softmax(scale * Q K^T + mask) V: the op, over the kernels of attention_*.py
    rotary.py                 rotary positions
    layer_norm.py             LayerNorm, and LayerNorm fused with the residual addition before it
    rms_norm.py               RMSNorm, and RMSNorm fused with the residual addition before it
    norm_rows.py              what the two norms share
    activations.py            GELU and SiLU, as the epilogues apply them
    gelu.py                   GELU, by tanh (GPT-2's) or by erf
    linear.py                 x W^T + b with an activation in the epilogue
    gated_linear.py           activation(x Wg^T + bg) * (x Wu^T + bu), both products in one kernel
    quantized_linear.py       x W^T + b on weights of 8 and 4 bits, for inference
    linear_cross_entropy.py   the head and the loss together, without the logits of a whole batch
    matmul.py                 the tiled matrix multiplication that the linear layers and the loss are built on
    configurations.py         which tile sizes a kernel gets: the tables of configs/, one file a GPU family
    tuning.py                 LLMFAST_AUTOTUNE=1, which searches for better ones
    launch.py                 what every launch needs: the device guard, the GPU's family, 64-bit safety
    aot/                      compiles all of it for GPUs that are not here

Each file exports plain functions that take and return tensors; nothing here knows autograd, modules or backends.
Importing this package imports no Triton: importing one of its modules does. Set TRITON_INTERPRET=1 before that to run
them on CPU tensors.

Three rules hold everywhere. A size that varies between calls (sequence length, batch, rows) is an ordinary run-time
argument that never specialises a kernel, so it never causes a recompilation. Nothing is tuned at run time unless
LLMFAST_AUTOTUNE=1 asks for it: configurations are data that ships with the package. No kernel adds floats atomically,
so the same input gives the same bits.
"""
