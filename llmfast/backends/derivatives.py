"""Derivatives other than by going backward once: `torch.func` (grad, jvp, jacfwd, …) and forward-mode differentiation.

The compiled kernels know neither. PyTorch would not say so: it drops the tangents of an operator that has no rule for
them, and the derivative is zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

ADVICE = 'llmfast.use_backend("pytorch") has them'  # where kernels have none


def once_only(name: str) -> RuntimeError:
    """What second derivatives of an operator's kernels end with."""
    return RuntimeError(
        f"the gradients of {name} can't be differentiated again: its kernels have one derivative, backward. "
        f"{ADVICE}, attention's inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


def constant(function: Callable[[], bool]) -> Callable[[], bool]:
    """`torch.compiler.assume_constant_result`, by the mark that it sets: the function itself imports Dynamo, 170 MB and
    a second and a half of every program that only runs a model. Dynamo guards what the functions here ask for: another
    answer compiles again."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def transformed() -> bool:
    """Whether this call is inside a transform of `torch.func`, `torch.vmap` included, or of forward mode."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@constant
def differentiating() -> bool:
    """The same without `torch.vmap` alone, under which kernels run once for each item."""
    if not transformed():
        return False
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() != kinds.Vmap for level in stack)
