// C (M, N) = sum over k of A(m, k) B(k, n), for A and B of any strides in float32 or bfloat16, accumulated in float32.
//
//   for each slab of B (at most 2048 x N columns, 8 MiB packed):           packed once, by all threads
//     for each tile of C (96 x 256), one task:                             the tile accumulates in scratch memory
//       for each block of 128 k: pack A's rows of it, then
//         for each panel of TILE_COLS columns, for each TILE_ROWS rows: the register tile
//       hand the finished tile to the epilogue
//
// B is packed into panels [k][TILE_COLS], widened to float32, and read from there by every task; A is read as it lies
// where its rows are contiguous and need no conversion, else packed by each task for itself. Packing takes long where a
// matrix is large and used little, so the smaller one of the two is taken for B, by C^T = B^T A^T. A tile is finished by
// one task and its sums run over k in one order, so the result depends neither on the number of threads nor on that
// choice. The epilogue sees float32 sums, so bias and activation are applied before the one rounding to the output's type.
//
// For a few rows of A (a decode step) there is nothing to reuse: `few_rows` reads B's rows once, unpacked.

constexpr int TILE_ROWS = LLMFAST_TILE_ROWS;
constexpr int TILE_VECTORS = LLMFAST_TILE_VECTORS;
constexpr int TILE_COLS = TILE_VECTORS * W;

// Whether products of a matrix of As and one of Bs go by pairs of bfloat16, as below.
template <class A, class B>
constexpr bool multiplies_pairs() {
  return LLMFAST_BF16_DOT && sizeof(A) == sizeof(bfloat16) && sizeof(B) == sizeof(bfloat16);
}

// One step of a sum of products. The unit of k is one float, or where the CPU multiplies bfloat16 directly
// (LLMFAST_BF16_DOT) and both matrices hold it, a pair of bfloat16 in the same four bytes: half the steps, and the same
// loops.
template <bool PAIRS>
LLMFAST_INLINE vf multiply_add(vf sum, vf a, vf b) {
#if LLMFAST_BF16_DOT
  if (PAIRS) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + a * b;
}
LLMFAST_INLINE vf splat_bits(const float* p) {  // a copy of four bytes that need not be a float
  int32_t bits;
  memcpy(&bits, p, 4);
  return (vf)(bits - vi{});
}

