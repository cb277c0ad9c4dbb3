"""Philox4x32-10, the counter-based random generator of Salmon et al. (2011), in plain tensor arithmetic.

Attention dropout draws from it in every backend at the same counters, so that a seed drops the same weights
everywhere. Written with int64 tensors that hold 32-bit words.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """The first 32-bit word of block (c0, c1, c2, 0) under the 64-bit key `seed`; arguments broadcast."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        # Products of two 32-bit words wrap around in int64, which keeps all 64 bits right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK, (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0


def dropout_keep(seed: Tensor, p: float, B: int, H: int, T: int, S: int) -> Tensor:
    """(B, H, T, S) bool: which attention weights survive dropout of probability `p`."""
    device = seed.device
    key = torch.arange(S, device=device)
    query = torch.arange(T, device=device).view(T, 1)
    head = torch.arange(B * H, device=device).view(B, H, 1, 1)
    key, query, head = torch.broadcast_tensors(key, query, head)
    return (philox(seed, key, query, head) >> 1) >= int(p * 2**31)
