"""Derivatives other than by going backward once: `torch.func` (grad, jvp, jacfwd, …) and forward-mode differentiation.

The compiled kernels know neither. PyTorch would not say so: it drops the tangents of an operator that has no rule for
them, and the derivative is zero.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

ADVICE = 'llmfast.use_backend("pytorch") has them'  # where kernels have none


@torch.compiler.assume_constant_result  # Dynamo guards both that this asks for: another answer compiles again
def transformed() -> bool:
    """Whether this call is inside a transform of `torch.func`, `torch.vmap` included, or of forward mode."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result
def differentiating() -> bool:
    """The same without `torch.vmap` alone, under which kernels run once for each item."""
    if not transformed():
        return False
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() != kinds.Vmap for level in stack)
