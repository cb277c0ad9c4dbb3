"""What compiled kernels need to be operators that PyTorch understands.

The C++ kernels (namespace `llmfast`) and the Triton kernels (namespace `llmfast_triton`) implement one list of
operators, `SCHEMAS`: a forward and a backward for each op of the contract. Everything else that makes an operator a
citizen of PyTorch is the same for both and stands here once: shapes without data for `torch.compile` (fake kernels),
the gradient formulas, and the contract's functions on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    # out, and the log-sum-exp of each query's scores, from which backward makes the weights again
    "causal_attention": "(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? dropout_seed, "
    "Tensor? kv_lengths) -> (Tensor, Tensor)",
    "causal_attention_backward": "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, float dropout_p, Tensor? dropout_seed, Tensor? kv_lengths) -> (Tensor, Tensor, Tensor)",
    # out, mean, 1 / standard deviation
    "layer_norm": "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    "layer_norm_backward": "(Tensor grad_out, Tensor x, Tensor weight, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    # out, x + residual, mean, 1 / standard deviation
    "add_layer_norm": "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    # the gradient of the sum (which is x's and residual's too), of weight and of bias
    "add_layer_norm_backward": "(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor mean, "
    "Tensor rstd) -> (Tensor, Tensor, Tensor)",
    "gelu": "(Tensor x, str approximate) -> Tensor",
    "gelu_backward": "(Tensor grad_out, Tensor x, str approximate) -> Tensor",
    # out, and x weightᵀ + bias where it is to be saved for backward (else of shape (0,))
    "linear": "(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_preactivation) -> (Tensor, Tensor)",
    # gradients that are not needed have shape (0,)
    "linear_backward": "(Tensor grad_out, Tensor x, Tensor weight, Tensor preactivation, str activation, "
    "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    # mean loss, and each row's log-sum-exp over the vocabulary
    "linear_cross_entropy": "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index) -> (Tensor, Tensor)",
    "linear_cross_entropy_backward": "(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, "
    "int ignore_index) -> (Tensor, Tensor)",
}


class RegisteredOps:
    """The contract's functions over the operators of one namespace."""

    def __init__(self, namespace: str):
        self._namespace = namespace
        self._calls: dict[str, Callable[..., Any]] = {}

    def _run(self, op: str, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return getattr(getattr(torch.ops, self._namespace), op)(*inputs)
        if op not in self._calls:  # at first use: the operators of an extension that was not built are not there
            ops = getattr(torch.ops, self._namespace)
            self._calls[op] = _eager_call(getattr(ops, op).default, *gradients(ops)[op])
        return self._calls[op](*inputs)

    def causal_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout_seed: Tensor | None = None,
        kv_lengths: Tensor | None = None,
    ) -> Tensor:
        return self._run("causal_attention", q, k, v, scale, dropout_p, dropout_seed, kv_lengths)[0]

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
        return self._run("layer_norm", x, weight, bias, eps)[0]

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        out, total, _, _ = self._run("add_layer_norm", x, residual, weight, bias, eps)
        return out, total

    def gelu(self, x: Tensor, approximate: str = "tanh") -> Tensor:
        return self._run("gelu", x, approximate)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        save = activation is not None and torch.is_grad_enabled() and _any_requires_grad(x, weight, bias)
        return self._run("linear", x, weight, bias, activation or "", save)[0]

    def linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
    ) -> Tensor:
        return self._run("linear_cross_entropy", hidden, weight, targets, ignore_index)[0]


def _eager_call(operator: Any, setup_context: Any, backward: Any) -> Callable[..., Any]:
    """`operator` for eager calls, differentiable as its registration makes it, at half the time a call.

    The registered gradient is reached through the dispatcher's Python kernel for autograd, 5 to 20 microseconds a call,
    which a small model feels. Here autograd is dealt with first and the dispatcher starts below it.
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
            if torch.is_grad_enabled():  # somebody wants second derivatives: the registered operator refuses them
                return backward(ctx, *grads)
            with torch._C._AutoDispatchBelowAutograd():
                return backward(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return call


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def register(namespace: str) -> None:
    """Gives the operators of `namespace`, already defined and implemented, their fake kernels and gradients."""
    for op in SCHEMAS:
        torch.library.register_fake(f"{namespace}::{op}", FAKE_KERNELS[op])
    for op, (setup_context, backward) in gradients(getattr(torch.ops, namespace)).items():
        torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=setup_context)
        torch.library.register_autograd(f"{namespace}::{op}_backward", _refuse)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("these gradients can't be differentiated again; use the pytorch backend for second derivatives")


# --- shapes without data -------------------------------------------------------------------------------------------


def _heads_like(x: Tensor) -> Tensor:
    """(B, H, T, D) laid out as (B, T, H, D), so that heads merge back into channels without a copy."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _contiguous_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _float32(x: Tensor, shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _fake_linear(x: Tensor, weight: Tensor, bias: Any, activation: str, save_preactivation: bool) -> Any:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_preactivation else (0,))


def _fake_linear_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, preactivation: Tensor, activation: str, dx: bool, dw: bool, db: bool
) -> Any:
    return (
        x.new_empty(x.shape if dx else (0,)),
        weight.new_empty(weight.shape if dw else (0,)),
        weight.new_empty(weight.shape[:1] if db else (0,)),
    )


