// Products with a packed weight: out (M, N) = x (M, K) W^T, reading every weight once for all rows, and giving each row
// the same bits whatever other rows go with it.
//
// A panel holds TILE_COLS rows of W (columns of the product) side by side, in units of four bytes along k:
//
//   f32   [k][TILE_COLS]        one float a unit
//   bf16  [k/2][TILE_COLS][2]   two neighbours along k
//   i8    [k/4][TILE_COLS][4]   four; then a float32 scale for each column
//   i4    for each group of 32 along k: [TILE_VECTORS][4][W][4] bytes, where the i-th vector of bytes has unit 2i in its
//         low nibbles and unit 2i+1 in its high ones; then a bfloat16 scale for each column
//
// Activations are brought into the same units a row at a time (`prepare_row`); for the integer formats they are rounded
// to 8 bits, with one scale a row (i8) or one for each group of 32 (i4):
//
//   sum over k of x w = sx sw (sum of qx u - zero * sum of qx),   u = q + zero unsigned, zero = 128 or 8
//
// so that the correction starts the sum and costs nothing more. Integer sums are exact; float sums run over blocks of
// BLOCK_UNITS from the first to the last, for one row as for many.

constexpr i64 GROUP = 32;
constexpr i64 BLOCK_UNITS = 256;
constexpr i64 ROW_ALIGN = 64;

LLMFAST_INLINE i64 units_of(Format format, i64 K) {
  switch (format) {
    case Format::f32: return K;
    case Format::bf16: return ceil_div(K, 2);
    case Format::i8: return ceil_div(K, 4);
    case Format::i4: return ceil_div(K, GROUP) * (GROUP / 4);
  }
  return 0;
}

constexpr i64 I4_GROUP_BYTES = TILE_COLS * GROUP / 2, I4_GROUP_STRIDE = I4_GROUP_BYTES + TILE_COLS * 2;

i64 panel_bytes(Format format, i64 K) {
  if (format == Format::i4) return round_up(ceil_div(K, GROUP) * I4_GROUP_STRIDE, 64);
  return round_up(units_of(format, K) * TILE_COLS * 4 + (format == Format::i8 ? TILE_COLS * 4 : 0), 64);
}

i64 packed_bytes(Format format, i64 N, i64 K) { return ceil_div(N, TILE_COLS) * panel_bytes(format, K); }

// ---- Packing ----

LLMFAST_INLINE float source_value(const WeightSource& s, i64 n, i64 k) {
  const i64 at = n * s.row + k * s.col;
  return s.type == WeightSource::Type::f32 ? static_cast<const float*>(s.values)[at]
                                           : to_float(static_cast<const bfloat16*>(s.values)[at]);
}
LLMFAST_INLINE uint8_t source_nibble(const WeightSource& s, i64 n, i64 k) {
  const uint8_t byte = static_cast<const uint8_t*>(s.values)[n * s.row + k / 2];
  return k % 2 ? byte >> 4 : byte & 15;
}

void pack_weight_panel(Format format, i64 N, i64 K, const WeightSource& s, i64 panel, uint8_t* to) {
  const i64 n0 = panel * TILE_COLS, columns = min_of<i64>(TILE_COLS, N - n0), units = units_of(format, K);
  memset(to, 0, size_t(panel_bytes(format, K)));
  switch (format) {
    case Format::f32:
    case Format::bf16:
      // Blocks of k, so that a source whose neighbours lie along n (a transposed one) is read in its own order too.
      for (i64 k0 = 0; k0 < K; k0 += 64)
        for (i64 c = 0; c < columns; c++)
          for (i64 k = k0; k < min_of(K, k0 + 64); k++) {
            const float value = source_value(s, n0 + c, k);
            if (format == Format::f32)
              reinterpret_cast<float*>(to)[k * TILE_COLS + c] = value;
            else
              from_float(value, reinterpret_cast<bfloat16*>(to) + (k / 2 * TILE_COLS + c) * 2 + k % 2);
          }
      break;
    case Format::i8: {
      const int8_t* values = static_cast<const int8_t*>(s.values);
      for (i64 u = 0; u < units; u++)
        for (i64 c = 0; c < TILE_COLS; c++)
          for (i64 i = 0; i < 4; i++) {
            const i64 k = 4 * u + i;
            const int q = c < columns && k < K ? values[(n0 + c) * s.row + k * s.col] : 0;
            to[(u * TILE_COLS + c) * 4 + i] = uint8_t(q + 128);
          }
      float* scales = reinterpret_cast<float*>(to + units * TILE_COLS * 4);
      for (i64 c = 0; c < columns; c++) scales[c] = static_cast<const float*>(s.scale)[n0 + c];
      break;
    }
    case Format::i4: {
      const i64 groups = ceil_div(K, GROUP);
      for (i64 g = 0; g < groups; g++) {
        uint8_t* group = to + g * I4_GROUP_STRIDE;
        bfloat16* scales = reinterpret_cast<bfloat16*>(group + I4_GROUP_BYTES);
        for (i64 c = 0; c < TILE_COLS; c++) {
          for (i64 i = 0; i < 4; i++)
            for (i64 j = 0; j < 4; j++) {
              const i64 k = g * GROUP + 8 * i + j;
              const uint8_t low = c < columns ? source_nibble(s, n0 + c, k) : 8;
              const uint8_t high = c < columns ? source_nibble(s, n0 + c, k + 4) : 8;
              group[((c / W * 4 + i) * W + c % W) * 4 + j] = uint8_t(low | high << 4);
            }
          if (c < columns) scales[c] = static_cast<const bfloat16*>(s.scale)[(n0 + c) * groups + g];
        }
      }
      break;
    }
  }
}

