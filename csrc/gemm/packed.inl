// Products with a packed weight: out (M, N) = x (M, K) W^T, reading every weight once for all rows, and giving each row
// the same bits whatever other rows go with it.
//
// A panel holds TILE_COLS rows of W (columns of the product) side by side. How it holds them is a format, one struct:
//
//   panel_bytes(K)                 how long a panel is
//   accepts(format)                which weights, as they come from a file, can be packed in it
//   pack(source, rows, K, panel)   column c of the panel becomes row rows[c] of the source, or stays where rows[c] < 0
//   unpack(panel, c, K, out)       column c in float32
//   row_bytes(K)                   how long a row of activations is, prepared for this format
//   prepare(x, K, row)             rounds a row of activations as the format's products read it
//   subtract(row, K, x)            takes what a prepared row stands for off x; null where one rounding is exact enough
//   product(M, K, rows, panel, out)  out (M, TILE_COLS) = M prepared rows times the panel
//
// `FORMATS` lists them in the order of `enum class Format`; everything outside this file goes through it.
//
// Panels and prepared rows count k in units of four bytes:
//
//   f32   [k][TILE_COLS]        one float a unit
//   bf16  [k/2][TILE_COLS][2]   two neighbours along k
//   i8    [k/4][TILE_COLS][4]   four; then a float32 scale for each column
//   i4, q8_0, q4_1, q4_k  by columns of W, in each by groups of 32 along k: [8][W][4] bytes, or of nibbles [4][W][4], where
//         the i-th vector of bytes has unit 2i in its low nibbles and unit 2i+1 in its high ones; scales before them
//
// For the integer formats activations are rounded to 8 bits, with one scale a row (i8) or one for each group of 32:
//
//   sum over k of x w = sx sw (sum of qx u - zero * sum of qx)          u = q + zero unsigned, zero = 128 or 8
//   sum over k of x w = sx sw (sum of qx u) + sx minimum (sum of qx)    where a format has a minimum
//
// so that zero starts the sum, or the minimum costs one more for a group. Integer sums are exact; float sums run from the
// first block or group to the last, for one row as for many. Memory for panels is zero before the first `pack`.

constexpr i64 GROUP = 32;
constexpr i64 BLOCK_UNITS = 256;
constexpr i64 ALIGN = 64;

// For a few rows the panels come from memory as they are read, which is faster where they are asked for before: the
// processor's own guesses end with every page. For many rows they lie in a cache, and asking costs about 5 %.
constexpr i64 AHEAD = 4096;
constexpr int FEW_ENOUGH_TO_PREFETCH = 4;

// ---- A product whose sums run over all of k: float32, bfloat16 and bytes ----

LLMFAST_INLINE void store_sum(float* at, vf sum, bool accumulate) { store(at, accumulate ? load(at) + sum : sum); }
LLMFAST_INLINE void store_sum(float* at, vi sum, bool accumulate) { store(at, (vf)(accumulate ? (vi)load(at) + sum : sum)); }