// The register tile: C (ROWS, VECS * W) (+)= sum over k of a[r * a_row + k * a_k] * b[k * b_row + :]. Everything else in
// this backend that multiplies matrices, attention included, comes down to this loop. Each call starts its sums at zero
// and adds them to C at the end: blocks of k summed apart round less than one long chain would.
template <bool PAIRS, int ROWS, int VECS>
LLMFAST_INLINE void tile_of_products(i64 kc, const float* a, i64 a_row, i64 a_k, const float* b, i64 b_row, float* c,
                                     i64 c_row, bool accumulate) {
  vf sum[ROWS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; v++) sum[r][v] = zeros();
  for (i64 k = 0; k < kc; k++) {
    vf column[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < VECS; v++) column[v] = load(b + k * b_row + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vf broadcast = splat_bits(a + r * a_row + k * a_k);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; v++) sum[r][v] = multiply_add<PAIRS>(sum[r][v], broadcast, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; v++) {
      float* at = c + r * c_row + v * W;
      store(at, accumulate ? load(at) + sum[r][v] : sum[r][v]);
    }
}

// On a panel of B as it is packed, and on some columns of a wider one.
template <bool PAIRS, int ROWS, int VECS>
__attribute__((noinline)) void register_tile(i64 kc, const float* a, i64 a_row, i64 a_k, const float* b, float* c, i64 c_row,
                                             bool accumulate) {
  tile_of_products<PAIRS, ROWS, VECS>(kc, a, a_row, a_k, b, VECS * W, c, c_row, accumulate);
}
template <bool PAIRS, int ROWS, int VECS>
__attribute__((noinline)) void register_tile_within(i64 kc, const float* a, i64 a_row, i64 a_k, const float* b, i64 b_row,
                                                    float* c, i64 c_row, bool accumulate) {
  tile_of_products<PAIRS, ROWS, VECS>(kc, a, a_row, a_k, b, b_row, c, c_row, accumulate);
}

using RegisterTile = void (*)(i64, const float*, i64, i64, const float*, float*, i64, bool);
using RegisterTileWithin = void (*)(i64, const float*, i64, i64, const float*, i64, float*, i64, bool);

// The register tile for `rows` <= TILE_ROWS and `vectors` <= TILE_VECTORS.
#define LLMFAST_ROW(tile, v) \
  {tile<PAIRS, 1, v>, tile<PAIRS, 2, v>, tile<PAIRS, 3, v>, tile<PAIRS, 4, v>, tile<PAIRS, 5, v>, tile<PAIRS, 6, v>}
#if LLMFAST_TILE_VECTORS == 4
#define LLMFAST_TILES(tile) {LLMFAST_ROW(tile, 1), LLMFAST_ROW(tile, 2), LLMFAST_ROW(tile, 3), LLMFAST_ROW(tile, 4)}
#else
#define LLMFAST_TILES(tile) {LLMFAST_ROW(tile, 1), LLMFAST_ROW(tile, 2)}
#endif
static_assert(TILE_ROWS <= 6 && (TILE_VECTORS == 2 || TILE_VECTORS == 4), "the tables of register tiles");

template <bool PAIRS>
LLMFAST_INLINE RegisterTile register_tile_for(i64 rows, i64 vectors) {
  static constexpr RegisterTile tiles[][6] = LLMFAST_TILES(register_tile);
  return tiles[vectors - 1][rows - 1];
}
template <bool PAIRS>
LLMFAST_INLINE RegisterTileWithin register_tile_within_for(i64 rows, i64 vectors) {
  static constexpr RegisterTileWithin tiles[][6] = LLMFAST_TILES(register_tile_within);
  return tiles[vectors - 1][rows - 1];
}
#undef LLMFAST_TILES
#undef LLMFAST_ROW

// Whether the product below is on AMX's tile registers.
template <bool PAIRS>
constexpr bool on_tile_registers() {
#if LLMFAST_TILE_REGISTERS
  return PAIRS;
#else
  return false;
#endif
}

// C (rows, vectors * W) (+)= A B for one panel of B.
template <bool PAIRS = false>
LLMFAST_INLINE void panel_matmul(i64 rows, i64 vectors, i64 kc, const float* a, i64 a_row, i64 a_k, const float* b, float* c,
                                 i64 c_row, bool accumulate) {
#if LLMFAST_TILE_REGISTERS
  if (const i64 steps = kc / TILE_UNITS; PAIRS && a_k == 1 && steps > 0) {
    const i64 done = steps * TILE_UNITS;
    multiply_tiles<BF16Tiles>(rows, vectors, steps, a, a_row * 4, b, vectors * W * 4, c, c_row, accumulate);
    if (done == kc) return;
    kc -= done;
    a += done;
    b += done * vectors * W;
    accumulate = true;
  }
#endif
  const RegisterTile full = register_tile_for<PAIRS>(TILE_ROWS, vectors);
  i64 r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS) full(kc, a + r * a_row, a_row, a_k, b, c + r * c_row, c_row, accumulate);
  if (r < rows)
    register_tile_for<PAIRS>(rows - r, vectors)(kc, a + r * a_row, a_row, a_k, b, c + r * c_row, c_row, accumulate);
}

// A matrix in memory: element (i, j) is at data[i * row + j * col].
struct Matrix {
  DType dtype;
  const void* data;
  i64 row, col;
};

LLMFAST_INLINE i64 vectors_for(i64 columns) { return min_of<i64>(TILE_VECTORS, ceil_div(columns, W)); }

