"""Writes gelu_table.inl: GELU's factor and derivative as sixteen polynomials each.

    python csrc/ops/gelu_table.py > csrc/ops/gelu_table.inl

Segment i covers [(i - 0.5) WIDTH, (i + 0.5) WIDTH) and is a polynomial in x - i WIDTH, a truncated Chebyshev series.
"""

import math

from numpy.polynomial import Chebyshev, Polynomial

WIDTH = 0.8125  # a few bits only, so that i WIDTH is exact; sixteen reach from -6.9 to 6.1
SEGMENTS = [*range(8), *range(-8, 0)]  # in the order of i's low four bits


def normal_cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def tanh_cdf(x):
    return 1 / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def erf_slope(x):
    return normal_cdf(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tanh_slope(x):
    s = tanh_cdf(x)
    return s + x * s * tanh_cdf(-x) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def segment(f, i, degree):
    """Coefficients of the polynomial in u = x - i WIDTH, constant term first."""
    series = Chebyshev.interpolate(lambda us: [f(i * WIDTH + u) for u in us], 3 * degree, [-WIDTH / 2, WIDTH / 2])
    return series.truncate(degree + 1).convert(kind=Polynomial).coef


def table(name, comment, f, degree):
    columns = [segment(f, i, degree) for i in SEGMENTS]
    lines = [f"// {comment}", f"constexpr float {name}[{degree + 1}][16] = {{"]
    for power in range(degree + 1):
        numbers = [f"{float(column[power]):.8e}f" for column in columns]
        rows = [", ".join(numbers[j : j + 4]) for j in range(0, 16, 4)]
        lines.append("    {" + ",\n     ".join(rows) + "},")
    return "\n".join([*lines, "};"])


print("// Written by gelu_table.py. Row p holds the coefficients of u^p, one a segment.\n")
print(f"constexpr float GELU_SEGMENT = {WIDTH}f;\n")
print(table("GELU_ERF_VALUE", "(1 + erf(x / sqrt 2)) / 2", normal_cdf, 6), end="\n\n")
print(table("GELU_ERF_SLOPE", "the derivative of x (1 + erf(x / sqrt 2)) / 2", erf_slope, 7), end="\n\n")
print(table("GELU_TANH_VALUE", "sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))", tanh_cdf, 6), end="\n\n")
print(table("GELU_TANH_SLOPE", "the derivative of x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))", tanh_slope, 7))