void pack_weight(const PackedMatrix& m, const WeightSource& source, const Threads& threads) {
  for_each_task(threads, ceil_div(m.N, TILE_COLS), [&](i64 panel) {
    pack_weight_panel(m.format, m.N, m.K, source, panel, m.panels + panel * panel_bytes(m.format, m.K));
  });
}

// Row n of the weight in float32: a token's embedding.
void unpack_row(const PackedMatrix& m, i64 n, float* out) {
  const uint8_t* panel = m.panels + n / TILE_COLS * panel_bytes(m.format, m.K);
  const i64 c = n % TILE_COLS;
  switch (m.format) {
    case Format::f32:
      for (i64 k = 0; k < m.K; k++) out[k] = reinterpret_cast<const float*>(panel)[k * TILE_COLS + c];
      break;
    case Format::bf16:
      for (i64 k = 0; k < m.K; k++)
        out[k] = to_float(reinterpret_cast<const bfloat16*>(panel)[(k / 2 * TILE_COLS + c) * 2 + k % 2]);
      break;
    case Format::i8: {
      const float scale = reinterpret_cast<const float*>(panel + units_of(m.format, m.K) * TILE_COLS * 4)[c];
      for (i64 k = 0; k < m.K; k++) out[k] = float(panel[(k / 4 * TILE_COLS + c) * 4 + k % 4] - 128) * scale;
      break;
    }
    case Format::i4:
      for (i64 k = 0; k < m.K; k++) {
        const uint8_t* group = panel + k / GROUP * I4_GROUP_STRIDE;
        const i64 i = k % GROUP / 8;
        const uint8_t byte = group[((c / W * 4 + i) * W + c % W) * 4 + k % 4];
        const float scale = to_float(reinterpret_cast<const bfloat16*>(group + I4_GROUP_BYTES)[c]);
        out[k] = float((k % 8 < 4 ? byte & 15 : byte >> 4) - 8) * scale;
      }
      break;
  }
}

// ---- Activations ----

// A prepared row: the units of k, then (integer formats) the float scales, then the int32 corrections, -zero * sum of q.
LLMFAST_INLINE i64 scales_of(Format format, i64 K) {
  return format == Format::i8 ? 1 : format == Format::i4 ? ceil_div(K, GROUP) : 0;
}
i64 row_bytes(Format format, i64 K) {
  return round_up(round_up(units_of(format, K) * 4, ROW_ALIGN) + scales_of(format, K) * 8, ROW_ALIGN);
}
LLMFAST_INLINE i64 scale_offset(Format format, i64 K) { return round_up(units_of(format, K) * 4, ROW_ALIGN); }

