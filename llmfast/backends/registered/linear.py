"""A product with an activation fused to it; what the activation was applied to is kept where backward will need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmfast.backends.registered.base import Operator, any_requires_grad, differentiate_the_first


class Linear(Operator):
    name = "linear"
    # out, and x weightᵀ + bias where it is to be saved for backward (else of shape (0,))
    schema = "(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_preactivation) -> (Tensor, Tensor)"
    # gradients that are not needed have shape (0,)
    backward_schema = (
        "(Tensor grad_out, Tensor x, Tensor weight, Tensor preactivation, str activation, "
        "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)"
    )
    functions = ("linear",)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        save = activation is not None and torch.is_grad_enabled() and any_requires_grad(x, weight, bias)
        return self.run(x, weight, bias, activation or "", save)[0]

    @staticmethod
    def fake(x: Tensor, weight: Tensor, bias: Any, activation: str, save_preactivation: bool) -> Any:
        shape = (*x.shape[:-1], weight.shape[0])
        return x.new_empty(shape), x.new_empty(shape if save_preactivation else (0,))

    @staticmethod
    def fake_backward(
        grad_out: Tensor,
        x: Tensor,
        weight: Tensor,
        preactivation: Tensor,
        activation: str,
        dx: bool,
        dw: bool,
        db: bool,
    ) -> Any:
        return (
            x.new_empty(x.shape if dx else (0,)),
            weight.new_empty(weight.shape if dw else (0,)),
            weight.new_empty(weight.shape[:1] if db else (0,)),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.activation, saved = inputs
        ctx.complete = saved or not ctx.activation
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(x, weight, output[1])

    def backward(self, ctx: Any, grad_out: Tensor, grad_preactivation: Any) -> Any:
        if not ctx.complete:
            raise RuntimeError("linear with an activation needs save_preactivation=True to be differentiated")
        need = ctx.needs_input_grad
        grads = self.run_backward(grad_out, *ctx.saved_tensors, ctx.activation, need[0], need[1], need[2])
        return (*(grad if needed else None for grad, needed in zip(grads, need, strict=False)), None, None)