// c (ROWS, TILE_COLS) (+)= the products of ROWS rows with `units` units of a panel.
template <class F, int ROWS>
__attribute__((noinline)) void packed_tile(i64 units, const uint8_t* rows, i64 row_stride, const uint8_t* panel, float* c,
                                           bool accumulate) {
  constexpr int V = TILE_VECTORS;
  typename F::Sum sum[ROWS][V];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = typename F::Sum{};
  for (i64 u = 0; u < units; u++) {
    const float* column = reinterpret_cast<const float*>(panel) + u * TILE_COLS;
    vf w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) w[v] = load(column + v * W);
    if (ROWS <= FEW_ENOUGH_TO_PREFETCH)
      for (int v = 0; v < TILE_COLS * 4; v += 64) prefetch(panel + u * TILE_COLS * 4 + v + AHEAD);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vf a = splat_bits(reinterpret_cast<const float*>(rows + r * row_stride) + u);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = F::add(sum[r][v], a, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store_sum(c + r * TILE_COLS + v * W, sum[r][v], accumulate);
}

// out (M, TILE_COLS) (+)= the products of M rows with `units` units of a panel, at most BLOCK_UNITS.
template <class F>
void product_block(i64 M, i64 units, const uint8_t* rows, i64 stride, const uint8_t* panel, float* out, bool accumulate) {
  using Tile = void (*)(i64, const uint8_t*, i64, const uint8_t*, float*, bool);
  static constexpr Tile tiles[] = {packed_tile<F, 1>, packed_tile<F, 2>, packed_tile<F, 3>,
                                   packed_tile<F, 4>, packed_tile<F, 5>, packed_tile<F, 6>};
  static_assert(TILE_ROWS <= 6, "the table above");
  for (i64 r = 0; r < M; r += TILE_ROWS)
    tiles[min_of<i64>(TILE_ROWS, M - r) - 1](units, rows + r * stride, stride, panel, out + r * TILE_COLS, accumulate);
}

template <class F>
void product_by_units(i64 M, i64 units, const uint8_t* rows, i64 stride, const uint8_t* panel, float* out) {
  for (i64 u0 = 0; u0 < units; u0 += BLOCK_UNITS)
    product_block<F>(M, min_of(BLOCK_UNITS, units - u0), rows + u0 * 4, stride, panel + u0 * TILE_COLS * 4, out, u0 > 0);
}

#if LLMFAST_TILE_REGISTERS
// The same on the tile registers, but for the last units that do not fill one.
template <class F, class Product>
void product_by_tiles(i64 M, i64 units, const uint8_t* rows, i64 stride, const uint8_t* panel, float* out) {
  constexpr i64 ROW_BYTES = TILE_COLS * 4;
  const i64 steps = units / TILE_UNITS, done = steps * TILE_UNITS;
  if (M <= FEW_ENOUGH_TO_PREFETCH)
    multiply_tiles<Product, AHEAD>(M, TILE_VECTORS, steps, rows, stride, panel, ROW_BYTES, out, TILE_COLS, false);
  else
    multiply_tiles<Product>(M, TILE_VECTORS, steps, rows, stride, panel, ROW_BYTES, out, TILE_COLS, false);
  if (done < units) product_block<F>(M, units - done, rows + done * 4, stride, panel + done * ROW_BYTES, out, true);
}
#endif

// ---- Floats ----

LLMFAST_INLINE float source_value(const WeightSource& s, i64 n, i64 k) {
  const i64 at = n * s.row + k * s.col;
  return s.format == Format::f32 ? static_cast<const float*>(s.values)[at]
                                 : to_float(static_cast<const bfloat16*>(s.values)[at]);
}

// put(k, c, value) for every element. Blocks of k, so that a source whose neighbours lie along n (a transposed one) is
// read in its own order too.
template <class Put>
LLMFAST_INLINE void pack_floats(const WeightSource& s, const i64* rows, i64 K, const Put& put) {
  for (i64 k0 = 0; k0 < K; k0 += 64)
    for (i64 c = 0; c < TILE_COLS; c++) {
      if (rows[c] < 0) continue;
      for (i64 k = k0; k < min_of(K, k0 + 64); k++) put(k, c, source_value(s, rows[c], k));
    }
}

struct PackedF32 {
  using Sum = vf;
  static constexpr void (*subtract)(const uint8_t*, i64, float*) = nullptr;
  static bool accepts(Format format) { return format == Format::f32 || format == Format::bf16; }
  static i64 panel_bytes(i64 K) { return round_up(K * TILE_COLS * 4, ALIGN); }
  static void pack(const WeightSource& s, const i64* rows, i64 K, uint8_t* panel) {
    pack_floats(s, rows, K, [&](i64 k, i64 c, float value) { reinterpret_cast<float*>(panel)[k * TILE_COLS + c] = value; });
  }
  static void unpack(const uint8_t* panel, i64 c, i64 K, float* out) {
    for (i64 k = 0; k < K; k++) out[k] = reinterpret_cast<const float*>(panel)[k * TILE_COLS + c];
  }
  static i64 row_bytes(i64 K) { return round_up(K * 4, ALIGN); }
  static void prepare(const float* x, i64 K, uint8_t* row) { memcpy(row, x, size_t(K) * 4); }
  static LLMFAST_INLINE vf add(vf sum, vf a, vf w) { return sum + a * w; }
  static void product(i64 M, i64 K, const uint8_t* rows, const uint8_t* panel, float* out) {
    product_by_units<PackedF32>(M, K, rows, row_bytes(K), panel, out);
  }
};

struct PackedBF16 {
  using Sum = vf;
  static constexpr void (*subtract)(const uint8_t*, i64, float*) = nullptr;
  static i64 units(i64 K) { return ceil_div(K, 2); }
  static bool accepts(Format format) { return PackedF32::accepts(format); }
  static i64 panel_bytes(i64 K) { return round_up(units(K) * TILE_COLS * 4, ALIGN); }
  static bfloat16* element(uint8_t* panel, i64 k, i64 c) {
    return reinterpret_cast<bfloat16*>(panel) + (k / 2 * TILE_COLS + c) * 2 + k % 2;
  }
  static void pack(const WeightSource& s, const i64* rows, i64 K, uint8_t* panel) {
    pack_floats(s, rows, K, [&](i64 k, i64 c, float value) { from_float(value, element(panel, k, c)); });
  }
  static void unpack(const uint8_t* panel, i64 c, i64 K, float* out) {
    for (i64 k = 0; k < K; k++) out[k] = to_float(*element(const_cast<uint8_t*>(panel), k, c));
  }
  static i64 row_bytes(i64 K) { return round_up(units(K) * 4, ALIGN); }
  static void prepare(const float* x, i64 K, uint8_t* to) {
    bfloat16* row = reinterpret_cast<bfloat16*>(to);
    if (K % 2) row[K].bits = 0;
    for (i64 k = 0; k < K; k += W) store_upto(row + k, load_upto(x + k, min_of<i64>(W, K - k)), K - k);
  }
  static LLMFAST_INLINE vf add(vf sum, vf a, vf w) {
#if LLMFAST_BF16_DOT
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
#else
    return sum + (vf)((vu)a << 16) * (vf)((vu)w << 16) + (vf)((vu)a & 0xffff0000u) * (vf)((vu)w & 0xffff0000u);
#endif
  }
  static void product(i64 M, i64 K, const uint8_t* rows, const uint8_t* panel, float* out) {
#if LLMFAST_TILE_REGISTERS
    product_by_tiles<PackedBF16, BF16Tiles>(M, units(K), rows, row_bytes(K), panel, out);
#else
    product_by_units<PackedBF16>(M, units(K), rows, row_bytes(K), panel, out);
#endif
  }
};

// ---- Integers ----

// sum[i] + the four products of unsigned bytes of w with signed bytes of a.
LLMFAST_INLINE vi dot4(vi sum, vi w, vi a) {
#if LLMFAST_INT8_DOT
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)a);
#elif LLMFAST_VECTOR_WIDTH == 16
  const __m512i even = _mm512_set1_epi16(0xff);
  const __m512i low =
      _mm512_madd_epi16(_mm512_and_si512((__m512i)w, even), _mm512_srai_epi16(_mm512_slli_epi16((__m512i)a, 8), 8));
  const __m512i high = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), _mm512_srai_epi16((__m512i)a, 8));
  return sum + (vi)low + (vi)high;
