// Rows of floats in 8 bits: what an integer product multiplies, and how an 8-bit cache keeps keys and values.

// Rounds n floats to 8 bits by their largest magnitude; gives the scale and the sum of the integers. Where a float is
// NaN or infinite so is the scale, and what is computed with it.
LLMFAST_INLINE void quantise(const float* x, i64 n, int8_t* to, float* scale, int32_t* sum) {
  vi high{};  // magnitudes as integers, which are in the same order, with NaN above all
  i64 i = 0;
  for (; i + W <= n; i += W) {
    const vi magnitude = (vi)load(x + i) & 0x7fffffff;
    high = magnitude > high ? magnitude : high;
  }
  int32_t highest = max_lanes(high);
  for (; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    highest = max_of(highest, bits & 0x7fffffff);
  }
  float top;
  memcpy(&top, &highest, 4);
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  vi total{};
  for (i = 0; i + W <= n; i += W) {
    const vi q = (vi)(load(x + i) * inverse + kRound) - 0x4b400000;
    total += q;
#if LLMFAST_VECTOR_WIDTH == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)q));
#else
    for (int j = 0; j < W; j++) to[i + j] = int8_t(q[j]);
#endif
  }
  int32_t all = sum_lanes(total);
  for (; i < n; i++) {
    const float shifted = x[i] * inverse + kRound;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    const int32_t q = bits - 0x4b400000;
    to[i] = int8_t(q);
    all += q;
  }
  *scale = top / 127.0f;
  *sum = all;
}

// A cached row: D integers, then their scale.
LLMFAST_INLINE void store_cache_row(const float* x, i64 D, int8_t* to) {
  float scale;
  int32_t sum;
  quantise(x, D, to, &scale, &sum);
  memcpy(to + D, &scale, 4);
}

// copy_rows of matmul.inl for cached rows; `row` counts bytes, the scale's included.
inline void copy_rows(const int8_t* src, i64 row, i64 rows, i64 columns, float* dst, i64 dst_row) {
  for (i64 i = 0; i < rows; i++) {
    const int8_t* from = src + i * row;
    float scale;
    memcpy(&scale, from + columns, 4);
    for (i64 j = 0; j < columns; j++) dst[i * dst_row + j] = float(from[j]) * scale;
  }
}
