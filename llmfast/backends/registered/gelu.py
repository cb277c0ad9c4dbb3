"""GELU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmfast.backends.registered.base import Operator, contiguous_like


class Gelu(Operator):
    name = "gelu"
    schema = "(Tensor x, str approximate) -> Tensor"
    backward_schema = "(Tensor grad_out, Tensor x, str approximate) -> Tensor"
    functions = ("gelu",)

    def gelu(self, x: Tensor, approximate: str = "tanh") -> Tensor:
        return self.run(x, approximate)

    @staticmethod
    def fake(x: Tensor, approximate: str) -> Any:
        return contiguous_like(x)

    @staticmethod
    def fake_backward(grad_out: Tensor, x: Tensor, approximate: str) -> Any:
        return contiguous_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.approximate = inputs
        ctx.save_for_backward(x)

    def backward(self, ctx: Any, grad_out: Tensor) -> Any:
        return self.run_backward(grad_out, *ctx.saved_tensors, ctx.approximate), None
