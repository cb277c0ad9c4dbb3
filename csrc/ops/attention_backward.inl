// Attention, backward. The probabilities are computed again from lse; dropout's from their positions:
//
//   P = exp(scale q k^T - lse)      keep = 0 or 1 / (1 - p)        delta[t] = sum over d of dO[t] out[t]
//   dV = (P keep)^T dO              dS = P (dO V^T keep - delta)   dQ = scale dS K      dK = scale dS^T Q
//
// bfloat16 is multiplied in pairs as in the forward pass, with P and dS rounded for it. The products over queries need
// pairs of neighbouring lanes, as they lie in memory; dQ, summed over keys, needs dS in pairs of rows.
//
// As in the forward pass queries lie in the vector lanes (S^T, dS^T are (keys, queries)), and all five products of a
// tile are the register tile of matmul.inl. A task is one batch element, one key/value head and a share of the query
// panels, for all heads of the group; it converts the head's K and V to float32 once and keeps dK and dV in scratch
// memory. Where there are fewer heads than threads the panels of a head are dealt out to several tasks, and their dK,
// dV added up afterwards in order: no atomics, and the same bits at the same number of threads.

template <bool PAIRS, class T>
struct BackwardTask {
  static constexpr i64 UNIT = PAIRS ? 2 : 1;
  const AttentionArgs& a;
  Sight sight;
  i64 b, h_kv, D, D_padded;
  float *k, *v, *k_by_rows;  // (S, D) each; k_by_rows, in blocks, is for products over the keys
  float *dk, *dv;            // (S, D_padded), float32

  // Rows x D in float32, or in pairs of neighbours in a row.
  static void take_rows(const T* from, i64 row, i64 rows, i64 D, float* to) {
    if constexpr (PAIRS)
      pair_columns(from, row, rows, D, to);
    else
      copy_rows(from, row, rows, D, to, D);
  }
  static void pack(const T* from, i64 row, i64 col, i64 k, i64 columns, float* to) {
    if constexpr (PAIRS)
      pack_panel_pairs(from, row, col, k, columns, to);
    else
      pack_panel(from, row, col, k, columns, to);
  }

  // Packs rows (queries) x D as the right-hand operand [panel of D][query][width].
  static void pack_right(const T* from, i64 row, i64 count, i64 rows, i64 D, float* to) {
    for (i64 d0 = 0; d0 < D; d0 += TILE_COLS) {
      const i64 columns = min_of<i64>(TILE_COLS, D - d0), width = vectors_for(columns) * W;
      pack(from + d0, row, 1, count, columns, to);
      const i64 used = ceil_div(count, UNIT), units = rows / UNIT;
      memset(to + used * width, 0, size_t((units - used) * width) * sizeof(float));
      to += units * width;
    }
  }
  // C (keys, D_padded) += left (keys, queries) x right (queries, D), over the queries that reach the keys.
  void accumulate(const Reach& reach, i64 keys, const float* left, const float* right, float* c) const {
    const i64 width = reach.vectors * W, units = width / UNIT;
    for (i64 d0 = 0; d0 < D; d0 += TILE_COLS) {
      const i64 vectors = vectors_for(D - d0);
      const bool whole = reach.all || on_tile_registers<PAIRS>();
      if (whole) panel_matmul<PAIRS>(keys, vectors, units, left, units, 1, right, c + d0, D_padded, true);
      for (i64 i = 0; i < keys && !whole; i += TILE_ROWS) {
        const i64 first = reach.first_vector(i) * W / UNIT, end = reach.end_vector(i) * W / UNIT;
        if (first < end)
          panel_matmul<PAIRS>(min_of<i64>(TILE_ROWS, keys - i), vectors, end - first, left + i * units + first, units, 1,
                              right + first * vectors * W, c + i * D_padded + d0, D_padded, true);
      }
      right += units * vectors * W;
    }
  }

  // The keys of the block at s0 for products over them: taken there, and found again.
  void take_block(const T* from, i64 row, i64 s0) const {
    if constexpr (PAIRS) pair_rows(from + s0 * row, row, min_of(KEYS_PER_BLOCK, sight.length - s0), D, block(s0));
  }
  float* block(i64 s0) const { return k_by_rows + s0 / UNIT * D; }
  Columns columns_of(i64 s0) const {
    if constexpr (PAIRS) return paired_rows(block(s0), min_of(KEYS_PER_BLOCK, sight.length - s0), D);
    return {block(s0), 1, D};
  }

  static i64 panel_floats(i64 D, i64 D_padded) {
    return (3 * D + 2 * D_padded + (PAIRS ? 3 : 2) * KEYS_PER_BLOCK) * TILE_COLS;
  }

