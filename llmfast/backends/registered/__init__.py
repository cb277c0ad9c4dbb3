"""What compiled kernels need to be operators that PyTorch understands, one file an operator.

The C++ kernels (namespace `llmfast`) and the Triton kernels (namespace `llmfast_triton`) implement one list of
operators, `OPERATORS`: a forward and a backward each. Everything else that makes an operator a citizen of PyTorch is
the same for both and stands here once (`base.Operator` says what that is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmfast.backends.registered.base import Operator
from llmfast.backends.registered.causal_attention import CausalAttention
from llmfast.backends.registered.gated_linear import GatedLinear
from llmfast.backends.registered.gelu import Gelu
from llmfast.backends.registered.layer_norm import AddLayerNorm, LayerNorm
from llmfast.backends.registered.linear import Linear
from llmfast.backends.registered.linear_cross_entropy import LinearCrossEntropy
from llmfast.backends.registered.rms_norm import AddRmsNorm, RmsNorm
from llmfast.backends.registered.rotary import Rotary

OPERATORS: tuple[type[Operator], ...] = (
    CausalAttention,
    LayerNorm,
    AddLayerNorm,
    RmsNorm,
    AddRmsNorm,
    Rotary,
    Gelu,
    Linear,
    GatedLinear,
    LinearCrossEntropy,
)

# operator -> its schema, those of the gradients included
SCHEMAS = {
    name: schema
    for operator in OPERATORS
    for name, schema in (
        (operator.name, operator.schema),
        (f"{operator.name}_backward", operator.backward_schema),
    )
}


def contract_functions(namespace: str) -> dict[str, Callable[..., Any]]:
    """The functions of the contract by name, over the operators of `namespace`; these need not be there yet."""
    operators = [operator(namespace) for operator in OPERATORS]
    return {name: getattr(operator, name) for operator in operators for name in operator.functions}


def register(namespace: str) -> None:
    """Gives the operators of `namespace`, already defined and implemented, their fake kernels and gradients."""
    for operator in OPERATORS:
        operator(namespace).register()