#elif LLMFAST_VECTOR_WIDTH == 8
  const __m256i even = _mm256_set1_epi16(0xff);
  const __m256i low =
      _mm256_madd_epi16(_mm256_and_si256((__m256i)w, even), _mm256_srai_epi16(_mm256_slli_epi16((__m256i)a, 8), 8));
  const __m256i high = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), _mm256_srai_epi16((__m256i)a, 8));
  return sum + (vi)low + (vi)high;
#else
  const vu u = (vu)w;
  return sum + (vi)(u & 255) * (a << 24 >> 24) + (vi)(u >> 8 & 255) * (a << 16 >> 24) +
         (vi)(u >> 16 & 255) * (a << 8 >> 24) + (vi)(u >> 24) * (a >> 24);
#endif
}

// A row of activations in 8 bits: whole groups of integers, zeros beyond K, then a float scale for each group, then an
// int32 correction for each, -ZERO times the sum of its integers.
template <int32_t ZERO>
struct ByteRow {
  const i64 group, groups, scales_at;
  ByteRow(i64 K, i64 group) : group(group), groups(ceil_div(K, group)), scales_at(round_up(groups * group, ALIGN)) {}
  i64 bytes() const { return round_up(scales_at + groups * 8, ALIGN); }
  const float* scales(const uint8_t* row) const { return reinterpret_cast<const float*>(row + scales_at); }
  const int32_t* corrections(const uint8_t* row) const { return reinterpret_cast<const int32_t*>(row + scales_at) + groups; }
  void prepare(const float* x, i64 K, uint8_t* row) const {
    int8_t* integers = reinterpret_cast<int8_t*>(row);
    float* scale = reinterpret_cast<float*>(row + scales_at);
    int32_t* correction = reinterpret_cast<int32_t*>(scale + groups);
    for (i64 k = K; k < groups * group; k++) integers[k] = 0;
    for (i64 g = 0; g < groups; g++) {
      int32_t sum;
      quantise(x + g * group, min_of(group, K - g * group), integers + g * group, scale + g, &sum);
      correction[g] = -ZERO * sum;
    }
  }
};

