// Products on AMX's tile registers (Intel Xeon from 2023 on): C (rows, vectors * 16) (+)= A B, for a panel of B as it is
// packed everywhere here, in units of four bytes along k, two of bfloat16 or four integers of 8 bits.
//
// A register holds up to 16 rows of 64 bytes. One instruction multiplies 16 rows of A by 16 units of k with 16 units of k
// by 16 columns of B, and adds to a tile of C in float32 or int32: 16 times the work of a vector instruction. Its sums run
// over k in one order whatever the number of rows, so a row has the same bits alone and in company. Layout and arithmetic:
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS and TDPBSUD.

#if LLMFAST_TILE_REGISTERS

constexpr i64 TILE_UNITS = 16;  // of k, and the most rows, of one register

struct BF16Tiles {  // pairs of bfloat16; sums in float32, numbers below the normal range taken for zero
  template <int C, int A, int B>
  static LLMFAST_INLINE void add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
struct ByteTiles {  // signed bytes of A, unsigned ones of B; sums in int32
  template <int C, int A, int B>
  static LLMFAST_INLINE void add() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

template <int T>
LLMFAST_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
LLMFAST_INLINE void tile_load(const void* from, i64 row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
LLMFAST_INLINE void tile_store(void* to, i64 row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(T) : "memory");
}

// The shapes of the registers: `upper` and `lower` rows of A and C, `units` of k. One without rows is not used.
//
//   0 to 3  C: the upper rows by two vectors of columns, the lower ones by two; or the upper rows by four
//   4, 5    A: the upper and the lower rows
//   6, 7    B
LLMFAST_INLINE void shape_tiles(i64 upper, i64 lower, i64 units = TILE_UNITS) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  const i64 rows[8] = {upper, upper, lower ? lower : upper, lower ? lower : upper, upper, lower, units, units};
  for (int i = 0; i < 8; i++) {
    shape.rows[i] = uint8_t(rows[i]);
    shape.row_bytes[i] = !rows[i] ? 0 : i == 4 || i == 5 ? uint16_t(4 * units) : 64;
  }
  asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
}

// So that the system need not keep 8 KiB for this thread.
LLMFAST_INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

// The tile of C in register T, at row r and vector v.
template <int T>
LLMFAST_INLINE void begin_sum(const float* c, i64 c_row, i64 r, i64 v, bool accumulate) {
  if (accumulate)
    tile_load<T>(c + r * c_row + v * W, c_row * 4);
  else
    tile_zero<T>();
}
template <int T>
LLMFAST_INLINE void end_sum(float* c, i64 c_row, i64 r, i64 v) {
  tile_store<T>(c + r * c_row + v * W, c_row * 4);
}

// Up to 32 rows by VECS <= 2 vectors of columns: each register of B serves two products.
template <class Product, int VECS>
LLMFAST_INLINE void tiles_of_two_by(i64 steps, const uint8_t* a, i64 a_row, const uint8_t* b, i64 b_row, float* c, i64 c_row,
                                    bool accumulate) {
  begin_sum<0>(c, c_row, 0, 0, accumulate);
  begin_sum<2>(c, c_row, TILE_UNITS, 0, accumulate);
  if (VECS == 2) {
    begin_sum<1>(c, c_row, 0, 1, accumulate);
    begin_sum<3>(c, c_row, TILE_UNITS, 1, accumulate);
  }
  for (i64 step = 0; step < steps; step++, a += 4 * TILE_UNITS, b += TILE_UNITS * b_row) {
    tile_load<6>(b, b_row);
    tile_load<4>(a, a_row);
    Product::template add<0, 4, 6>();
    tile_load<5>(a + TILE_UNITS * a_row, a_row);
    Product::template add<2, 5, 6>();
    if (VECS == 2) {
      tile_load<7>(b + W * 4, b_row);
      Product::template add<1, 4, 7>();
      Product::template add<3, 5, 7>();
    }
  }
  end_sum<0>(c, c_row, 0, 0);
  end_sum<2>(c, c_row, TILE_UNITS, 0);
  if (VECS == 2) {
    end_sum<1>(c, c_row, 0, 1);
    end_sum<3>(c, c_row, TILE_UNITS, 1);
  }
}

// Up to 16 rows by VECS <= 4 vectors of columns. With AHEAD_BYTES the panel is asked for so far ahead.
template <class Product, int VECS, i64 AHEAD_BYTES>
LLMFAST_INLINE void tiles_of_one_by(i64 steps, const uint8_t* a, i64 a_row, const uint8_t* b, i64 b_row, float* c, i64 c_row,
                                    bool accumulate) {
  begin_sum<0>(c, c_row, 0, 0, accumulate);
  if (VECS > 1) begin_sum<1>(c, c_row, 0, 1, accumulate);
  if (VECS > 2) begin_sum<2>(c, c_row, 0, 2, accumulate);
  if (VECS > 3) begin_sum<3>(c, c_row, 0, 3, accumulate);
  for (i64 step = 0; step < steps; step++, a += 4 * TILE_UNITS, b += TILE_UNITS * b_row) {
    if (AHEAD_BYTES)
      for (i64 i = 0; i < TILE_UNITS * b_row; i += 64) prefetch(b + i + AHEAD_BYTES);
    tile_load<4>(a, a_row);
    tile_load<6>(b, b_row);
    Product::template add<0, 4, 6>();
    if (VECS > 1) {
      tile_load<7>(b + W * 4, b_row);
      Product::template add<1, 4, 7>();
    }
    if (VECS > 2) {
      tile_load<6>(b + 2 * W * 4, b_row);
      Product::template add<2, 4, 6>();
    }
    if (VECS > 3) {
      tile_load<7>(b + 3 * W * 4, b_row);
      Product::template add<3, 4, 7>();
    }
  }
  end_sum<0>(c, c_row, 0, 0);
  if (VECS > 1) end_sum<1>(c, c_row, 0, 1);
  if (VECS > 2) end_sum<2>(c, c_row, 0, 2);
  if (VECS > 3) end_sum<3>(c, c_row, 0, 3);
}

// C (rows, vectors * W) (+)= A B over `steps` times 16 units of k. Rows of A and of the panel lie a_row and b_row bytes
// apart, those of C c_row floats (which are int32 for integers).
template <class Product, i64 AHEAD_BYTES = 0>
__attribute__((noinline)) void multiply_tiles(i64 rows, i64 vectors, i64 steps, const void* a, i64 a_row, const void* b,
                                              i64 b_row, float* c, i64 c_row, bool accumulate) {
  const uint8_t* from = static_cast<const uint8_t*>(a);
  const uint8_t* panel = static_cast<const uint8_t*>(b);
  i64 shaped = 0;
  for (i64 r = 0; r < rows; r += 2 * TILE_UNITS) {
    const i64 n = min_of(2 * TILE_UNITS, rows - r), upper = min_of(n, TILE_UNITS);
    if (n != shaped) shape_tiles(upper, n - upper);
    shaped = n;
    const uint8_t* a0 = from + r * a_row;
    float* c0 = c + r * c_row;
    if (n > TILE_UNITS) {
      i64 v = 0;
      for (; v + 2 <= vectors; v += 2)
        tiles_of_two_by<Product, 2>(steps, a0, a_row, panel + v * W * 4, b_row, c0 + v * W, c_row, accumulate);
      if (v < vectors)
        tiles_of_two_by<Product, 1>(steps, a0, a_row, panel + v * W * 4, b_row, c0 + v * W, c_row, accumulate);
      continue;
    }
    switch (vectors) {
      case 1:
        tiles_of_one_by<Product, 1, AHEAD_BYTES>(steps, a0, a_row, panel, b_row, c0, c_row, accumulate);
        break;
      case 2:
        tiles_of_one_by<Product, 2, AHEAD_BYTES>(steps, a0, a_row, panel, b_row, c0, c_row, accumulate);
        break;
      case 3:
        tiles_of_one_by<Product, 3, AHEAD_BYTES>(steps, a0, a_row, panel, b_row, c0, c_row, accumulate);
        break;
      case 4:
        tiles_of_one_by<Product, 4, AHEAD_BYTES>(steps, a0, a_row, panel, b_row, c0, c_row, accumulate);
        break;
    }
  }
  release_tiles();
}

#endif
