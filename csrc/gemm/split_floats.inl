// Products of floats on registers that multiply bfloat16 (Henry, Tang and Heinecke, 2019, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations"). A float is the sum of three bfloat16, each what
// the ones before left over, 24 bits together:
//
//   x w = (x0 + x1 + x2) (w0 + w1 + w2) = x2 w0 + x1 w0 + x1 w1 + x0 w1 + x0 w2 + x0 w0,   but for 2^-24 of it
//
// Six products of bfloat16 take AMX a fifth of the time that one of floats takes AVX-512. The small ones are summed first,
// over all of k, so that the sum is rounded no more often than one of floats. Infinite numbers become NaN.
//
// Rows and panels hold the three parts one behind the other, each as PackedBF16 has it.

#if LLMFAST_TILE_REGISTERS

struct PackedSplit {
  static constexpr void (*subtract)(const uint8_t*, i64, float*) = nullptr;
  static constexpr i64 PARTS = 3;
  static bool accepts(Format format) { return PackedF32::accepts(format); }
  static i64 panel_bytes(i64 K) { return PARTS * PackedBF16::panel_bytes(K); }
  static i64 row_bytes(i64 K) { return PARTS * PackedBF16::row_bytes(K); }

  static void pack(const WeightSource& s, const i64* rows, i64 K, uint8_t* panel) {
    pack_floats(s, rows, K, [&](i64 k, i64 c, float value) {
      for (i64 part = 0; part < PARTS; part++) {
        bfloat16* to = PackedBF16::element(panel + part * PackedBF16::panel_bytes(K), k, c);
        from_float(value, to);
        value -= to_float(*to);
      }
    });
  }
  static void unpack(const uint8_t* panel, i64 c, i64 K, float* out) {
    for (i64 k = 0; k < K; k++) out[k] = 0.0f;
    for (i64 part = PARTS - 1; part >= 0; part--) {
      uint8_t* from = const_cast<uint8_t*>(panel) + part * PackedBF16::panel_bytes(K);
      for (i64 k = 0; k < K; k++) out[k] += to_float(*PackedBF16::element(from, k, c));
    }
  }
  static void prepare(const float* x, i64 K, uint8_t* row) {
    const i64 bytes = PackedBF16::row_bytes(K);
    for (i64 part = 0; part < PARTS && K % 2; part++) reinterpret_cast<bfloat16*>(row + part * bytes)[K].bits = 0;
    for_each_vector(K, [&](i64 k, i64 n) {
      vf rest = load_upto(x + k, n);
      for (i64 part = 0; part < PARTS; part++) {
        bfloat16 lanes[W];
        store(lanes, rest);
        const vf rounded = load(lanes);
        store_upto(reinterpret_cast<bfloat16*>(row + part * bytes) + k, rounded, n);
        rest -= rounded;
      }
    });
  }

  // Up to 32 rows (16 where LOWER is false) with two vectors of columns.
  template <bool LOWER>
  static LLMFAST_INLINE void tiles(i64 steps, const uint8_t* a, i64 a_row, i64 a_part, const uint8_t* b, i64 b_row,
                                   i64 b_part, float* c, i64 c_row) {
    const auto rows_of = [&](i64 part, i64 step) {
      const uint8_t* at = a + part * a_part + step * 4 * TILE_UNITS;
      tile_load<4>(at, a_row);
      if (LOWER) tile_load<5>(at + TILE_UNITS * a_row, a_row);
    };
    const auto columns_of = [&](i64 part, i64 step) {
      const uint8_t* at = b + part * b_part + step * TILE_UNITS * b_row;
      tile_load<6>(at, b_row);
      tile_load<7>(at + 4 * W, b_row);
    };
    const auto add = [&] {
      BF16Tiles::add<0, 4, 6>();
      BF16Tiles::add<1, 4, 7>();
      if (LOWER) BF16Tiles::add<2, 5, 6>();
      if (LOWER) BF16Tiles::add<3, 5, 7>();
    };
    tile_zero<0>();
    tile_zero<1>();
    if (LOWER) tile_zero<2>();
    if (LOWER) tile_zero<3>();
    for (i64 step = 0; step < steps; step++) {  // each load serves as many products as the registers allow
      columns_of(0, step), rows_of(2, step), add();
      rows_of(1, step), add();
      columns_of(1, step), add();
      rows_of(0, step), add();
      columns_of(2, step), add();
    }
    for (i64 step = 0; step < steps; step++) columns_of(0, step), rows_of(0, step), add();
    end_sum<0>(c, c_row, 0, 0);
    end_sum<1>(c, c_row, 0, 1);
    if (LOWER) end_sum<2>(c, c_row, TILE_UNITS, 0);
    if (LOWER) end_sum<3>(c, c_row, TILE_UNITS, 1);
  }

  static __attribute__((noinline)) void product(i64 M, i64 K, const uint8_t* rows, const uint8_t* panel, float* out) {
    static_assert(TILE_VECTORS % 2 == 0, "columns go by two vectors");
    constexpr i64 B_ROW = TILE_COLS * 4;
    const i64 units = PackedBF16::units(K), steps = units / TILE_UNITS, done = steps * TILE_UNITS, stride = row_bytes(K);
    const i64 a_part = PackedBF16::row_bytes(K), b_part = PackedBF16::panel_bytes(K);
    i64 shaped = 0;
    for (i64 r = 0; r < M; r += 2 * TILE_UNITS) {
      const i64 n = min_of(2 * TILE_UNITS, M - r), upper = min_of(n, TILE_UNITS);
      if (n != shaped) shape_tiles(upper, n - upper);
      shaped = n;
      for (i64 v = 0; v < TILE_VECTORS; v += 2) {
        float* c = out + r * TILE_COLS + v * W;
        if (n > upper)
          tiles<true>(steps, rows + r * stride, stride, a_part, panel + v * W * 4, B_ROW, b_part, c, TILE_COLS);
        else
          tiles<false>(steps, rows + r * stride, stride, a_part, panel + v * W * 4, B_ROW, b_part, c, TILE_COLS);
      }
    }
    release_tiles();
    constexpr i64 ORDER[][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};  // of the units that fill no register
    for (i64 i = 0; i < 6 && done < units; i++)
      product_block<PackedBF16>(M, units - done, rows + ORDER[i][0] * a_part + done * 4, stride,
                                panel + ORDER[i][1] * b_part + done * B_ROW, out, true);
  }
};

#else
using PackedSplit = PackedF32;  // elsewhere floats are multiplied as they are
#endif
