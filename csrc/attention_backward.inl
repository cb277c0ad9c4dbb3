// Causal attention, backward. The probabilities are computed again from lse; dropout's from their positions:
//
//   P = exp(scale q k^T - lse)      keep = 0 or 1 / (1 - p)        delta[t] = sum over d of dO[t] out[t]
//   dV = (P keep)^T dO              dS = P (dO V^T keep - delta)   dQ = scale dS K      dK = scale dS^T Q
//
// As in the forward pass queries lie in the vector lanes (S^T, dS^T are (keys, queries)), and all five products of a
// tile are the register tile of matmul.inl. A task is one batch element, one key/value head and a share of the query
// panels, for all heads of the group; it converts the head's K and V to float32 once and keeps dK and dV in scratch
// memory. Where there are fewer heads than threads the panels of a head are dealt out to several tasks, and their dK,
// dV added up afterwards in order: no atomics, and the same bits at the same number of threads.

template <class T>
struct BackwardTask {
  const AttentionArgs& a;
  i64 b, h_kv, length, offset, D, D_padded;
  float *k, *v, *dk, *dv;  // (S, D), (S, D), (S, D_padded), (S, D_padded), float32

  // Packs rows (queries) x D as the right-hand operand [panel of D][query][width].
  static void pack_right(const T* from, i64 row, i64 count, i64 rows, i64 D, float* to) {
    for (i64 d0 = 0; d0 < D; d0 += TILE_COLS) {
      const i64 columns = min_of<i64>(TILE_COLS, D - d0), width = vectors_for(columns) * W;
      pack_panel(from + d0, row, 1, count, columns, to);
      memset(to + count * width, 0, size_t((rows - count) * width) * sizeof(float));
      to += rows * width;
    }
  }
  // C (keys, D_padded) += A^T-like panel (keys, width) x right (width, D)
  void accumulate(i64 keys, i64 width, const float* left, const float* right, float* c) const {
    for (i64 d0 = 0; d0 < D; d0 += TILE_COLS) {
      const i64 vectors = vectors_for(D - d0);
      panel_matmul(keys, vectors, width, left, width, 1, right, c + d0, D_padded, true);
      right += width * vectors * W;
    }
  }