struct PackedI8 {
  using Sum = vi;
  using Row = ByteRow<128>;
  static i64 units(i64 K) { return ceil_div(K, 4); }
  static Row row(i64 K) { return Row(K, 4 * units(K)); }  // all of it one group
  static i64 scales_at(i64 K) { return units(K) * TILE_COLS * 4; }
  static bool accepts(Format format) { return format == Format::i8; }
  static i64 panel_bytes(i64 K) { return round_up(scales_at(K) + TILE_COLS * 4, ALIGN); }
  static void pack(const WeightSource& s, const i64* rows, i64 K, uint8_t* panel) {
    const int8_t* values = static_cast<const int8_t*>(s.values);
    float* scales = reinterpret_cast<float*>(panel + scales_at(K));
    for (i64 u = 0; u < units(K); u++)
      for (i64 c = 0; c < TILE_COLS; c++) {
        if (rows[c] < 0) continue;
        for (i64 k = 4 * u; k < min_of(K, 4 * u + 4); k++)
          panel[(u * TILE_COLS + c) * 4 + k % 4] = uint8_t(values[rows[c] * s.row + k * s.col] + 128);
      }
    for (i64 c = 0; c < TILE_COLS; c++)
      if (rows[c] >= 0) scales[c] = static_cast<const float*>(s.scale)[rows[c]];
  }
  static void unpack(const uint8_t* panel, i64 c, i64 K, float* out) {
    const float scale = reinterpret_cast<const float*>(panel + scales_at(K))[c];
    for (i64 k = 0; k < K; k++) out[k] = float(panel[(k / 4 * TILE_COLS + c) * 4 + k % 4] - 128) * scale;
  }
  static i64 row_bytes(i64 K) { return row(K).bytes(); }
  static void prepare(const float* x, i64 K, uint8_t* to) { row(K).prepare(x, K, to); }
  static void subtract(const uint8_t* from, i64 K, float* x) {
    const float scale = *row(K).scales(from);
    for (i64 k = 0; k < K; k++) x[k] -= float(reinterpret_cast<const int8_t*>(from)[k]) * scale;
  }
  static LLMFAST_INLINE vi add(vi sum, vf a, vf w) { return dot4(sum, (vi)w, (vi)a); }
  static void product(i64 M, i64 K, const uint8_t* rows, const uint8_t* panel, float* out) {
    const Row r = row(K);
    const i64 stride = r.bytes();
#if LLMFAST_TILE_REGISTERS
    if (M > FEW_ENOUGH_TO_PREFETCH)
      product_by_tiles<PackedI8, ByteTiles>(M, units(K), rows, stride, panel, out);
    else  // from memory, at which both arrive
#endif
      product_by_units<PackedI8>(M, units(K), rows, stride, panel, out);
    const float* scales = reinterpret_cast<const float*>(panel + scales_at(K));
    for (i64 i = 0; i < M; i++) {
      const float scale = *r.scales(rows + i * stride);
      const int32_t correction = *r.corrections(rows + i * stride);
      for (int v = 0; v < TILE_VECTORS; v++) {
        float* at = out + i * TILE_COLS + v * W;
        store(at, __builtin_convertvector((vi)load(at) + correction, vf) * (load(scales + v * W) * scale));
      }
    }
  }
};

// ---- Integers in groups of 32 ----

// A row of activations in 8 bits: whole groups of integers, zeros beyond K; then for each group its float scale, the scale
// times the sum of the integers, and the sum itself, negated.
struct GroupRow {
  const i64 groups;
  explicit GroupRow(i64 K) : groups(ceil_div(K, GROUP)) {}
  i64 numbers_at() const { return groups * GROUP; }
  i64 bytes() const { return round_up(numbers_at() + groups * 12, ALIGN); }
  void prepare(const float* x, i64 K, uint8_t* row) const {
    int8_t* integers = reinterpret_cast<int8_t*>(row);
    float* scale = reinterpret_cast<float*>(row + numbers_at());
    int32_t* negated = reinterpret_cast<int32_t*>(scale + 2 * groups);
    for (i64 k = K; k < groups * GROUP; k++) integers[k] = 0;
    for (i64 g = 0; g < groups; g++) {
      int32_t sum;
      quantise(x + g * GROUP, min_of(GROUP, K - g * GROUP), integers + g * GROUP, scale + g, &sum);
      scale[groups + g] = scale[g] * float(sum);
      negated[g] = -sum;
    }
  }
};

// Rows that one call of a tile takes: as many as leave the integers of a group in registers beside their sums.
constexpr int GROUP_ROWS = W == 16 ? 12 : 4;

// Columns of W side by side, each a run of blocks over k. A block is a head, which has the scales of its groups, then the
// integers of each. F says what is in the head:
//
//   BITS          of an integer
//   ZERO          w = scale (u - 2^ZERO); -1: w = scale u + minimum
//   BLOCK_GROUPS  groups that share a head
//   HEAD_BYTES    for one column
//   put(source, at, blocks_at, lane, i, head)  copies the scales of group i of the block
//   scales(head, i, scale, minimum)            of W columns in float32
template <class F>
struct PackedGroups {
  static constexpr i64 HEAD_BYTES = W * F::HEAD_BYTES, INTEGER_BYTES = W * GROUP * F::BITS / 8;
  static constexpr i64 BLOCK_BYTES = HEAD_BYTES + F::BLOCK_GROUPS * INTEGER_BYTES;
  static i64 column_bytes(i64 groups) {
    return ceil_div(groups, i64{F::BLOCK_GROUPS}) * HEAD_BYTES + groups * INTEGER_BYTES;
  }
  static i64 panel_bytes(i64 K) { return round_up(TILE_VECTORS * column_bytes(ceil_div(K, GROUP)), ALIGN); }
  static bool accepts(Format format) { return format == F::FORMAT; }