// Packs src (k, columns), columns <= TILE_COLS, as [k][vectors * W] floats, zeros beyond the last column.
template <class T>
void pack_panel(const T* src, i64 row, i64 col, i64 k, i64 columns, float* dst) {
  const i64 width = vectors_for(columns) * W;
  for (i64 j0 = 0; j0 < width; j0 += W) {
    const i64 n = min_of<i64>(W, columns - j0);
    const T* from = src + j0 * col;
    float* to = dst + j0;
    i64 i = 0;
    if (col == 1) {
      if (n == W)
        for (; i < k; i++) store(to + i * width, load(from + i * row));
      else
        for (; i < k; i++) store(to + i * width, load_n(from + i * row, n));
    } else if (row == 1) {
      for (; i < k; i += W) {  // W x W blocks are turned in registers
        const i64 m = min_of<i64>(W, k - i);
        vf block[W];
        if (n == W && m == W) {
#pragma GCC unroll 16
          for (int j = 0; j < W; j++) block[j] = load(from + j * col + i);
        } else {
          for (int j = 0; j < W; j++) block[j] = j < n ? load_upto(from + j * col + i, m) : zeros();
        }
        transpose(block);
        if (m == W) {
#pragma GCC unroll 16
          for (int j = 0; j < W; j++) store(to + (i + j) * width, block[j]);
        } else {
          for (int j = 0; j < m; j++) store(to + (i + j) * width, block[j]);
        }
      }
    } else {
      for (; i < k; i++)
        for (i64 j = 0; j < W; j++) to[i * width + j] = j < n ? to_float(from[i * row + j * col]) : 0.0f;
    }
  }
}

// Copies src (rows, columns) to dst (rows, dst_row) in float32; src's columns are contiguous.
template <class T>
void copy_rows(const T* src, i64 row, i64 rows, i64 columns, float* dst, i64 dst_row) {
  for (i64 i = 0; i < rows; i++) {
    i64 j = 0;
    for (; j + W <= columns; j += W) store(dst + i * dst_row + j, load(src + i * row + j));
    if (j < columns) store_n(dst + i * dst_row + j, load_n(src + i * row + j, columns - j), columns - j);
  }
}

// Packs a block of A in float32, in the order it has in memory; says how to step through it.
template <class T>
void pack_rows(const T* src, i64 row, i64 col, i64 rows, i64 kc, float* dst, i64* dst_row, i64* dst_k) {
  if (col == 1) {
    *dst_row = kc;
    *dst_k = 1;
    copy_rows(src, row, rows, kc, dst, kc);
  } else if (row == 1) {
    *dst_row = 1;
    *dst_k = rows;
    copy_rows(src, col, kc, rows, dst, rows);
  } else {
    *dst_row = kc;
    *dst_k = 1;
    for (i64 i = 0; i < rows; i++)
      for (i64 k = 0; k < kc; k++) dst[i * kc + k] = to_float(src[i * row + k * col]);
  }
}

// The same two for pairs: k counts bfloat16, an odd last one is paired with zero.

// n pairs of neighbours, as they lie in memory; fewer than n * 2 elements read as zeros beyond them.
LLMFAST_INLINE vf load_pairs(const bfloat16* p, i64 elements) {
  bfloat16 lanes[2 * W] = {};
  if (elements < 2 * W) {
    for (i64 i = 0; i < elements; i++) lanes[i] = p[i];
    p = lanes;
  }
  vf pairs;
  memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}

// Pairs made of two rows: first[i] and second[i], for i < n; second may be null.
LLMFAST_INLINE vf join_pairs(const bfloat16* first, const bfloat16* second, i64 n) {
  const vu low = (vu)load_upto(first, n) >> 16;
  return (vf)(second ? low | (vu)load_upto(second, n) : low);
}

// Pairs made of two rows of floats, rounded to nearest.
LLMFAST_INLINE vf round_to_pairs(vf first, vf second) {
  return (vf)((((vu)first + 0x8000) >> 16) | (((vu)second + 0x8000) & 0xffff0000));
}

LLMFAST_INLINE float scalar_pair(bfloat16 first, bfloat16 second) {
  const bfloat16 pair[2] = {first, second};
  float bits;
  memcpy(&bits, pair, 4);
  return bits;
}

