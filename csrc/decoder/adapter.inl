// What an adapter adds to a product (adapter.h), a row at a time: the bits of a row do not depend on the others.

constexpr i64 AT_ONCE = 4;  // rows of A that share what is read of x

// z (rank) = s x A^T
template <class T>
void adapter_narrow(const AdapterMatrix& m, const T* values, float scale, const float* x, float* z) {
  const T* a = values + m.a;
  const i64 K = m.K;
  i64 i = 0;
  for (; i + AT_ONCE <= m.rank; i += AT_ONCE) {
    vf sum[AT_ONCE] = {};
    i64 j = 0;
    for (; j + W <= K; j += W)
      for (i64 r = 0; r < AT_ONCE; r++) sum[r] += load(x + j) * load(a + (i + r) * K + j);
    if (j < K)
      for (i64 r = 0; r < AT_ONCE; r++) sum[r] += load_upto(x + j, K - j) * load_upto(a + (i + r) * K + j, K - j);
    for (i64 r = 0; r < AT_ONCE; r++) z[i + r] = sum_lanes(sum[r]) * scale;
  }
  for (; i < m.rank; i++) {
    vf sum = zeros();
    for (i64 j = 0; j < K; j += W) sum += load_upto(x + j, K - j) * load_upto(a + i * K + j, K - j);
    z[i] = sum_lanes(sum) * scale;
  }
}

// tile (TILE_COLS) += z B^T, of one panel of the matrix
template <class T>
void adapter_widen(const AdapterMatrix& m, const T* values, const float* z, i64 panel, float* tile) {
  constexpr i64 VECTORS = TILE_COLS / W;
  for (i64 v = 0; v < VECTORS; v++) {
    const i64 at = panel * VECTORS + v, ranks = m.start[at + 1] - m.start[at];
    const T* b = values + m.b + m.start[at] * W;
    const float* from = z + m.first[at];
    vf even = zeros(), odd = zeros();
    i64 k = 0;
    for (; k + 2 <= ranks; k += 2) {
      even += splat(from[k]) * load(b + k * W);
      odd += splat(from[k + 1]) * load(b + (k + 1) * W);
    }
    if (k < ranks) even += splat(from[k]) * load(b + k * W);
    if (ranks) store(tile + v * W, load(tile + v * W) + (even + odd));
  }
}

LLMFAST_INLINE void adapter_narrow(const DecoderAdapter& adapter, const AdapterMatrix& m, const float* x, float* z) {
  if (adapter.f32)
    adapter_narrow(m, adapter.f32, adapter.scale, x, z);
  else
    adapter_narrow(m, adapter.bf16, adapter.scale, x, z);
}
LLMFAST_INLINE void adapter_widen(const DecoderAdapter& adapter, const AdapterMatrix& m, const float* z, i64 panel,
                                  float* tile) {
  if (adapter.f32)
    adapter_widen(m, adapter.f32, z, panel, tile);
  else
    adapter_widen(m, adapter.bf16, z, panel, tile);
}
