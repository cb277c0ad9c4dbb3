// What an adapter adds to a product (adapter.h), a row at a time: the bits of a row do not depend on the others.

LLMFAST_INLINE vi load_integers(const void* p) { return (vi)load(static_cast<const float*>(p)); }

// Has bytes that are read soon come from memory.
LLMFAST_INLINE void ask_for(const void* from, i64 bytes) {
  for (i64 i = 0; i < bytes; i += 64) prefetch(static_cast<const uint8_t*>(from) + i);
}

// z (rank) = s x A^T
LLMFAST_INLINE void narrow_floats(const AdapterMatrix& m, const float* a, const float* factors, const float* x, float* z) {
  for (i64 i = 0; i < m.rank; i += RANKS) {
    vf sum[RANKS] = {};
    for (i64 k = 0; k < m.K; k += STRETCH) {
      const float* rows = a + i * m.stride + k * RANKS;
      ask_for(rows + AHEAD / 4, RANKS * STRETCH * 4);
      for (i64 j = 0; j < min_of(STRETCH, m.K - k); j += W) {
        const vf part = load_upto(x + k + j, m.K - k - j);  // and A has zeros there
        for (i64 r = 0; r < RANKS; r++) sum[r] += part * load(rows + r * STRETCH + j);
      }
    }
    for (i64 r = 0; r < RANKS; r++) z[i + r] = sum_lanes(sum[r]) * factors[i + r];
  }
}

// tile (TILE_COLS) += z B^T, of one panel of the matrix
LLMFAST_INLINE void widen_floats(const AdapterMatrix& m, const float* b, const float* z, i64 panel, float* tile) {
  for (i64 v = 0; v < TILE_COLS / W; v++) {
    const i64 at = panel * (TILE_COLS / W) + v, ranks = m.start[at + 1] - m.start[at];
    const float *from = z + m.first[at], *column = b + m.start[at] * W;
    vf even = zeros(), odd = zeros();
    for (i64 k = 0; k < ranks; k += 2) {
      even += splat(from[k]) * load(column + k * W);
      odd += splat(from[k + 1]) * load(column + (k + 1) * W);
    }
    if (ranks) store(tile + v * W, load(tile + v * W) + (even + odd));
  }
}

// What stands in the place of RANKS numbers of z where they are multiplied in 8 bits.
struct NarrowBytes {
  int8_t integers[RANKS];
  float scale;
  int32_t correction;  // -128 times the sum of the integers
  int32_t unused;
};
static_assert(sizeof(NarrowBytes) == RANKS * 4, "it takes their place");

// The same in 8 bits: x is rounded a stretch at a time, z RANKS at a time.
LLMFAST_INLINE void narrow_bytes(const AdapterMatrix& m, const uint8_t* a, const float* factors, const float* x, float* z) {
  const i64 stretches = m.stride / STRETCH;
  Scratch memory(m.stride / 4 + stretches);
  int8_t* integers = reinterpret_cast<int8_t*>(memory.data);
  float *scales = memory.data + m.stride / 4, correction = 0.0f;
  for (i64 k = m.K; k < m.stride; k++) integers[k] = 0;
  ask_for(a, min_of(m.rank * m.stride, AHEAD));  // while x is rounded
  for (i64 g = 0; g < stretches; g++) {
    int32_t sum;
    quantise(x + g * STRETCH, min_of(STRETCH, m.K - g * STRETCH), integers + g * STRETCH, scales + g, &sum);
    correction -= 128.0f * scales[g] * float(sum);
  }
  for (i64 i = 0; i < m.rank; i += RANKS) {
    vf sum[RANKS] = {};
    for (i64 g = 0; g < stretches; g++) {
      vi dot[RANKS] = {};
      const uint8_t* rows = a + i * m.stride + g * RANKS * STRETCH;
      ask_for(rows + AHEAD, RANKS * STRETCH);
      for (i64 j = 0; j < STRETCH; j += 4 * W)
        for (i64 r = 0; r < RANKS; r++)
          dot[r] = dot4(dot[r], load_integers(rows + r * STRETCH + j), load_integers(integers + g * STRETCH + j));
      for (i64 r = 0; r < RANKS; r++) sum[r] += __builtin_convertvector(dot[r], vf) * splat(scales[g]);
    }
    float out[RANKS];
    for (i64 r = 0; r < RANKS; r++) out[r] = (sum_lanes(sum[r]) + correction) * factors[i + r];
    NarrowBytes to{};
    int32_t all;
    quantise(out, RANKS, to.integers, &to.scale, &all);
    to.correction = -128 * all;
    memcpy(z + i, &to, sizeof(to));
  }
}

LLMFAST_INLINE void widen_bytes(const AdapterMatrix& m, const uint8_t* b, const float* z, i64 panel, float* tile) {
  for (i64 v = 0; v < TILE_COLS / W; v++) {
    const i64 at = panel * (TILE_COLS / W) + v, ranks = m.start[at + 1] - m.start[at];
    const uint8_t* column = b + m.start[at] * W;
    vf sum = zeros();
    for (i64 k = 0; k < ranks; k += RANKS) {
      const float* from = z + m.first[at] + k;  // NarrowBytes
      const vi dot = dot4((vi)splat_bits(from + 2), load_integers(column + k * W), (vi)splat_bits(from));
      sum += __builtin_convertvector(dot, vf) * splat(from[1]);
    }
    if (ranks) store(tile + v * W, load(tile + v * W) + sum);
  }
}

LLMFAST_INLINE void adapter_narrow(const DecoderAdapter& adapter, const AdapterMatrix& m, const float* x, float* z) {
  if (adapter.floats)
    narrow_floats(m, adapter.floats + m.a, adapter.factors + m.factors, x, z);
  else
    narrow_bytes(m, adapter.bytes + m.a, adapter.factors + m.factors, x, z);
}
LLMFAST_INLINE void adapter_widen(const DecoderAdapter& adapter, const AdapterMatrix& m, const float* z, i64 panel,
                                  float* tile) {
  if (adapter.floats)
    widen_floats(m, adapter.floats + m.b, z, panel, tile);
  else
    widen_bytes(m, adapter.bytes + m.b, z, panel, tile);
}
// Has what adapter_widen is going to read come from memory, while the panel itself is multiplied.
LLMFAST_INLINE void adapter_ahead(const DecoderAdapter& adapter, const AdapterMatrix& m, i64 panel) {
  if (!m.rank) return;
  const i64 *start = m.start + panel * (TILE_COLS / W), from = m.b + start[0] * W,
            count = (start[TILE_COLS / W] - start[0]) * W;
  if (adapter.floats)
    ask_for(adapter.floats + from, count * 4);
  else
    ask_for(adapter.bytes + from, count);
}
