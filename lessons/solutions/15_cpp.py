"""Lesson 15, C++: solutions."""

exercise_1 = r"""
#include "vectors.h"
EXPORT relu(const float* x, float* y, long n) {
  long i = 0;
  for (; i + W <= n; i += W) {
    const vec v = *(const vec*)(x + i);
    *(vec*)(y + i) = v > 0.0f ? v : vec{};
  }
  for (; i < n; i++) y[i] = x[i] > 0 ? x[i] : 0;
}
"""

exercise_2 = r"""
#include "vectors.h"
EXPORT row_sums(const float* x, float* y, long rows, long columns) {
  for (long r = 0; r < rows; r++) {
    double sum = 0;
    for (long c = 0; c < columns; c++) sum += x[r * columns + c];
    y[r] = sum;
  }
}
"""


def exercise_3(rows):
    """A vector of the weights is loaded once and used in every row of the tile. Step 2 is a tile of one row."""
    return 1 / rows