  void panel(i64 h, i64 t0, float* memory) const {
    const i64 count = min_of<i64>(TILE_COLS, a.T - t0), vectors = vectors_for(count), width = vectors * W;
    const i64 key_end = min_of(length, t0 + count + offset), bh = b * a.H + h;
    float *q_t = memory, *grad_t = q_t + D * TILE_COLS, *q = grad_t + D * TILE_COLS, *grad = q + D_padded * TILE_COLS;
    float *dq_t = grad + D_padded * TILE_COLS, *p = dq_t + D * TILE_COLS, *ds = p + KEYS_PER_BLOCK * TILE_COLS;
    const T *q_rows = at<T>(a.q, a.q_stride, b, h, t0), *grad_rows = at<T>(a.grad_out, a.grad_out_stride, b, h, t0);
    pack_panel(q_rows, 1, a.q_stride[2], D, count, q_t);
    scale_panel(q_t, D * width, a.scale);
    pack_panel(grad_rows, 1, a.grad_out_stride[2], D, count, grad_t);
    pack_right(q_rows, a.q_stride[2], count, width, D, q);
    pack_right(grad_rows, a.grad_out_stride[2], count, width, D, grad);

    // delta is summed over d in the order of the tile products below: a query that sees one key then has dP equal to
    // delta to the bit, and its dS is the 0 that it should be.
    float lse[TILE_COLS], delta[TILE_COLS], scale[TILE_COLS], *out_t = dq_t;
    pack_panel(at<T>(a.out, a.out_stride, b, h, t0), 1, a.out_stride[2], D, count, out_t);
    for (i64 j = 0; j < width; j += W) {
      vf sum = zeros();
      for (i64 d = 0; d < D; d++) sum += load(grad_t + d * width + j) * load(out_t + d * width + j);
      store(delta + j, sum);
    }
    for (i64 j = 0; j < width; j++) {
      lse[j] = j < count ? a.lse[bh * a.T + t0 + j] : 0.0f;  // lanes beyond the last query have q = dO = 0: they add 0
      scale[j] = a.scale;
    }
    memset(dq_t, 0, size_t(D * width) * sizeof(float));

    for (i64 s0 = 0; s0 < key_end; s0 += KEYS_PER_BLOCK) {
      const i64 keys = min_of(KEYS_PER_BLOCK, key_end - s0);
      panel_matmul(keys, vectors, D, k + s0 * D, D, 1, q_t, p, width, false);
      panel_matmul(keys, vectors, D, v + s0 * D, D, 1, grad_t, ds, width, false);
      const bool crosses_diagonal = s0 + keys - 1 > t0 + offset;
      for (i64 i = 0; i < keys; i++) {
        float keep[TILE_COLS];
        if (a.dropout_p > 0) dropout_factors(a, s0 + i, t0, bh, width, keep);
        for (i64 j = 0; j < width; j += W) {
          float *p_at = p + i * width + j, *ds_at = ds + i * width + j;
          vf probability = exp(load(p_at) - load(lse + j)), grad_p = load(ds_at);
          if (crosses_diagonal) {
            const vi last_key = lane_index() + int32_t(t0 + j + offset);
            probability = splat_int(int32_t(s0 + i)) <= last_key ? probability : zeros();
          }
          vf dropped = probability;
          if (a.dropout_p > 0) {
            dropped *= load(keep + j);
            grad_p *= load(keep + j);
          }
          store(p_at, dropped);
          store(ds_at, probability * (grad_p - load(delta + j)));
        }
      }
      accumulate(keys, width, p, grad, dv + s0 * D_padded);
      accumulate(keys, width, ds, q, dk + s0 * D_padded);
      panel_matmul(D, vectors, keys, k + s0 * D, 1, D, ds, dq_t, width, true);
    }
    unpack_panel(dq_t, width, D, count, scale, at<T>(a.dq, a.dq_stride, b, h, t0), a.dq_stride[2]);
  }
};

template <class T>
void attention_backward_as(const AttentionArgs& a, const Threads& threads) {
  const i64 D = a.D, D_padded = round_up(D, W), heads = a.B * a.Hkv, group = a.H / a.Hkv;
  const i64 panels = ceil_div(a.T, TILE_COLS);
  i64 shares = 1;  // tasks a head is dealt out to: with 2 heads a thread or more, the queue alone balances them
  if (threads.count > 1) shares = min_of(panels * group, max_of<i64>(1, ceil_div(2 * threads.count, heads)));
  const i64 sums = a.S * D_padded;
  Scratch partials(heads * shares * 2 * sums);

  for_each_task(threads, heads * shares, [&](i64 task) {
    const i64 head = task / shares, share = task % shares, b = head / a.Hkv, h_kv = head % a.Hkv;
    const i64 length = a.kv_lengths ? a.kv_lengths[b] : a.S;
    Scratch kv(2 * a.S * D), memory((3 * D + 2 * D_padded + 2 * KEYS_PER_BLOCK) * TILE_COLS);
    float* dk = partials.data + task * 2 * sums;
    memset(dk, 0, size_t(2 * sums) * sizeof(float));
    const BackwardTask<T> work{a, b, h_kv, length, length - a.T, D, D_padded, kv.data, kv.data + a.S * D, dk, dk + sums};
    copy_rows(at<T>(a.k, a.k_stride, b, h_kv, 0), a.k_stride[2], length, D, work.k, D);
    copy_rows(at<T>(a.v, a.v_stride, b, h_kv, 0), a.v_stride[2], length, D, work.v, D);
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
  a.dtype == DType::f32 ? attention_backward_as<float>(a, threads) : attention_backward_as<bfloat16>(a, threads);
}
