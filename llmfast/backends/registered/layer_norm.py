"""Layer normalisation, alone and after the residual addition: the statistics of each row are kept for backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmfast.backends.registered.base import Operator, contiguous_like, differentiate_the_first, float32


class LayerNorm(Operator):
    name = "layer_norm"
    # out, mean, 1 / standard deviation
    schema = "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)"
    backward_schema = "(Tensor grad_out, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)"
    functions = ("layer_norm",)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
        return self.run(x, weight, bias, eps)[0]

    @staticmethod
    def fake(x: Tensor, *_: Any) -> Any:
        return contiguous_like(x), float32(x, x.shape[:-1]), float32(x, x.shape[:-1])

    @staticmethod
    def fake_backward(grad_out: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Any:
        return contiguous_like(x), contiguous_like(weight), contiguous_like(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _ = inputs
        ctx.has_bias = bias is not None
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(x, weight, *output[1:])

    def backward(self, ctx: Any, grad_out: Tensor, grad_mean: Any, grad_rstd: Any) -> Any:
        dx, dweight, dbias = self.run_backward(grad_out, *ctx.saved_tensors)
        return dx, dweight, dbias if ctx.has_bias else None, None


class AddLayerNorm(Operator):
    name = "add_layer_norm"
    # out, x + residual, mean, 1 / standard deviation
    schema = "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
    # the gradient of the sum (which is x's and residual's too), of weight and of bias
    backward_schema = (
        "(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd) "
        "-> (Tensor, Tensor, Tensor)"
    )
    functions = ("add_layer_norm",)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        out, total, _, _ = self.run(x, residual, weight, bias, eps)
        return out, total

    @staticmethod
    def fake(x: Tensor, *_: Any) -> Any:
        return contiguous_like(x), contiguous_like(x), float32(x, x.shape[:-1]), float32(x, x.shape[:-1])

    @staticmethod
    def fake_backward(grad_out: Tensor, grad_sum: Any, total: Tensor, weight: Tensor, *_: Any) -> Any:
        return contiguous_like(total), contiguous_like(weight), contiguous_like(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, weight, bias, _ = inputs
        _, total, mean, rstd = output
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, mean, rstd)

    def backward(self, ctx: Any, grad_out: Any, grad_sum: Any, grad_mean: Any, grad_rstd: Any) -> Any:
        if grad_out is None:  # only the sum was used
            return grad_sum, grad_sum, None, None, None
        dsum, dweight, dbias = self.run_backward(grad_out, grad_sum, *ctx.saved_tensors)
        return dsum, dsum, dweight, dbias if ctx.has_bias else None, None
