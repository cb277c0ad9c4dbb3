"""A language model's head and its loss: each row's log-sum-exp over the vocabulary is kept for backward. A head that
takes no gradient gets none made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmfast.backends.registered.base import Operator, contiguous_like, differentiate_the_first, float32


class LinearCrossEntropy(Operator):
    name = "linear_cross_entropy"
    # the mean loss, and each row's log-sum-exp
    schema = "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index) -> (Tensor, Tensor)"
    # a weight's gradient that is not needed has shape (0,)
    backward_schema = (
        "(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, int ignore_index, "
        "bool need_dweight) -> (Tensor, Tensor)"
    )
    functions = ("linear_cross_entropy",)

    def linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
    ) -> Tensor:
        return self.run(hidden, weight, targets, ignore_index)[0]

    @staticmethod
    def fake(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Any:
        return float32(hidden, ()), float32(hidden, targets.shape)

    @staticmethod
    def fake_backward(
        grad_loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        lse: Tensor,
        ignore_index: int,
        dweight: bool,
    ) -> Any:
        return contiguous_like(hidden), weight.new_empty(weight.shape if dweight else (0,))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, weight, targets, ctx.ignore_index = inputs
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(hidden, weight, targets, output[1])

    def backward(self, ctx: Any, grad_loss: Tensor, grad_lse: Any) -> Any:
        need = ctx.needs_input_grad[1]
        dhidden, dweight = self.run_backward(grad_loss, *ctx.saved_tensors, ctx.ignore_index, need)
        return dhidden, dweight if need else None, None, None