void prepare_row(Format format, const float* x, i64 K, uint8_t* to) {
  float* scales = reinterpret_cast<float*>(to + scale_offset(format, K));
  int32_t* corrections = reinterpret_cast<int32_t*>(scales + scales_of(format, K));
  switch (format) {
    case Format::f32:
      memcpy(to, x, size_t(K) * 4);
      break;
    case Format::bf16: {
      bfloat16* row = reinterpret_cast<bfloat16*>(to);
      if (K % 2) row[K].bits = 0;
      for (i64 k = 0; k < K; k += W) store_upto(row + k, load_upto(x + k, min_of<i64>(W, K - k)), K - k);
      break;
    }
    case Format::i8: {
      int8_t* row = reinterpret_cast<int8_t*>(to);
      for (i64 k = K; k < round_up(K, 4); k++) row[k] = 0;
      int32_t sum;
      quantise(x, K, row, scales, &sum);
      *corrections = -128 * sum;
      break;
    }
    case Format::i4: {
      int8_t* row = reinterpret_cast<int8_t*>(to);
      for (i64 k = K; k < round_up(K, GROUP); k++) row[k] = 0;
      for (i64 g = 0; g * GROUP < K; g++) {
        int32_t sum;
        quantise(x + g * GROUP, min_of(GROUP, K - g * GROUP), row + g * GROUP, scales + g, &sum);
        corrections[g] = -8 * sum;
      }
      break;
    }
  }
}

// ---- The products ----

// sum[i] + the four products of unsigned bytes of w with signed bytes of a.
LLMFAST_INLINE vi dot4(vi sum, vi w, vi a) {
#if LLMFAST_INT8_DOT
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)a);
#elif LLMFAST_VECTOR_WIDTH == 16
  const __m512i even = _mm512_set1_epi16(0xff);
  const __m512i low = _mm512_madd_epi16(_mm512_and_si512((__m512i)w, even), _mm512_srai_epi16(_mm512_slli_epi16((__m512i)a, 8), 8));
  const __m512i high = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), _mm512_srai_epi16((__m512i)a, 8));
  return sum + (vi)low + (vi)high;
#elif LLMFAST_VECTOR_WIDTH == 8
  const __m256i even = _mm256_set1_epi16(0xff);
  const __m256i low = _mm256_madd_epi16(_mm256_and_si256((__m256i)w, even), _mm256_srai_epi16(_mm256_slli_epi16((__m256i)a, 8), 8));
  const __m256i high = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), _mm256_srai_epi16((__m256i)a, 8));
  return sum + (vi)low + (vi)high;
#else
  const vu u = (vu)w;
  return sum + (vi)(u & 255) * (a << 24 >> 24) + (vi)(u >> 8 & 255) * (a << 16 >> 24) + (vi)(u >> 16 & 255) * (a << 8 >> 24) +
         (vi)(u >> 24) * (a >> 24);
#endif
}

// What the products of a format are summed in.
template <Format F>
struct SumOf {
  using type = vf;
};
template <>
struct SumOf<Format::i8> {
  using type = vi;
};

// One unit of k: a is a broadcast unit of activations, w a vector of units of weights.
template <Format F>
LLMFAST_INLINE vf dot_unit(vf sum, vf a, vf w) {
  if (F == Format::f32) return sum + a * w;
#if LLMFAST_BF16_DOT
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
#else
  return sum + (vf)((vu)a << 16) * (vf)((vu)w << 16) + (vf)((vu)a & 0xffff0000u) * (vf)((vu)w & 0xffff0000u);
#endif
}
template <Format F>
LLMFAST_INLINE vi dot_unit(vi sum, vf a, vf w) {
  return dot4(sum, (vi)w, (vi)a);
}
LLMFAST_INLINE void store_sum(float* at, vf sum, bool accumulate) { store(at, accumulate ? load(at) + sum : sum); }
LLMFAST_INLINE void store_sum(float* at, vi sum, bool accumulate) {
  store(at, (vf)(accumulate ? (vi)load(at) + sum : sum));
}