inline void pack_panel_pairs(const bfloat16* src, i64 row, i64 col, i64 k, i64 columns, float* dst) {
  const i64 width = vectors_for(columns) * W, pairs = ceil_div(k, 2);
  for (i64 j0 = 0; j0 < width; j0 += W) {
    const i64 n = min_of<i64>(W, columns - j0);
    const bfloat16* from = src + j0 * col;
    float* to = dst + j0;
    if (col == 1) {
      for (i64 i = 0; i < pairs; i++)
        store(to + i * width, join_pairs(from + 2 * i * row, 2 * i + 1 < k ? from + (2 * i + 1) * row : nullptr, n));
    } else if (row == 1) {
      for (i64 i = 0; i < pairs; i += W) {
        vf block[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) block[j] = j < n ? load_pairs(from + j * col + 2 * i, k - 2 * i) : zeros();
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < W; j++)
          if (i + j < pairs) store(to + (i + j) * width, block[j]);
      }
    } else {
      for (i64 i = 0; i < pairs; i++)
        for (i64 j = 0; j < W; j++) {
          const bfloat16* at = from + 2 * i * row + j * col;
          to[i * width + j] = j < n ? scalar_pair(at[0], 2 * i + 1 < k ? at[row] : bfloat16{0}) : 0.0f;
        }
    }
  }
}

inline void pack_rows_pairs(const bfloat16* src, i64 row, i64 col, i64 rows, i64 k, float* dst, i64* dst_row, i64* dst_k) {
  const i64 pairs = ceil_div(k, 2);
  if (row == 1 && rows > 1) {
#if LLMFAST_TILE_REGISTERS  // which read along k
    *dst_row = pairs;
    *dst_k = 1;
    for (i64 i = 0; i < pairs; i += W)
      for (i64 r = 0; r < rows; r += W) {
        const i64 n = min_of<i64>(W, rows - r), m = min_of<i64>(W, pairs - i);
        vf block[W];
        for (i64 j = 0; j < m; j++) {
          const bfloat16* first = src + 2 * (i + j) * col + r;
          block[j] = join_pairs(first, 2 * (i + j) + 1 < k ? first + col : nullptr, n);
        }
        for (i64 j = m; j < W; j++) block[j] = zeros();
        transpose(block);
        for (i64 j = 0; j < n; j++) store_upto(dst + (r + j) * pairs + i, block[j], m);
      }
    return;
#endif
    *dst_row = 1;
    *dst_k = rows;
    for (i64 i = 0; i < pairs; i++)
      for (i64 r = 0; r < rows; r += W) {
        const i64 n = min_of<i64>(W, rows - r);
        const bfloat16* first = src + 2 * i * col + r;
        store_upto(dst + i * rows + r, join_pairs(first, 2 * i + 1 < k ? first + col : nullptr, n), n);
      }
    return;
  }
  *dst_row = pairs;
  *dst_k = 1;
  for (i64 r = 0; r < rows; r++) {
    const bfloat16* from = src + r * row;
    if (col == 1) {
      dst[(r + 1) * pairs - 1] = 0.0f;
      memcpy(dst + r * pairs, from, size_t(k) * sizeof(bfloat16));
    } else {
      for (i64 i = 0; i < pairs; i++)
        dst[r * pairs + i] = scalar_pair(from[2 * i * col], 2 * i + 1 < k ? from[(2 * i + 1) * col] : bfloat16{0});
    }
  }
}