  static void pack(const WeightSource& s, const i64* rows, i64 K, uint8_t* panel) {
    const i64 groups = ceil_div(K, GROUP), row_bytes = F::BITS == 8 ? K : groups * GROUP / 2;
    for (i64 c = 0; c < TILE_COLS; c++) {
      if (rows[c] < 0) continue;
      const uint8_t* from = static_cast<const uint8_t*>(s.values) + rows[c] * row_bytes;
      uint8_t* column = panel + c / W * column_bytes(groups);
      for (i64 g = 0; g < groups; g++) {
        const i64 block = g / F::BLOCK_GROUPS, i = g % F::BLOCK_GROUPS;
        uint8_t* head = column + block * BLOCK_BYTES;
        F::put(s, rows[c] * groups + g, rows[c] * ceil_div(groups, i64{F::BLOCK_GROUPS}) + block, c % W, i, head);
        uint32_t* integers = reinterpret_cast<uint32_t*>(head + HEAD_BYTES + i * INTEGER_BYTES) + c % W;
        uint32_t words[GROUP / 4] = {};
        memcpy(words, from + g * GROUP * F::BITS / 8, size_t(F::BITS == 8 ? min_of(GROUP, K - g * GROUP) : GROUP / 2));
        for (i64 u = 0; u < F::BITS; u++)
          integers[u * W] = F::BITS == 8 ? words[u] ^ 0x80808080u : interleave_halves(words[u]);
      }
    }
  }
  // Nibbles n0 .. n7, lowest first, become n0 n4 n1 n5 n2 n6 n3 n7.
  static uint32_t interleave_halves(uint32_t x) {
    uint32_t t = (x ^ x >> 8) & 0x0000ff00u;
    x ^= t ^ t << 8;
    t = (x ^ x >> 4) & 0x00f000f0u;
    return x ^ t ^ t << 4;
  }
  static void unpack(const uint8_t* panel, i64 c, i64 K, float* out) {
    const uint8_t* column = panel + c / W * column_bytes(ceil_div(K, GROUP));
    for (i64 k = 0; k < K; k++) {
      const i64 g = k / GROUP, i = g % F::BLOCK_GROUPS, unit = k % GROUP / 4;
      const uint8_t* head = column + g / F::BLOCK_GROUPS * BLOCK_BYTES;
      vf scale, minimum;
      F::scales(head, i, scale, minimum);
      const uint8_t* integers = head + HEAD_BYTES + i * INTEGER_BYTES;
      const uint8_t byte = integers[((F::BITS == 8 ? unit : unit / 2) * W + c % W) * 4 + k % 4];
      const int integer = F::BITS == 8 ? byte : unit % 2 ? byte >> 4 : byte & 15;
      out[k] = F::ZERO < 0 ? float(integer) * scale[c % W] + minimum[c % W] : float(integer - (1 << F::ZERO)) * scale[c % W];
    }
  }
  static i64 row_bytes(i64 K) { return GroupRow(K).bytes(); }
  static void prepare(const float* x, i64 K, uint8_t* to) { GroupRow(K).prepare(x, K, to); }
  static void subtract(const uint8_t* from, i64 K, float* x) {
    const float* scales = reinterpret_cast<const float*>(from + GroupRow(K).numbers_at());
    for (i64 k = 0; k < K; k++) x[k] -= float(reinterpret_cast<const int8_t*>(from)[k]) * scales[k / GROUP];
  }

