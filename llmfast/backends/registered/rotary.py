"""Rotary positions: a rotation, so that backward turns the gradient the other way and needs nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmfast.backends.registered.base import Operator, heads_like


class Rotary(Operator):
    name = "rotary"
    schema = "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor"
    backward_schema = "(Tensor grad_out, Tensor cos, Tensor sin, bool interleaved) -> Tensor"
    functions = ("rotary",)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        return self.run(x, cos, sin, interleaved)

    @staticmethod
    def fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        return heads_like(x)

    @staticmethod
    def fake_backward(grad_out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        return heads_like(grad_out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    def backward(self, ctx: Any, grad_out: Tensor) -> Any:
        return self.run_backward(grad_out, *ctx.saved_tensors, ctx.interleaved), None, None, None