// Packing for the product below, in units of k (`unit` elements each).
template <bool PAIRS>
LLMFAST_INLINE void pack_columns_of(const Matrix& B, i64 at, i64 k, i64 columns, float* to) {
  if (PAIRS)
    pack_panel_pairs(static_cast<const bfloat16*>(B.data) + at, B.row, B.col, k, columns, to);
  else if (B.dtype == DType::f32)
    pack_panel(static_cast<const float*>(B.data) + at, B.row, B.col, k, columns, to);
  else
    pack_panel(static_cast<const bfloat16*>(B.data) + at, B.row, B.col, k, columns, to);
}
template <bool PAIRS>
LLMFAST_INLINE void pack_rows_of(const Matrix& A, i64 at, i64 rows, i64 k, float* to, i64* to_row, i64* to_k) {
  if (PAIRS)
    pack_rows_pairs(static_cast<const bfloat16*>(A.data) + at, A.row, A.col, rows, k, to, to_row, to_k);
  else if (A.dtype == DType::f32)
    pack_rows(static_cast<const float*>(A.data) + at, A.row, A.col, rows, k, to, to_row, to_k);
  else
    pack_rows(static_cast<const bfloat16*>(A.data) + at, A.row, A.col, rows, k, to, to_row, to_k);
}

// Whether rows of A (M, K) can be read where they are, in units of k.
template <bool PAIRS>
LLMFAST_INLINE bool rows_lie_ready(const Matrix& A, i64 K) {
  return A.col == 1 && (PAIRS ? A.row % 2 == 0 && K % 2 == 0 : A.dtype == DType::f32);
}

// y (M, block of N) = x (M, K) . b's columns, each contiguous in memory: COLS columns at a time share the loads of x.
template <class T, int ROWS, int COLS>
void few_rows_block(const float* x, i64 K, const T* b, i64 b_col, i64 columns, float* y, i64 y_row) {
  const i64 K_padded = round_up(K, W), K_whole = K / W * W;
  for (i64 n0 = 0; n0 < columns; n0 += COLS) {
    const T* column[COLS];
    for (int j = 0; j < COLS; j++) column[j] = b + min_of<i64>(n0 + j, columns - 1) * b_col;
    vf sum[ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int j = 0; j < COLS; j++) sum[r][j] = zeros();
    for (i64 k = 0; k < K_whole; k += W) {
      vf w[COLS];
#pragma GCC unroll 8
      for (int j = 0; j < COLS; j++) w[j] = load(column[j] + k);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const vf xr = load(x + r * K_padded + k);
#pragma GCC unroll 8
        for (int j = 0; j < COLS; j++) sum[r][j] += xr * w[j];
      }
    }
    if (K_whole < K)
      for (int j = 0; j < COLS; j++) {
        const vf w = load_n(column[j] + K_whole, K - K_whole);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r][j] += load(x + r * K_padded + K_whole) * w;
      }
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < COLS && n0 + j < columns; j++) y[r * y_row + n0 + j] = sum_lanes(sum[r][j]);
  }
}

template <class T>
void few_rows_block(i64 M, const float* x, i64 K, const T* b, i64 b_col, i64 columns, float* y, i64 y_row) {
  switch (M) {
    case 1:
      return few_rows_block<T, 1, 4>(x, K, b, b_col, columns, y, y_row);
    case 2:
      return few_rows_block<T, 2, 4>(x, K, b, b_col, columns, y, y_row);
    case 3:
      return few_rows_block<T, 3, 4>(x, K, b, b_col, columns, y, y_row);
    case 4:
      return few_rows_block<T, 4, 4>(x, K, b, b_col, columns, y, y_row);
    case 5:
      return few_rows_block<T, 5, 2>(x, K, b, b_col, columns, y, y_row);
    case 6:
      return few_rows_block<T, 6, 2>(x, K, b, b_col, columns, y, y_row);
    case 7:
      return few_rows_block<T, 7, 2>(x, K, b, b_col, columns, y, y_row);
    case 8:
      return few_rows_block<T, 8, 2>(x, K, b, b_col, columns, y, y_row);
  }
}

constexpr i64 FEW_ROWS = 8;
constexpr i64 TILE_MULTIPLE = 32;  // the rows and columns of a tile of C, but for the last
template <bool PAIRS>
constexpr i64 MOST_TILE_ROWS = (on_tile_registers<PAIRS>() ? 6 : 3) * TILE_MULTIPLE;