  // ROWS rows with W columns: exact integer sums over a group, scaled and added up in float32.
  template <int ROWS>
  static __attribute__((noinline)) void tile(i64 groups, const uint8_t* rows, i64 stride, const uint8_t* column,
                                             float* out) {
    constexpr int TOGETHER = ROWS % 6 ? ROWS : 6;  // whose chains of sums are taken in turns
    const auto row_of = [&](int r) { return reinterpret_cast<const float*>(rows + r * stride); };
    const auto numbers_of = [&](int r) { return row_of(r) + groups * (GROUP / 4); };
    vf sum[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sum[r] = zeros();
    const uint8_t* head = column;
    for (i64 g = 0; g < groups; head += BLOCK_BYTES)
      for (i64 i = 0; i < F::BLOCK_GROUPS && g < groups; i++, g++) {
        const uint8_t* integers = head + HEAD_BYTES + i * INTEGER_BYTES;
        if (ROWS < FEW_ENOUGH_TO_PREFETCH)
#pragma GCC unroll 16
          for (int b = 0; b < BLOCK_BYTES / F::BLOCK_GROUPS; b += 64) prefetch(integers + b + AHEAD);
        vi u[GROUP / 4];
#pragma GCC unroll 8
        for (int j = 0; j < F::BITS; j++) {
          const vi bytes = (vi)load(reinterpret_cast<const float*>(integers) + j * W);
          if (F::BITS == 8) {
            u[j] = bytes;
          } else {
            u[2 * j] = bytes & 0x0f0f0f0f;
            u[2 * j + 1] = (vi)((vu)bytes >> 4) & 0x0f0f0f0f;
          }
        }
        vf scale, minimum;
        F::scales(head, i, scale, minimum);
#pragma GCC unroll 16
        for (int r0 = 0; r0 < ROWS; r0 += TOGETHER) {
          vi dot[TOGETHER];
#pragma GCC unroll 8
          for (int r = 0; r < TOGETHER; r++)
            dot[r] = F::ZERO < 0 ? vi{} : (vi)((vu)splat_bits(numbers_of(r0 + r) + 2 * groups + g) << max_of(F::ZERO, 0));
#pragma GCC unroll 8
          for (int j = 0; j < GROUP / 4; j++)
#pragma GCC unroll 8
            for (int r = 0; r < TOGETHER; r++)
              dot[r] = dot4(dot[r], u[j], (vi)splat_bits(row_of(r0 + r) + g * (GROUP / 4) + j));
#pragma GCC unroll 8
          for (int r = 0; r < TOGETHER; r++) {
            const float* numbers = numbers_of(r0 + r) + g;
            if (F::ZERO < 0) sum[r0 + r] += minimum * numbers[groups];
            sum[r0 + r] += __builtin_convertvector(dot[r], vf) * (scale * numbers[0]);
          }
        }
      }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) store(out + r * TILE_COLS, sum[r]);
  }

#if LLMFAST_TILE_REGISTERS
  // 16 rows with W columns, whose integers `bytes` has as the registers want them: the same sums.
  static __attribute__((noinline)) void tile_of_16(i64 groups, const uint8_t* rows, i64 stride, const uint8_t* bytes,
                                                   const uint8_t* column, float* out) {
    alignas(ALIGN) int32_t dots[2][TILE_UNITS * W];
    const auto multiply = [&](i64 g) {
      tile_zero<0>();
      tile_load<4>(rows + g * GROUP, stride);
      tile_load<6>(bytes + g * GROUP * W, 4 * W);
      ByteTiles::add<0, 4, 6>();
      tile_store<0>(dots[g % 2], 4 * W);
    };
    multiply(0);
    vf sum[TILE_UNITS];
#pragma GCC unroll 16
    for (int r = 0; r < TILE_UNITS; r++) sum[r] = zeros();
    const uint8_t* head = column;
    for (i64 g = 0; g < groups; head += BLOCK_BYTES)
      for (i64 i = 0; i < F::BLOCK_GROUPS && g < groups; i++, g++) {
        if (g + 1 < groups) multiply(g + 1);  // on its way while this one's sums are scaled
        vf scale, minimum;
        F::scales(head, i, scale, minimum);
        const float* at = reinterpret_cast<const float*>(rows) + groups * (GROUP / 4) + g;
#pragma GCC unroll 16
        for (int r = 0; r < TILE_UNITS; r++) {
          const float* numbers = at + r * (stride / 4);
          vi dot = (vi)load(reinterpret_cast<const float*>(dots[g % 2]) + r * W);
          if (F::ZERO < 0)
            sum[r] += minimum * numbers[groups];
          else
            dot += (vi)((vu)splat_bits(numbers + 2 * groups) << max_of(F::ZERO, 0));
          sum[r] += __builtin_convertvector(dot, vf) * (scale * numbers[0]);
        }
      }
#pragma GCC unroll 16
    for (int r = 0; r < TILE_UNITS; r++) store(out + r * TILE_COLS, sum[r]);
  }
  // The integers of W columns as bytes: for each group [8][W][4].
  static void widen(i64 groups, const uint8_t* column, uint8_t* bytes) {
    for (i64 g = 0; g < groups; g++) {
      const float* integers = reinterpret_cast<const float*>(column + g / F::BLOCK_GROUPS * BLOCK_BYTES + HEAD_BYTES +
                                                             g % F::BLOCK_GROUPS * INTEGER_BYTES);
      float* to = reinterpret_cast<float*>(bytes) + g * (GROUP / 4) * W;
      for (i64 j = 0; j < F::BITS; j++) {
        const vu word = (vu)load(integers + j * W);
        if (F::BITS == 8) {
          store(to + j * W, (vf)word);
        } else {
          store(to + 2 * j * W, (vf)(word & 0x0f0f0f0fu));
          store(to + (2 * j + 1) * W, (vf)(word >> 4 & 0x0f0f0f0fu));
        }
      }
    }
  }
#endif

  static void product(i64 M, i64 K, const uint8_t* rows, const uint8_t* panel, float* out) {
    const GroupRow row(K);
    const i64 stride = row.bytes();
    i64 done = 0;
#if LLMFAST_TILE_REGISTERS
    if (done = M / TILE_UNITS * TILE_UNITS; done > 0) {
      Scratch memory(row.groups * GROUP * W / 4);
      uint8_t* bytes = reinterpret_cast<uint8_t*>(memory.data);
      shape_tiles(TILE_UNITS, 0, GROUP / 4);
      for (i64 v = 0; v < TILE_VECTORS; v++) {
        const uint8_t* column = panel + v * column_bytes(row.groups);
        widen(row.groups, column, bytes);
        for (i64 r = 0; r < done; r += TILE_UNITS)
          tile_of_16(row.groups, rows + r * stride, stride, bytes, column, out + r * TILE_COLS + v * W);
      }
      release_tiles();
    }
#endif
    for (i64 v = 0; v < TILE_VECTORS && done < M; v++) {
      const uint8_t* column = panel + v * column_bytes(row.groups);
      const auto tiles = [&](auto tile, i64 r) {
        tile(row.groups, rows + r * stride, stride, column, out + r * TILE_COLS + v * W);
      };
      i64 r = done;
      for (; r + GROUP_ROWS <= M; r += GROUP_ROWS) tiles(tile<GROUP_ROWS>, r);
      for (; r + 4 <= M; r += 4) tiles(tile<4>, r);
      for (; r + 2 <= M; r += 2) tiles(tile<2>, r);
      if (r < M) tiles(tile<1>, r);
    }
  }
};