FAKE_KERNELS: dict[str, Any] = {
    "causal_attention": lambda q, k, v, *_: (_heads_like(q), _float32(q, q.shape[:3])),
    "causal_attention_backward": lambda g, q, k, v, *_: (_heads_like(q), _heads_like(k), _heads_like(v)),
    "layer_norm": lambda x, weight, bias, eps: (
        _contiguous_like(x),
        _float32(x, x.shape[:-1]),
        _float32(x, x.shape[:-1]),
    ),
    "layer_norm_backward": lambda g, x, weight, *_: (
        _contiguous_like(x),
        _contiguous_like(weight),
        _contiguous_like(weight),
    ),
    "add_layer_norm": lambda x, residual, weight, bias, eps: (
        _contiguous_like(x),
        _contiguous_like(x),
        _float32(x, x.shape[:-1]),
        _float32(x, x.shape[:-1]),
    ),
    "add_layer_norm_backward": lambda g, grad_sum, total, weight, *_: (
        _contiguous_like(total),
        _contiguous_like(weight),
        _contiguous_like(weight),
    ),
    "gelu": lambda x, approximate: _contiguous_like(x),
    "gelu_backward": lambda g, x, approximate: _contiguous_like(x),
    "linear": _fake_linear,
    "linear_backward": _fake_linear_backward,
    "linear_cross_entropy": lambda hidden, weight, targets, ignore_index: (
        _float32(hidden, ()),
        _float32(hidden, targets.shape),
    ),
    "linear_cross_entropy_backward": lambda g, hidden, weight, *_: (
        _contiguous_like(hidden),
        _contiguous_like(weight),
    ),
}


# --- gradients -----------------------------------------------------------------------------------------------------


def gradients(ops: Any) -> dict[str, tuple[Any, Any]]:
    """(setup_context, backward) of each differentiable operator, in terms of the backward operators in `ops`.

    Outputs that only serve backward are marked as not differentiable, and gradients that nobody computed stay None:
    otherwise autograd fills a tensor of zeros for each, as large as the activations.
    """

    def differentiate_the_first(ctx: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def save_attention(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, ctx.scale, ctx.dropout_p, dropout_seed, kv_lengths = inputs
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(q, k, v, *output, dropout_seed, kv_lengths)

    def attention_backward(ctx: Any, grad_out: Tensor, grad_lse: Any) -> Any:
        q, k, v, out, lse, seed, lengths = ctx.saved_tensors
        grads = ops.causal_attention_backward(grad_out, q, k, v, out, lse, ctx.scale, ctx.dropout_p, seed, lengths)
        return (*grads, None, None, None, None)

    def save_layer_norm(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _ = inputs
        ctx.has_bias = bias is not None
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(x, weight, *output[1:])

    def layer_norm_backward(ctx: Any, grad_out: Tensor, grad_mean: Any, grad_rstd: Any) -> Any:
        dx, dweight, dbias = ops.layer_norm_backward(grad_out, *ctx.saved_tensors)
        return dx, dweight, dbias if ctx.has_bias else None, None

    def save_add_layer_norm(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, weight, bias, _ = inputs
        _, total, mean, rstd = output
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, mean, rstd)

    def add_layer_norm_backward(ctx: Any, grad_out: Any, grad_sum: Any, grad_mean: Any, grad_rstd: Any) -> Any:
        if grad_out is None:  # only the sum was used
            return grad_sum, grad_sum, None, None, None
        dsum, dweight, dbias = ops.add_layer_norm_backward(grad_out, grad_sum, *ctx.saved_tensors)
        return dsum, dsum, dweight, dbias if ctx.has_bias else None, None

    def save_gelu(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.approximate = inputs
        ctx.save_for_backward(x)

    def gelu_backward(ctx: Any, grad_out: Tensor) -> Any:
        return ops.gelu_backward(grad_out, *ctx.saved_tensors, ctx.approximate), None

    def save_linear(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.activation, saved = inputs
        ctx.complete = saved or not ctx.activation
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(x, weight, output[1])

    def linear_backward(ctx: Any, grad_out: Tensor, grad_preactivation: Any) -> Any:
        if not ctx.complete:
            raise RuntimeError("linear with an activation needs save_preactivation=True to be differentiated")
        need = ctx.needs_input_grad
        grads = ops.linear_backward(grad_out, *ctx.saved_tensors, ctx.activation, need[0], need[1], need[2])
        return (*(grad if needed else None for grad, needed in zip(grads, need, strict=False)), None, None)

    def save_cross_entropy(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, weight, targets, ctx.ignore_index = inputs
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(hidden, weight, targets, output[1])

    def cross_entropy_backward(ctx: Any, grad_loss: Tensor, grad_lse: Any) -> Any:
        grads = ops.linear_cross_entropy_backward(grad_loss, *ctx.saved_tensors, ctx.ignore_index)
        return (*grads, None, None)

    return {
        "causal_attention": (save_attention, attention_backward),
        "layer_norm": (save_layer_norm, layer_norm_backward),
        "add_layer_norm": (save_add_layer_norm, add_layer_norm_backward),
        "gelu": (save_gelu, gelu_backward),
        "linear": (save_linear, linear_backward),
        "linear_cross_entropy": (save_cross_entropy, cross_entropy_backward),
    }