// A times PARTS matrices (K, N). epilogue(0, n0, M, columns, tiles, tile_row) is called once for each finished set of
// PARTS tiles.
template <int PARTS, class Epilogue>
void few_rows(i64 M, i64 N, i64 K, const Matrix& A, const Matrix (&B)[PARTS], const Threads& threads,
              const Epilogue& epilogue) {
  constexpr i64 BLOCK = 64;
  const i64 K_padded = round_up(K, W);
  Scratch x(M * K_padded);
  for (i64 m = 0; m < M; m++)
    for (i64 k = 0; k < K_padded; k++) {
      const i64 at = m * A.row + k * A.col;
      x.data[m * K_padded + k] = k >= K                  ? 0.0f
                                 : A.dtype == DType::f32 ? static_cast<const float*>(A.data)[at]
                                                         : to_float(static_cast<const bfloat16*>(A.data)[at]);
    }
  for_each_task(threads, ceil_div(N, BLOCK), [&](i64 task) {
    const i64 n0 = task * BLOCK, columns = min_of(BLOCK, N - n0);
    float y[PARTS][FEW_ROWS * BLOCK];
    const float* tiles[PARTS];
    for (int part = 0; part < PARTS; part++) {
      const Matrix& b = B[part];
      if (b.dtype == DType::f32)
        few_rows_block(M, x.data, K, static_cast<const float*>(b.data) + n0 * b.col, b.col, columns, y[part], BLOCK);
      else
        few_rows_block(M, x.data, K, static_cast<const bfloat16*>(b.data) + n0 * b.col, b.col, columns, y[part], BLOCK);
      tiles[part] = y[part];
    }
    epilogue(0, n0, M, columns, tiles, BLOCK);
  });
}

