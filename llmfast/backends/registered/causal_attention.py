"""Attention, causal or bidirectional.

The log-sum-exp of each query's scores is kept, from which backward makes the weights again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmfast.backends.registered.base import Operator, differentiate_the_first, float32, heads_like


class CausalAttention(Operator):
    name = "causal_attention"
    # window 0 is none; without `causal` every query sees every key
    schema = (
        "(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? dropout_seed, Tensor? kv_lengths, "
        "int window, bool causal) -> (Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, float dropout_p, "
        "Tensor? dropout_seed, Tensor? kv_lengths, int window, bool causal) -> (Tensor, Tensor, Tensor)"
    )
    functions = ("causal_attention", "bidirectional_attention")

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
        window: int | None = None,
    ) -> Tensor:
        return self.run(q, k, v, scale, dropout_p, dropout_seed, kv_lengths, window or 0, True)[0]

    def bidirectional_attention(
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
        return self.run(q, k, v, scale, dropout_p, dropout_seed, kv_lengths, 0, False)[0]

    @staticmethod
    def fake(q: Tensor, *_: Any) -> Any:
        return heads_like(q), float32(q, q.shape[:3])

    @staticmethod
    def fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
        return heads_like(q), heads_like(k), heads_like(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, ctx.scale, ctx.dropout_p, dropout_seed, kv_lengths, ctx.window, ctx.causal = inputs
        differentiate_the_first(ctx, output)
        ctx.save_for_backward(q, k, v, *output, dropout_seed, kv_lengths)

    def backward(self, ctx: Any, grad_out: Tensor, grad_lse: Any) -> Any:
        q, k, v, out, lse, seed, lengths = ctx.saved_tensors
        grads = self.run_backward(
            grad_out, q, k, v, out, lse, ctx.scale, ctx.dropout_p, seed, lengths, ctx.window, ctx.causal
        )
        return (*grads, None, None, None, None, None, None)