  void panel(i64 h, i64 t0, float* memory) const {
    const i64 count = min_of<i64>(TILE_COLS, a.T - t0), vectors = vectors_for(count), width = vectors * W;
    const i64 key_end = sight.end(t0 + count - 1), bh = b * a.H + h, D_units = ceil_div(D, UNIT);
    float *q_t = memory, *grad_t = q_t + D * TILE_COLS, *q = grad_t + D * TILE_COLS, *grad = q + D_padded * TILE_COLS;
    float *dq_t = grad + D_padded * TILE_COLS, *p = dq_t + D * TILE_COLS, *ds = p + KEYS_PER_BLOCK * TILE_COLS;
    // In bfloat16, one after the other, behind the float32 that they are made of; ds in pairs of rows takes ds's place.
    bfloat16* p_rows = reinterpret_cast<bfloat16*>(ds + KEYS_PER_BLOCK * TILE_COLS);
    bfloat16* ds_rows = p_rows + KEYS_PER_BLOCK * TILE_COLS;
    const T *q_rows = at<T>(a.q, a.q_stride, b, h, t0), *grad_rows = at<T>(a.grad_out, a.grad_out_stride, b, h, t0);
    pack(q_rows, 1, a.q_stride[2], D, count, q_t);
    if (!PAIRS) scale_panel(q_t, D * width, a.scale);
    pack(grad_rows, 1, a.grad_out_stride[2], D, count, grad_t);
    pack_right(q_rows, a.q_stride[2], count, width, D, q);
    pack_right(grad_rows, a.grad_out_stride[2], count, width, D, grad);

    // delta is summed over d in the order of the tile products below: a query that sees one key then has dP equal to
    // delta to the bit, and its dS is the 0 that it should be.
    float lse[TILE_COLS], delta[TILE_COLS], scale[TILE_COLS], *out_t = dq_t;
    pack(at<T>(a.out, a.out_stride, b, h, t0), 1, a.out_stride[2], D, count, out_t);
    for (i64 j = 0; j < width; j += W) {
      vf sum = zeros();
      for (i64 d = 0; d < D_units; d++)
        sum = multiply_add<PAIRS>(sum, load(grad_t + d * width + j), load(out_t + d * width + j));
      store(delta + j, sum);
    }
    for (i64 j = 0; j < width; j++) {
      lse[j] = j < count ? a.lse[bh * a.T + t0 + j] : 0.0f;  // lanes beyond the last query have q = dO = 0: they add 0
      scale[j] = a.scale;
    }
    memset(dq_t, 0, size_t(D * width) * sizeof(float));

    for (i64 s0 = sight.first(t0) / KEYS_PER_BLOCK * KEYS_PER_BLOCK; s0 < key_end; s0 += KEYS_PER_BLOCK) {
      const i64 keys = min_of(KEYS_PER_BLOCK, key_end - s0);
      const Reach reach(sight, vectors, t0, s0, keys);
      score_product<PAIRS>(reach, keys, D_units, k + s0 * D_units, q_t, p);
      score_product<PAIRS>(reach, keys, D_units, v + s0 * D_units, grad_t, ds);
      // The probability of key s0 + i for the queries from t0 + j on; 0 for those that may not see it.
      const auto probability_of = [&](i64 i, i64 j) {
        const vf s = load(p + i * width + j), e = exp(PAIRS ? s * a.scale - load(lse + j) : s - load(lse + j));
        if (reach.all) return e;
        return Lanes(sight, t0 + j, s0).see(i) ? e : zeros();
      };
      if constexpr (PAIRS) {
        for (i64 i = 0; i < keys; i += 2)
          for (i64 j = reach.first_vector(i) * W; j < reach.end_vector(i) * W; j += W) {
            vf pair[2] = {zeros(), zeros()};
            for (i64 r = 0; r < min_of<i64>(2, keys - i); r++) {
              const vf probability = probability_of(i + r, j);
              pair[r] = probability * (load(ds + (i + r) * width + j) - load(delta + j));
              store(p_rows + (i + r) * width + j, probability);
              store(ds_rows + (i + r) * width + j, pair[r]);
            }
            store(ds + i / 2 * width + j, round_to_pairs(pair[0], pair[1]));
          }
        if (on_tile_registers<PAIRS>() && !reach.all)
          for (i64 i = 0; i < keys; i++)
            for (i64 j = 0; j < width; j += W)
              if (j < reach.first_vector(i) * W || j >= reach.end_vector(i) * W) {
                store(p_rows + i * width + j, zeros());
                store(ds_rows + i * width + j, zeros());
                store(ds + i / 2 * width + j, zeros());
              }
        accumulate(reach, keys, reinterpret_cast<const float*>(p_rows), grad, dv + s0 * D_padded);
        accumulate(reach, keys, reinterpret_cast<const float*>(ds_rows), q, dk + s0 * D_padded);
      } else {
        for (i64 i = 0; i < keys; i++) {
          float keep[TILE_COLS];
          if (a.dropout_p > 0) dropout_factors(a, s0 + i, t0, bh, width, keep);
          for (i64 j = reach.first_vector(i) * W; j < reach.end_vector(i) * W; j += W) {
            float *p_at = p + i * width + j, *ds_at = ds + i * width + j;
            const vf probability = probability_of(i, j);
            vf dropped = probability, grad_p = load(ds_at);
            if (a.dropout_p > 0) {
              dropped *= load(keep + j);
              grad_p *= load(keep + j);
            }
            store(p_at, dropped);
            store(ds_at, probability * (grad_p - load(delta + j)));
          }
        }
        accumulate(reach, keys, p, grad, dv + s0 * D_padded);
        accumulate(reach, keys, ds, q, dk + s0 * D_padded);
      }
      value_product<PAIRS>(reach, keys, D, columns_of(s0), ds, dq_t);
    }
    unpack_panel(dq_t, width, D, count, scale, at<T>(a.dq, a.dq_stride, b, h, t0), a.dq_stride[2]);
  }
};