// The products of PARTS matrices A (M, K) with one B. epilogue(m0, n0, rows, columns, tile, tile_row) is called once for
// each finished tile, which has as many rows of each product, one below the other.
template <bool PAIRS, int PARTS, class Epilogue>
void blocked_matmul_as(i64 M, i64 N, i64 K, const Matrix (&A)[PARTS], const Matrix& B, const Threads& threads,
                       const Epilogue& epilogue) {
  // k is counted in units of one or two elements.
  constexpr i64 UNIT = PAIRS ? 2 : 1, K_BLOCK = 128, K_SLAB = 2048, SLAB_FLOATS = i64{2} << 20, L2_FLOATS = i64{1} << 18;
  const i64 units = ceil_div(K, UNIT);
  i64 rows_per_tile = MOST_TILE_ROWS<PAIRS> / PARTS, cols_per_tile = 8 * TILE_MULTIPLE;
  // Smaller tiles where there would be too few for the threads; this changes no sum.
  const auto too_few = [&] { return ceil_div(M, rows_per_tile) * ceil_div(N, cols_per_tile) < 4 * threads.count; };
  if (too_few()) rows_per_tile = 3 * TILE_MULTIPLE / PARTS;
  while (too_few() && cols_per_tile > 2 * TILE_MULTIPLE) cols_per_tile /= 2;
  if (too_few()) rows_per_tile /= 3;

  const i64 k_slab = max_of<i64>(1, min_of(units, K_SLAB)), k_slabs = max_of<i64>(1, ceil_div(units, K_SLAB));
  const i64 n_slabs = ceil_div(N * k_slab, SLAB_FLOATS);
  const i64 n_slab = min_of(round_up(ceil_div(N, n_slabs), cols_per_tile), round_up(N, TILE_COLS));
  const i64 row_tiles = ceil_div(M, rows_per_tile);
  bool rows_ready = true;
  for (const Matrix& from : A) rows_ready &= rows_lie_ready<PAIRS>(from, K);
  // Where nothing of A is packed the tile registers keep a sum over all of k.
  const bool whole_k = on_tile_registers<PAIRS>() && rows_ready, at_once = whole_k && k_slabs == 1;
  const i64 k_block = whole_k ? k_slab : K_BLOCK;
  Scratch packed(k_slab * n_slab);
  // With several slabs along k the sums wait here in between; with one they never leave a task's own scratch.
  Scratch waiting(k_slabs > 1 ? row_tiles * rows_per_tile * PARTS * n_slab : 1);

  for (i64 n_begin = 0; n_begin < N; n_begin += n_slab) {
    const i64 n_count = min_of(n_slab, N - n_begin), col_tiles = ceil_div(n_count, cols_per_tile);
    for (i64 slab = 0; slab < k_slabs; slab++) {
      const i64 k_begin = slab * K_SLAB, k_count = min_of(K_SLAB, units - k_begin);
      for_each_task(threads, ceil_div(n_count, TILE_COLS), [&](i64 panel) {
        const i64 n0 = panel * TILE_COLS, columns = min_of<i64>(TILE_COLS, n_count - n0);
        const i64 elements = min_of(k_count * UNIT, K - k_begin * UNIT);
        pack_columns_of<PAIRS>(B, k_begin * UNIT * B.row + (n_begin + n0) * B.col, elements, columns,
                               packed.data + n0 * k_count);
      });
      // As many columns as fit the second level's cache, all rows, then the next ones: rows come from memory, one after
      // the other, once for each such group.
      const i64 group = max_of<i64>(1, L2_FLOATS / max_of<i64>(1, k_count * cols_per_tile));
      for_each_task(threads, row_tiles * col_tiles, [&](i64 task) {
        const i64 first_of_group = task / (row_tiles * group) * group, in_group = min_of(group, col_tiles - first_of_group);
        const i64 place = task - first_of_group * row_tiles;
        const i64 m0 = place / in_group * rows_per_tile, rows = min_of(rows_per_tile, M - m0);
        const i64 n0 = (first_of_group + place % in_group) * cols_per_tile, columns = min_of(cols_per_tile, n_count - n0);
        const i64 own_columns = at_once ? TILE_COLS : cols_per_tile;
        Scratch a_packed(rows * K_BLOCK), own(k_slabs > 1 ? 1 : PARTS * rows * own_columns);
        float* tile = k_slabs > 1 ? waiting.data + m0 * PARTS * n_slab + n0 : own.data;
        const i64 tile_row = k_slabs > 1 ? n_slab : own_columns;
        // Without any k the one pass below still runs, and stores zeros.
        for (i64 k0 = 0; k0 < max_of<i64>(1, k_count); k0 += k_block) {
          const i64 kc = min_of(k_block, k_count - k0), first = (k_begin + k0) * UNIT;
          const auto multiply = [&](int part, i64 n, const float* a, i64 a_row, i64 a_k, float* to) {
            const i64 vectors = vectors_for(n0 + columns - n);
            panel_matmul<PAIRS>(rows, vectors, kc, a, a_row, a_k, packed.data + n * k_count + k0 * vectors * W, to, tile_row,
                                slab > 0 || k0 > 0);
          };
          const auto where_it_lies = [&](const Matrix& from) {
            return static_cast<const float*>(from.data) + (m0 * from.row + first) / UNIT;
          };
          if (at_once) {
            for (i64 n = n0; n < n0 + columns; n += TILE_COLS) {
              for (int part = 0; part < PARTS; part++)
                multiply(part, n, where_it_lies(A[part]), A[part].row / UNIT, 1, tile + part * rows * tile_row);
              epilogue(m0, n_begin + n, rows, min_of<i64>(TILE_COLS, n0 + columns - n), tile, tile_row);
            }
            continue;
          }
          for (int part = 0; part < PARTS; part++) {
            const Matrix& from = A[part];
            const float* a = a_packed.data;
            i64 a_row = 0, a_k = 0;
            if (rows_lie_ready<PAIRS>(from, K)) {
              a = where_it_lies(from);
              a_row = from.row / UNIT;
              a_k = 1;
            } else if (kc > 0) {
              pack_rows_of<PAIRS>(from, m0 * from.row + first * from.col, rows, min_of(kc * UNIT, K - first), a_packed.data,
                                  &a_row, &a_k);
            }
            for (i64 n = n0; n < n0 + columns; n += TILE_COLS)
              multiply(part, n, a, a_row, a_k, tile + part * rows * tile_row + (n - n0));
          }
        }
        if (slab == k_slabs - 1 && !at_once) epilogue(m0, n_begin + n0, rows, columns, tile, tile_row);
      });
    }
  }
}