// Of `Half` a scale for each group.
template <Format format, int bits, class Half>
struct ScaledGroups {
  static constexpr Format FORMAT = format;
  static constexpr int BITS = bits, ZERO = bits - 1, BLOCK_GROUPS = 2, HEAD_BYTES = 4;
  static void put(const WeightSource& s, i64 group, i64, i64 lane, i64 i, uint8_t* head) {
    reinterpret_cast<Half*>(head)[i * W + lane] = static_cast<const Half*>(s.scale)[group];
  }
  static LLMFAST_INLINE void scales(const uint8_t* head, i64 i, vf& scale, vf& minimum) {
    scale = load(reinterpret_cast<const Half*>(head) + i * W);
    minimum = zeros();
  }
};
using PackedI4 = PackedGroups<ScaledGroups<Format::i4, 4, bfloat16>>;
using PackedQ8_0 = PackedGroups<ScaledGroups<Format::q8_0, 8, float16>>;

// Four bits, a scale and a minimum for each group.
struct MinimumGroups {
  static constexpr Format FORMAT = Format::q4_1;
  static constexpr int BITS = 4, ZERO = -1, BLOCK_GROUPS = 1, HEAD_BYTES = 4;
  static void put(const WeightSource& s, i64 group, i64, i64 lane, i64, uint8_t* head) {
    float16* halves = reinterpret_cast<float16*>(head);
    halves[lane] = static_cast<const float16*>(s.scale)[group];
    halves[W + lane] = static_cast<const float16*>(s.minimum)[group];
  }
  static LLMFAST_INLINE void scales(const uint8_t* head, i64, vf& scale, vf& minimum) {
    scale = load(reinterpret_cast<const float16*>(head));
    minimum = load(reinterpret_cast<const float16*>(head) + W);
  }
};
using PackedQ4_1 = PackedGroups<MinimumGroups>;

// Four bits, and for each group codes of a byte for scale and minimum, in units that eight groups share.
struct CodedGroups {
  static constexpr Format FORMAT = Format::q4_k;
  static constexpr int BITS = 4, ZERO = -1, BLOCK_GROUPS = 8, HEAD_BYTES = 4 + 2 * BLOCK_GROUPS;
  static void put(const WeightSource& s, i64 group, i64 block, i64 lane, i64 i, uint8_t* head) {
    float16* halves = reinterpret_cast<float16*>(head);
    halves[lane] = static_cast<const float16*>(s.scale)[block];
    halves[W + lane] = static_cast<const float16*>(s.minimum)[block];
    uint8_t* codes = head + 4 * W + 2 * i * W;
    codes[lane] = s.scale_code[group];
    codes[W + lane] = s.minimum_code[group];
  }
  static LLMFAST_INLINE void scales(const uint8_t* head, i64 i, vf& scale, vf& minimum) {
    const uint8_t* codes = head + 4 * W + 2 * i * W;
    scale = load(reinterpret_cast<const float16*>(head)) * load_bytes(codes);  // exact, and so is the other
    minimum = load(reinterpret_cast<const float16*>(head) + W) * load_bytes(codes + W);
  }
};
using PackedQ4_K = PackedGroups<CodedGroups>;

// ---- The formats ----

#include "split_floats.inl"

struct FormatKernels {
  bool (*accepts)(Format);
  i64 (*panel_bytes)(i64 K);
  void (*pack)(const WeightSource&, const i64* rows, i64 K, uint8_t* panel);
  void (*unpack)(const uint8_t* panel, i64 column, i64 K, float* out);
  i64 (*row_bytes)(i64 K);
  void (*prepare)(const float* x, i64 K, uint8_t* row);
  void (*subtract)(const uint8_t* row, i64 K, float* x);
  void (*product)(i64 M, i64 K, const uint8_t* rows, const uint8_t* panel, float* out);
};
template <class F>
constexpr FormatKernels kernels_of() {
  return {F::accepts, F::panel_bytes, F::pack, F::unpack, F::row_bytes, F::prepare, F::subtract, F::product};
}
constexpr FormatKernels FORMATS[] = {kernels_of<PackedF32>(),  kernels_of<PackedBF16>(), kernels_of<PackedI8>(),
                                     kernels_of<PackedI4>(),   kernels_of<PackedQ8_0>(), kernels_of<PackedQ4_1>(),
                                     kernels_of<PackedQ4_K>(), kernels_of<PackedSplit>()};
