"""The base of a registered operator: its registration, its eager calls, and the layouts that outputs have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor


class Operator:
    """An operator and its gradient, in one namespace (`llmfast` or `llmfast_triton`).

    A subclass states the two schemas, the shapes of the outputs without data, for `torch.compile` (`fake`,
    `fake_backward`), the gradient formula in terms of the backward operator (`setup_context`, `backward`), and the
    functions of the contract that run on it, as methods of the same name.

    Outputs that only serve backward are marked as not differentiable, and gradients that nobody computed stay None:
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
            self._eager = self._eager_call()
        return self._eager(*inputs)

    def run_backward(self, *inputs: Any) -> Any:
        """The backward operator."""
        return getattr(getattr(torch.ops, self._namespace), f"{self.name}_backward")(*inputs)

    def register(self) -> None:
        """Gives the two operators, already defined and implemented, their fake kernels and gradients."""
        qualified = f"{self._namespace}::{self.name}"
        torch.library.register_fake(qualified, self.fake)
        torch.library.register_fake(f"{qualified}_backward", self.fake_backward)
        torch.library.register_autograd(qualified, self.backward, setup_context=self.setup_context)
        torch.library.register_autograd(f"{qualified}_backward", _refuse)

    def _eager_call(self) -> Callable[..., Any]:
        """The operator for eager calls, differentiable as its registration makes it, at half the time a call.

        The registered gradient is reached through the dispatcher's Python kernel for autograd, 5 to 20 microseconds a
        call, which a small model feels. Here autograd is dealt with first and the dispatcher starts below it.
        """
        operator = getattr(getattr(torch.ops, self._namespace), self.name).default
        setup_context, differentiate = self.setup_context, self.backward

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    output = operator(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if torch.is_grad_enabled():  # second derivatives are wanted: the registered operator refuses them
                    return differentiate(ctx, *grads)
                with torch._C._AutoDispatchBelowAutograd():
                    return differentiate(ctx, *grads)

        def call(*inputs: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
                return Function.apply(*inputs)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs)

        return call


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("these gradients can't be differentiated again; use the pytorch backend for second derivatives")


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