// c (ROWS, TILE_COLS) (+)= the products of ROWS rows with `units` units of a panel.
template <Format F, int ROWS>
__attribute__((noinline)) void packed_tile(i64 units, const uint8_t* rows, i64 row_stride, const uint8_t* panel, float* c,
                                           bool accumulate) {
  constexpr int V = TILE_VECTORS;
  using Sum = typename SumOf<F>::type;
  Sum sum[ROWS][V];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = Sum{};
  for (i64 u = 0; u < units; u++) {
    const float* column = reinterpret_cast<const float*>(panel) + u * TILE_COLS;
    vf w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) w[v] = load(column + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vf a = splat_bits(reinterpret_cast<const float*>(rows + r * row_stride) + u);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = dot_unit<F>(sum[r][v], a, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store_sum(c + r * TILE_COLS + v * W, sum[r][v], accumulate);
}

template <Format F>
void panel_product_as(i64 M, i64 K, const uint8_t* rows, i64 stride, const uint8_t* panel, float* out) {
  using Tile = void (*)(i64, const uint8_t*, i64, const uint8_t*, float*, bool);
  static constexpr Tile tiles[] = {packed_tile<F, 1>, packed_tile<F, 2>, packed_tile<F, 3>,
                                   packed_tile<F, 4>, packed_tile<F, 5>, packed_tile<F, 6>};
  static_assert(TILE_ROWS <= 6, "the table above");
  const i64 units = units_of(F, K);
  for (i64 u0 = 0; u0 < units; u0 += BLOCK_UNITS)
    for (i64 r = 0; r < M; r += TILE_ROWS)
      tiles[min_of<i64>(TILE_ROWS, M - r) - 1](min_of(BLOCK_UNITS, units - u0), rows + r * stride + u0 * 4, stride,
                                               panel + u0 * TILE_COLS * 4, out + r * TILE_COLS, u0 > 0);
  if (F != Format::i8) return;
  const float* scales = reinterpret_cast<const float*>(panel + units * TILE_COLS * 4);
  for (i64 r = 0; r < M; r++) {
    const uint8_t* row = rows + r * stride + scale_offset(F, K);
    const float scale = *reinterpret_cast<const float*>(row);
    const int32_t correction = *reinterpret_cast<const int32_t*>(row + 4);
    for (int v = 0; v < TILE_VECTORS; v++) {
      float* at = out + r * TILE_COLS + v * W;
      store(at, __builtin_convertvector((vi)load(at) + correction, vf) * (load(scales + v * W) * scale));
    }
  }
}

// ROWS rows with one panel of nibbles: integer sums over a group, scaled and added up in float32.
template <int ROWS>
__attribute__((noinline)) void nibble_tile(i64 groups, const uint8_t* rows, i64 stride, i64 scales_at, const uint8_t* panel,
                                           float* out) {
  vf sum[ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = zeros();
  for (i64 g = 0; g < groups; g++) {
    const uint8_t* group = panel + g * I4_GROUP_STRIDE;
    const bfloat16* scales = reinterpret_cast<const bfloat16*>(group + I4_GROUP_BYTES);
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; v++) {
      vi low[4], high[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const vu bytes = (vu)load(reinterpret_cast<const float*>(group) + (v * 4 + i) * W);
        low[i] = (vi)(bytes & 0x0f0f0f0fu);
        high[i] = (vi)(bytes >> 4 & 0x0f0f0f0fu);
      }
      const vf scale = load(scales + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const float* row = reinterpret_cast<const float*>(rows + r * stride) + g * (GROUP / 4);
        const float* row_scales = reinterpret_cast<const float*>(rows + r * stride + scales_at);
        vi even = (vi)splat_bits(row_scales + groups + g), odd = vi{};  // the correction starts the sum
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          even = dot4(even, low[i], (vi)splat_bits(row + 2 * i));
          odd = dot4(odd, high[i], (vi)splat_bits(row + 2 * i + 1));
        }
        sum[r][v] += __builtin_convertvector(even + odd, vf) * (scale * row_scales[g]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; v++) store(out + r * TILE_COLS + v * W, sum[r][v]);
}

inline void nibble_product(i64 M, i64 K, const uint8_t* rows, i64 stride, const uint8_t* panel, float* out) {
  const i64 groups = ceil_div(K, GROUP), scales_at = scale_offset(Format::i4, K);
  i64 r = 0;
  for (; r + 4 <= M; r += 4) nibble_tile<4>(groups, rows + r * stride, stride, scales_at, panel, out + r * TILE_COLS);
  for (; r + 2 <= M; r += 2) nibble_tile<2>(groups, rows + r * stride, stride, scales_at, panel, out + r * TILE_COLS);
  if (r < M) nibble_tile<1>(groups, rows + r * stride, stride, scales_at, panel, out + r * TILE_COLS);
}

// out (M, TILE_COLS) = M prepared rows times one panel.
LLMFAST_INLINE void panel_product(const PackedMatrix& m, i64 panel, i64 M, const uint8_t* rows, float* out) {
  const uint8_t* data = m.panels + panel * panel_bytes(m.format, m.K);
  const i64 stride = row_bytes(m.format, m.K);
  switch (m.format) {
    case Format::f32: return panel_product_as<Format::f32>(M, m.K, rows, stride, data, out);
    case Format::bf16: return panel_product_as<Format::bf16>(M, m.K, rows, stride, data, out);
    case Format::i8: return panel_product_as<Format::i8>(M, m.K, rows, stride, data, out);
    case Format::i4: return nibble_product(M, m.K, rows, stride, data, out);
  }
}