LLMFAST_INLINE const FormatKernels& kernels_of(Format format) { return FORMATS[int(format)]; }

// A panel of a matrix: its format, where it is, and which rows of the matrix it has.
struct Panel {
  Format format;
  uint8_t* data;
  i64 first, rows;
};
LLMFAST_INLINE i64 panels_of(const PackedMatrix& m) {
  i64 panels = 0;
  for (i64 i = 0; i < m.parts; i++) panels += ceil_div(m.part[i].N, TILE_COLS);
  return panels;
}
LLMFAST_INLINE Panel panel_of(const PackedMatrix& m, i64 panel) {
  const PackedRows* part = m.part;
  for (; panel >= ceil_div(part->N, TILE_COLS); part++) panel -= ceil_div(part->N, TILE_COLS);
  const i64 first = panel * TILE_COLS;
  return {part->format, part->panels + panel * kernels_of(part->format).panel_bytes(m.K), part->first + first,
          min_of<i64>(TILE_COLS, part->N - first)};
}

i64 packed_bytes(Format format, i64 N, i64 K) { return ceil_div(N, TILE_COLS) * kernels_of(format).panel_bytes(K); }
bool packs(Format format, const WeightSource& source) { return kernels_of(format).accepts(source.format); }
// Whether rows of activations prepared for the one are what the other reads.
bool share_rows(Format a, Format b) {
  const auto in_groups = [](Format f) { return f >= Format::i4 && f <= Format::q4_k; };
  return a == b || (in_groups(a) && in_groups(b));
}

// The row of the packed matrix that row n of a weight becomes.
i64 packed_row(const RowOrder& order, i64 n) {
  switch (order.kind) {
    case RowOrder::Kind::as_given:
      break;
    case RowOrder::Kind::pairs: {
      const i64 head = n / order.head_dim * order.head_dim, channel = n - head, half = order.rotary_dim / 2;
      n = head + (channel < half ? 2 * channel : channel < 2 * half ? 2 * (channel - half) + 1 : channel);
      break;
    }
    case RowOrder::Kind::gate:
    case RowOrder::Kind::up:
      n = n / W * 2 * W + n % W + (order.kind == RowOrder::Kind::up ? W : 0);
      break;
  }
  return order.first + n;
}

// Packs a weight of N rows where they belong in the matrix.
void pack_weight(const PackedMatrix& m, const RowOrder& order, i64 N, const WeightSource& source, const Threads& threads) {
  Scratch memory((m.N + TILE_COLS) * 2);
  i64* rows = reinterpret_cast<i64*>(memory.data);
  for (i64 n = 0; n < m.N + TILE_COLS; n++) rows[n] = -1;
  for (i64 n = 0; n < N; n++) rows[packed_row(order, n)] = n;
  for_each_task(threads, panels_of(m), [&](i64 i) {
    const Panel panel = panel_of(m, i);
    i64 from[TILE_COLS];
    for (i64 c = 0; c < TILE_COLS; c++) from[c] = c < panel.rows ? rows[panel.first + c] : -1;
    if (kernels_of(panel.format).accepts(source.format)) kernels_of(panel.format).pack(source, from, m.K, panel.data);
  });
}

// Row n of a matrix of one part in float32: a token's embedding.
LLMFAST_INLINE void unpack_row(const PackedMatrix& m, i64 n, float* out) {
  const Panel panel = panel_of(m, n / TILE_COLS);
  kernels_of(panel.format).unpack(panel.data, n % TILE_COLS, m.K, out);
}

// Rows of activations for a product; with two terms each becomes two rows, whose products are added up.
LLMFAST_INLINE i64 prepared_bytes(const PackedMatrix& m) { return m.terms * kernels_of(m.part[0].format).row_bytes(m.K); }
LLMFAST_INLINE void prepare_row(const PackedMatrix& m, float* x, uint8_t* to) {
  const FormatKernels& format = kernels_of(m.part[0].format);
  format.prepare(x, m.K, to);
  if (m.terms < 2) return;
  format.subtract(to, m.K, x);
  format.prepare(x, m.K, to + format.row_bytes(m.K));
}

// out (M, TILE_COLS) = M prepared rows times one panel; `out` has room for the terms of each row.
LLMFAST_INLINE void panel_product(const PackedMatrix& m, const Panel& panel, i64 M, const uint8_t* rows, float* out) {
  kernels_of(panel.format).product(M * m.terms, m.K, rows, panel.data, out);
  if (m.terms < 2) return;
  for (i64 r = 0; r < M; r++)
    for (i64 j = 0; j < TILE_COLS; j += W)
      store(out + r * TILE_COLS + j, load(out + 2 * r * TILE_COLS + j) + load(out + (2 * r + 1) * TILE_COLS + j));
}
