"""The activations, as functions of a float32 tile, and their derivatives: what epilogues apply.

    "gelu":       x * Phi(x),  Phi(x) = (1 + erf(x / sqrt 2)) / 2             (Hendrycks and Gimpel, arXiv:1606.08415)
    "gelu_tanh":  x * (1 + tanh u) / 2,  u = sqrt(2 / pi) * (x + 0.044715 x^3)                             (GPT-2's)
    "silu":       x * sigmoid(x)                                              (Elfwing et al., arXiv:1702.03118)

(1 + tanh u) / 2 is the sigmoid of 2u, and 1 / (1 + exp(-2u)) cancels nowhere: an exponential that overflows gives 0,
one that underflows 1. The derivatives, with s the sigmoid of 2u or of x and phi the normal density:

    "gelu":       Phi(x) + x * phi(x)
    "gelu_tanh":  s + x * s * (1 - s) * 2 u',  u' = sqrt(2 / pi) * (1 + 3 * 0.044715 x^2)
    "silu":       s + x * s * (1 - s)

1 - s is exp(-2u) * s, or exp(-x) * s, which cancels nowhere either.
"""

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
_CUBIC = tl.constexpr(0.044715)
_THREE_CUBIC = tl.constexpr(0.134145)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """activation(x) of a float32 tile; "" leaves it as it is."""
    if ACTIVATION == "gelu_tanh":
        twice_u = x * _TWO_SQRT_2_OVER_PI * (1.0 + x * x * _CUBIC)
        x = x / (1.0 + tl.exp2(twice_u * _MINUS_LOG2_E))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp2(x * _MINUS_LOG2_E))
    return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """d activation(x) / dx of a float32 tile."""
    if ACTIVATION == "gelu":
        cumulative = 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF))
        density = tl.exp2(x * x * _MINUS_HALF_LOG2_E) * _INVERSE_SQRT_2_PI
        return cumulative + x * density
    elif ACTIVATION == "gelu_tanh":
        # Beyond +-10 the derivative is 1 or 0 in float32, and inside nothing overflows. (where, not minimum: a NaN
        # stays one.)
        x = tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))
        twice_u = x * _TWO_SQRT_2_OVER_PI * (1.0 + x * x * _CUBIC)
        exponential = tl.exp2(twice_u * _MINUS_LOG2_E)
        sigmoid = 1.0 / (1.0 + exponential)
        twice_u_derivative = (1.0 + x * x * _THREE_CUBIC) * _TWO_SQRT_2_OVER_PI
        return sigmoid + x * sigmoid * (exponential * sigmoid) * twice_u_derivative
    else:
        x = tl.where(x > 80.0, 80.0, tl.where(x < -80.0, -80.0, x))  # as above
        exponential = tl.exp2(x * _MINUS_LOG2_E)
        sigmoid = 1.0 / (1.0 + exponential)
        return sigmoid + x * sigmoid * (exponential * sigmoid)


# ------------------------------------------------------------------------------------------------------------ launching


def check_activation(op: str, activation: str) -> None:
    if activation and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, not {activation!r}")
