"""The RMS norm, alone and after the residual addition: 1 / sqrt(mean square + eps) of each row is kept for backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmfast.backends.registered.base import Operator, contiguous_like, differentiate_the_first, float32


class RmsNorm(Operator):
    name = "rms_norm"
    # out, 1 / root mean square
    schema = "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)"
    backward_schema = "(Tensor grad_out, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)"
    functions = ("rms_norm",)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return self.run(x, weight, eps)[0]

    @staticmethod
    def fake(x: Tensor, *_: Any) -> Any:
        return contiguous_like(x), float32(x, x.shape[:-1])

    @staticmethod
    def fake_backward(grad_out: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Any:
        return contiguous_like(x), contiguous_like(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _ = inputs
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(x, weight, output[1])

    def backward(self, ctx: Any, grad_out: Tensor, grad_rstd: Any) -> Any:
        return (*self.run_backward(grad_out, *ctx.saved_tensors), None)


class AddRmsNorm(Operator):
    name = "add_rms_norm"
    # out, x + residual, 1 / root mean square
    schema = "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)"
    # the gradient of the sum (which is x's and residual's too), and of weight
    backward_schema = "(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor rstd) -> (Tensor, Tensor)"
    functions = ("add_rms_norm",)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        out, total, _ = self.run(x, residual, weight, eps)
        return out, total

    @staticmethod
    def fake(x: Tensor, *_: Any) -> Any:
        return contiguous_like(x), contiguous_like(x), float32(x, x.shape[:-1])

    @staticmethod
    def fake_backward(grad_out: Tensor, grad_sum: Any, total: Tensor, weight: Tensor, *_: Any) -> Any:
        return contiguous_like(total), contiguous_like(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, weight, _ = inputs
        _, total, rstd = output
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, rstd)

    def backward(self, ctx: Any, grad_out: Any, grad_sum: Any, grad_rstd: Any) -> Any:
        if grad_out is None:  # only the sum was used
            return grad_sum, grad_sum, None, None
        dsum, dweight = self.run_backward(grad_out, grad_sum, *ctx.saved_tensors)
        return dsum, dsum, dweight, None