template <int PARTS, class Epilogue>
void blocked_matmul(i64 M, i64 N, i64 K, const Matrix (&A)[PARTS], const Matrix& B, const Threads& threads,
                    const Epilogue& epilogue) {
#if LLMFAST_BF16_DOT
  if (A[0].dtype == DType::bf16 && B.dtype == DType::bf16) return blocked_matmul_as<true>(M, N, K, A, B, threads, epilogue);
#endif
  blocked_matmul_as<false>(M, N, K, A, B, threads, epilogue);
}

LLMFAST_INLINE Matrix transposed(const Matrix& m) { return {m.dtype, m.data, m.col, m.row}; }

// out[c][r] = tile[r][c] for c < W, out's rows `out_row` floats apart.
LLMFAST_INLINE void turn_columns(const float* tile, i64 tile_row, i64 rows, float* out, i64 out_row) {
  for (i64 r = 0; r < rows; r += W) {
    vf block[W];
    for (int i = 0; i < W; i++) block[i] = r + i < rows ? load(tile + (r + i) * tile_row) : zeros();
    transpose(block);
    for (int i = 0; i < W; i++) store(out + i * out_row + r, block[i]);
  }
}

// A times PARTS matrices (K, N) in one pass over A, which is packed, and they are not: the tiles come out transposed.
// epilogue(m0, n0, rows, columns, tiles, tile_row) is called once for each finished set of PARTS tiles.
template <int PARTS, class Epilogue>
void matmul_with_large(i64 M, i64 N, i64 K, const Matrix& A, const Matrix (&B)[PARTS], const Threads& threads,
                       const Epilogue& epilogue) {
  Matrix left[PARTS];
  for (int part = 0; part < PARTS; part++) left[part] = transposed(B[part]);
  blocked_matmul(N, M, K, left, transposed(A), threads,
                 [&](i64 n0, i64 m0, i64 columns, i64 rows, const float* tile, i64 tile_row) {
                   constexpr i64 MOST = MOST_TILE_ROWS<true> + W;
                   float turned[PARTS][W * MOST];
                   const float* tiles[PARTS];
                   for (i64 r = 0; r < rows; r += W) {
                     for (int part = 0; part < PARTS; part++) {
                       turn_columns(tile + part * columns * tile_row + r, tile_row, columns, turned[part], MOST);
                       tiles[part] = turned[part];
                     }
                     epilogue(m0 + r, n0, min_of<i64>(W, rows - r), columns, tiles, MOST);
                   }
                 });
}

// The same for the few rows that nothing is packed for, or else as above.
template <int PARTS, class Epilogue>
void matmul_all(i64 M, i64 N, i64 K, const Matrix& A, const Matrix (&B)[PARTS], const Threads& threads,
                const Epilogue& epilogue) {
  if (M == 0 || N == 0) return;
  bool columns_contiguous = K > 0;
  for (const Matrix& b : B) columns_contiguous &= b.row == 1;
  if (M <= FEW_ROWS && columns_contiguous) return few_rows(M, N, K, A, B, threads, epilogue);
  matmul_with_large(M, N, K, A, B, threads, epilogue);
}

// epilogue(m0, n0, rows, columns, tile, tile_row) is called once for each finished tile of C.
template <class Epilogue>
void matmul(i64 M, i64 N, i64 K, const Matrix& A, const Matrix& B, const Threads& threads, const Epilogue& epilogue) {
  if (M == 0 || N == 0) return;
  if (M >= N && M > FEW_ROWS) return blocked_matmul(M, N, K, {A}, B, threads, epilogue);
  matmul_all(M, N, K, A, {B}, threads,
             [&](i64 m0, i64 n0, i64 rows, i64 columns, const float* const(&tiles)[1], i64 tile_row) {
               epilogue(m0, n0, rows, columns, tiles[0], tile_row);
             });
}
