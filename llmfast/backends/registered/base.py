"""The base of a registered operator: its registration, its eager calls, and the layouts that outputs have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmfast.backends.derivatives import ADVICE, differentiating, once_only, transformed


class Operator:
    """An operator and its gradient, in one namespace (`llmfast` or `llmfast_triton`).

    A subclass states the two schemas, the shapes of the outputs without data, for `torch.compile` (`fake`,
    `fake_backward`), the gradient formula in terms of the backward operator (`setup_context`, `backward`), and the
    functions of the contract that run on it, as methods of the same name.

    Outputs that only serve backward are marked as not differentiable, and gradients that were not computed stay None:
    otherwise autograd fills a tensor of zeros for each, as large as the activations.
    """

    name: ClassVar[str]
    schema: ClassVar[str]
    backward_schema: ClassVar[str]
    functions: ClassVar[tuple[str, ...]]  # of the contract

    def __init__(self, namespace: str):
        self._namespace = namespace
        self._eager: Callable[..., Any] | None = None

    @staticmethod
    def fake(*args: Any, **kwargs: Any) -> Any:
        """Empty outputs, from the operator's inputs."""
        raise NotImplementedError

    @staticmethod
    def fake_backward(*args: Any, **kwargs: Any) -> Any:
        """Empty gradients, from the backward operator's inputs."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Saves what `backward` needs."""
        raise NotImplementedError

    def backward(self, ctx: Any, *args: Any, **kwargs: Any) -> Any:
        """From the gradients of the outputs that of every input, None for what has none."""
        raise NotImplementedError

    def run(self, *inputs: Any) -> Any:
        """The operator, differentiable."""
        if torch.compiler.is_compiling():
            return getattr(getattr(torch.ops, self._namespace), self.name)(*inputs)
        if self._eager is None:  # at first use: the operators of an extension that was not built are not there
            self._eager = with_gradient(self._operator(), self.setup_context, self.backward)
        return self._eager(*inputs)

    def run_backward(self, *inputs: Any) -> Any:
        """The backward operator; where its own gradient is not wanted, below the dispatcher's autograd.

        Not around all of `backward`: what is saved may first have to be computed again (activation checkpointing), with
        a gradient.
        """
        operator = getattr(getattr(torch.ops, self._namespace), f"{self.name}_backward")
        # The registered operator refuses second derivatives.
        if torch.is_grad_enabled() or transformed() or torch.compiler.is_compiling():
            return operator(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def register(self) -> None:
        """Gives the two operators, already defined and implemented, their fake kernels and gradients."""
        qualified = f"{self._namespace}::{self.name}"
        torch.library.register_fake(qualified, self.fake)
        torch.library.register_fake(f"{qualified}_backward", self.fake_backward)
        kernel = with_gradient(self._operator(), self.setup_context, self.backward)
        torch.library.impl(qualified, "Autograd")(kernel)
        kernel = with_gradient(self._operator("_backward"), lambda *_: None, self._refuse)
        torch.library.impl(f"{qualified}_backward", "Autograd")(kernel)

    def _operator(self, suffix: str = "") -> Any:
        return getattr(getattr(torch.ops, self._namespace), self.name + suffix).default

    def _refuse(self, ctx: Any, *grads: Any) -> Any:
        raise once_only(self.name)


def with_gradient(operator: Any, setup_context: Any, backward: Any) -> Callable[..., Any]:
    """A function that runs `operator`, differentiable by going backward once and in no other way.

    It is the operator's kernel for autograd, as `torch.library.register_autograd` would make one, but that one drops
    the tangents of forward-mode differentiation. And it is what eager calls use: they deal with autograd here, and
    enter the dispatcher below it, which saves 5 to 20 microseconds a call.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if differentiating():
            raise RuntimeError(f"{operator} has no derivatives by torch.func or in forward mode; {ADVICE}")
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return call


def differentiate_the_first(ctx: Any, output: Any) -> None:
    """Marks every output but the first as one that only serves backward."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


# --- shapes without data -------------------------------------------------------------------------------------------


def heads_like(x: Tensor) -> Tensor:
    """(B, H, T, D) laid out as (B, T, H, D), so that heads merge back into channels without a copy."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def contiguous_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def float32(x: Tensor, shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)
