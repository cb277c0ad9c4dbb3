"""The gated product: what its activation and its multiplication were applied to is kept where backward will need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmfast.backends.registered.base import Operator, any_requires_grad, differentiate_the_first


class GatedLinear(Operator):
    name = "gated_linear"
    # out, and where they are to be saved for backward (else of shape (0,)) x gate_weightᵀ + gate_bias and
    # x up_weightᵀ + up_bias
    schema = (
        "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, str activation, "
        "bool save) -> (Tensor, Tensor, Tensor)"
    )
    # gradients that are not needed have shape (0,)
    backward_schema = (
        "(Tensor grad_out, Tensor x, Tensor gate_weight, Tensor up_weight, Tensor gate, Tensor up, str activation, "
        "bool need_dx, bool need_dgate_weight, bool need_dup_weight, bool need_dgate_bias, bool need_dup_bias) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    functions = ("gated_linear",)

    def gated_linear(
        self,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        activation: str = "silu",
    ) -> Tensor:
        save = torch.is_grad_enabled() and any_requires_grad(x, gate_weight, up_weight, gate_bias, up_bias)
        return self.run(x, gate_weight, up_weight, gate_bias, up_bias, activation, save)[0]

    @staticmethod
    def fake(
        x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate_bias: Any, up_bias: Any, activation: str, save: bool
    ) -> Any:
        shape = (*x.shape[:-1], gate_weight.shape[0])
        saved = shape if save else (0,)
        return x.new_empty(shape), x.new_empty(saved), x.new_empty(saved)

    @staticmethod
    def fake_backward(
        grad_out: Tensor,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        gate: Tensor,
        up: Tensor,
        activation: str,
        *needed: bool,
    ) -> Any:
        N = gate_weight.shape[:1]
        shapes = (x.shape, gate_weight.shape, up_weight.shape, N, N)
        return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, gate_weight, up_weight, _, _, ctx.activation, ctx.saved = inputs
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(x, gate_weight, up_weight, *output[1:])

    def backward(self, ctx: Any, grad_out: Tensor, grad_gate: Any, grad_up: Any) -> Any:
        if not ctx.saved:
            raise RuntimeError("gated_linear needs save=True to be differentiated")
        need = ctx.needs_input_grad[:5]
        grads = self.run_backward(grad_out, *ctx.saved_tensors, ctx.activation, *need)
        return (*(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None)
