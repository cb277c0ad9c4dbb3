"""Triton kernels, one op family a file, forward and backward.

    causal_attention.py       softmax(scale * Q K^T + causal mask) V, online and tiled (FlashAttention-2); decoding
    splits the keys
    layer_norm.py             LayerNorm, and LayerNorm fused with the residual addition before it
    gelu.py                   GELU, by tanh (GPT-2's) or by erf
    linear.py                 x W^T + b with GELU in the epilogue; the tiled matrix multiplication the others build on
    quantized_linear.py       x W^T + b on weights of 8 and 4 bits, for inference
    linear_cross_entropy.py   the head and the loss together, without the logits of a whole batch
    launch.py                 what every launch needs: the device guard, the number of multiprocessors, 64-bit safety

Each file exports plain functions that take and return tensors; nothing here knows autograd, modules or backends.
Importing this package imports no Triton: importing one of its modules does. Set TRITON_INTERPRET=1 before that to run
them on CPU tensors.

Three rules hold everywhere. A size that varies between calls (sequence length, batch, rows) is an ordinary run-time
argument that never specialises a kernel, so it never causes a recompilation. Nothing is tuned at run time: each file
ends or begins with its own small table of configurations. No kernel adds floats atomically, so the same input gives
the same bits.
"""