template <bool PAIRS, class T>
void attention_backward_as(const AttentionArgs& a, const Threads& threads) {
  const i64 D = a.D, D_padded = round_up(D, W), heads = a.B * a.Hkv, group = a.H / a.Hkv;
  const i64 panels = ceil_div(a.T, TILE_COLS);
  i64 shares = 1;  // tasks a head is dealt out to: with 2 heads a thread or more, the queue alone balances them
  if (threads.count > 1) shares = min_of(panels * group, max_of<i64>(1, ceil_div(2 * threads.count, heads)));
  const i64 sums = a.S * D_padded;
  Scratch partials(heads * shares * 2 * sums);

  for_each_task(threads, heads * shares, [&](i64 task) {
    const i64 head = task / shares, share = task % shares, b = head / a.Hkv, h_kv = head % a.Hkv;
    const Sight sight(a, b);
    Scratch kv((PAIRS ? 3 : 2) * a.S * D), memory(BackwardTask<PAIRS, T>::panel_floats(D, D_padded));
    float* dk = partials.data + task * 2 * sums;
    memset(dk, 0, size_t(2 * sums) * sizeof(float));
    float *k = kv.data, *v = k + a.S * D, *k_by_rows = PAIRS ? v + a.S * D : k;
    const BackwardTask<PAIRS, T> work{a, sight, b, h_kv, D, D_padded, k, v, k_by_rows, dk, dk + sums};
    const T* k_rows = at<T>(a.k, a.k_stride, b, h_kv, 0);
    work.take_rows(k_rows, a.k_stride[2], sight.length, D, k);
    work.take_rows(at<T>(a.v, a.v_stride, b, h_kv, 0), a.v_stride[2], sight.length, D, v);
    for (i64 s0 = 0; s0 < sight.length; s0 += KEYS_PER_BLOCK) work.take_block(k_rows, a.k_stride[2], s0);
    for (i64 i = share; i < panels * group; i += shares)
      work.panel(h_kv * group + i / panels, i % panels * TILE_COLS, memory.data);
  });

  constexpr i64 KEYS = 64;
  const i64 runs = ceil_div(a.S, KEYS);
  for_each_task(threads, heads * runs, [&](i64 task) {
    const i64 head = task / runs, b = head / a.Hkv, h_kv = head % a.Hkv;
    for (i64 s = task % runs * KEYS; s < min_of(a.S, (task % runs + 1) * KEYS); s++) {
      const float* from = partials.data + head * shares * 2 * sums + s * D_padded;
      T *dk = at<T>(a.dk, a.dk_stride, b, h_kv, s), *dv = at<T>(a.dv, a.dv_stride, b, h_kv, s);
      for (i64 d = 0; d < D; d += W) {
        vf sum_k = zeros(), sum_v = zeros();
        for (i64 i = 0; i < shares; i++) {
          sum_k += load(from + i * 2 * sums + d);
          sum_v += load(from + i * 2 * sums + sums + d);
        }
        store_upto(dk + d, sum_k * a.scale, D - d);
        store_upto(dv + d, sum_v, D - d);
      }
    }
  });
}

void attention_backward(const AttentionArgs& a, const Threads& threads) {
  if (a.dtype == DType::f32) return attention_backward_as<false, float>(a, threads);
  if (a.dropout_p > 0) return attention_backward_as<false, bfloat16>(a, threads);
  attention_backward_as<multiplies_pairs<bfloat16, bfloat16>(), bfloat16>(a, threads);
}
