// Attention for one to four queries a head, as in decoding: the same formula as attention.inl, bound by reading
// the keys and values, each of which is read once.
//
// A task is one batch element, one key/value head and a run of 256 keys, for all the queries that share them (the
// group's heads times T rows). W keys at a time give W dot products, summed across lanes together. Where a head has
// several runs each leaves its maximum, sum and unnormalised output, merged afterwards in the order of the keys; the
// runs have a fixed length, so the result does not depend on the number of threads.

constexpr i64 KEYS_PER_RUN = 256;

// Two bfloat16 in each four bytes: the even elements of 2 W neighbours, and the odd ones. Half the work of widening W at
// a time, if whatever they are multiplied with is kept in this order too.
struct EvenOdd {
  vf even, odd;
};
LLMFAST_INLINE EvenOdd load_even_odd(const bfloat16* p) {
  const vu pairs = (vu)load(reinterpret_cast<const float*>(p));
  return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)};
}

// The scores of `keys` keys for `rows` queries: scores[r][i] = q[r] . k[i]; q is padded with zeros to D_padded.
template <class T>
void decode_scores(const float* q, i64 rows, i64 D, i64 D_padded, const T* k, i64 k_row, i64 keys, float* scores) {
  const i64 D_whole = D / W * W;
  for (i64 i0 = 0; i0 < keys; i0 += W) {
    const i64 n = min_of<i64>(W, keys - i0);
    for (i64 r = 0; r < rows; r++) {
      const float* query = q + r * D_padded;
      vf sums[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) sums[i] = zeros();
      for (i64 d = 0; d < D_whole; d += W) {
        const vf x = load(query + d);
        if (n == W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) sums[i] += x * load(k + (i0 + i) * k_row + d);
        } else {
          for (int i = 0; i < n; i++) sums[i] += x * load(k + (i0 + i) * k_row + d);
        }
      }
      if (D_whole < D)
        for (int i = 0; i < n; i++) sums[i] += load(query + D_whole) * load_n(k + (i0 + i) * k_row + D_whole, D - D_whole);
      store(scores + r * KEYS_PER_RUN + i0, sum_each(sums));
    }
  }
}

// The same for bfloat16 keys of whole vectors of pairs.
inline void decode_scores_of_pairs(const float* q, i64 rows, i64 D, i64 D_padded, const bfloat16* k, i64 k_row, i64 keys,
                                   float* scores) {
  Scratch split(rows * D);  // for every 2 W elements of a query the even ones, then the odd ones
  for (i64 r = 0; r < rows; r++)
    for (i64 d = 0; d < D; d += 2 * W) {
      const vf first = load(q + r * D_padded + d), second = load(q + r * D_padded + d + W);
      store(split.data + r * D + d, evens(first, second));
      store(split.data + r * D + d + W, odds(first, second));
    }
  for (i64 i0 = 0; i0 < keys; i0 += W) {
    const i64 n = min_of<i64>(W, keys - i0);
    for (i64 r = 0; r < rows; r++) {
      const float* query = split.data + r * D;
      vf sums[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) sums[i] = zeros();
      for (i64 d = 0; d < D; d += 2 * W) {
        const vf even = load(query + d), odd = load(query + d + W);
        if (n == W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) {
            const EvenOdd key = load_even_odd(k + (i0 + i) * k_row + d);
            sums[i] += even * key.even + odd * key.odd;
          }
        } else {
          for (int i = 0; i < n; i++) {
            const EvenOdd key = load_even_odd(k + (i0 + i) * k_row + d);
            sums[i] += even * key.even + odd * key.odd;
          }
        }
      }
      store(scores + r * KEYS_PER_RUN + i0, sum_each(sums));
    }
  }
}

LLMFAST_INLINE void decode_scores(const float* q, i64 rows, i64 D, i64 D_padded, const bfloat16* k, i64 k_row, i64 keys,
                                  float* scores) {
  if (D % (2 * W) == 0)
    decode_scores_of_pairs(q, rows, D, D_padded, k, k_row, keys, scores);
  else
    decode_scores<bfloat16>(q, rows, D, D_padded, k, k_row, keys, scores);
}

// out[d] = sum over i of p[i] v[i][d]
template <class T>
void decode_values(const float* p, i64 keys, i64 D, const T* v, i64 v_row, float* out) {
  i64 d = 0;
  for (; d + 4 * W <= D; d += 4 * W) {
    vf o0 = zeros(), o1 = zeros(), o2 = zeros(), o3 = zeros();
    for (i64 i = 0; i < keys; i++) {
      const T* row = v + i * v_row + d;
      o0 += p[i] * load(row);
      o1 += p[i] * load(row + W);
      o2 += p[i] * load(row + 2 * W);
      o3 += p[i] * load(row + 3 * W);
    }
    store(out + d, o0);
    store(out + d + W, o1);
    store(out + d + 2 * W, o2);
    store(out + d + 3 * W, o3);
  }
  for (; d < D; d += W) {
    const i64 n = min_of<i64>(W, D - d);
    vf o = zeros();
    for (i64 i = 0; i < keys; i++) o += p[i] * load_upto(v + i * v_row + d, n);
    store(out + d, o);
  }
}

// The same for bfloat16 values, by pairs as far as they go.
inline void decode_values(const float* p, i64 keys, i64 D, const bfloat16* v, i64 v_row, float* out) {
  i64 d = 0;
  for (; d + 4 * W <= D; d += 4 * W) {
    vf e0 = zeros(), o0 = zeros(), e1 = zeros(), o1 = zeros();
    for (i64 i = 0; i < keys; i++) {
      const bfloat16* row = v + i * v_row + d;
      const EvenOdd first = load_even_odd(row), second = load_even_odd(row + 2 * W);
      e0 += p[i] * first.even;
      o0 += p[i] * first.odd;
      e1 += p[i] * second.even;
      o1 += p[i] * second.odd;
    }
    store(out + d, interleave_low(e0, o0));
    store(out + d + W, interleave_high(e0, o0));
    store(out + d + 2 * W, interleave_low(e1, o1));
    store(out + d + 3 * W, interleave_high(e1, o1));
  }
  if (d < D) decode_values<bfloat16>(p, keys, D - d, v + d, v_row, out + d);
}

template <class T>
void attention_decode(const AttentionArgs& a, const Threads& threads) {
  const i64 D = a.D, D_padded = round_up(D, W), group = a.H / a.Hkv, rows = group * a.T;
  i64 longest = a.kv_lengths ? 0 : a.S;
  if (a.kv_lengths)
    for (i64 b = 0; b < a.B; b++) longest = max_of(longest, a.kv_lengths[b]);
  const i64 runs = max_of<i64>(1, ceil_div(longest, KEYS_PER_RUN));
  const i64 row_floats = D_padded + 2;  // unnormalised output, maximum, sum
  Scratch partials(a.B * a.Hkv * runs * rows * row_floats);

  for_each_task(threads, a.B * a.Hkv * runs, [&](i64 task) {
    const i64 run = task % runs, h_kv = task / runs % a.Hkv, b = task / runs / a.Hkv, s0 = run * KEYS_PER_RUN;
    const Sight sight(a, b);
    // The keys of this run that some query sees, from a whole vector on.
    const i64 from = max_of<i64>(0, sight.first(0) - s0) / W * W, to = min_of(KEYS_PER_RUN, sight.end(a.T - 1) - s0);
    float* partial = partials.data + task * rows * row_floats;
    if (from >= to) {  // the merge below takes no notice of a run whose sum is 0
      for (i64 r = 0; r < rows; r++) partial[r * row_floats + D_padded] = -INFINITY, partial[r * row_floats + D_padded + 1] = 0;
      return;
    }
    Scratch memory(rows * (D_padded + KEYS_PER_RUN));
    float *q = memory.data, *scores = q + rows * D_padded;
    for (i64 r = 0; r < rows; r++) {  // row r is head h_kv * group + r / T, query r % T
      const T* from = at<T>(a.q, a.q_stride, b, h_kv * group + r / a.T, r % a.T);
      for (i64 d = 0; d < D_padded; d++) q[r * D_padded + d] = d < D ? to_float(from[d]) * a.scale : 0.0f;
    }
    const T *k = at<T>(a.k, a.k_stride, b, h_kv, s0 + from), *v = at<T>(a.v, a.v_stride, b, h_kv, s0);
    decode_scores(q, rows, D, D_padded, k, a.k_stride[2], to - from, scores + from);
    for (i64 r = 0; r < rows; r++) {
      float *out = partial + r * row_floats, *p = scores + r * KEYS_PER_RUN, &top = out[D_padded], &sum = out[D_padded + 1];
      const i64 first = max_of(from, sight.first(r % a.T) - s0), end = min_of(to, sight.end(r % a.T) - s0);
      top = -INFINITY;
      sum = 0.0f;
      if (first >= end) continue;
      const i64 begin = first / W * W;
      for (i64 i = begin; i < first; i++) p[i] = -INFINITY;
      for (i64 i = end; i < round_up(end, W); i++) p[i] = -INFINITY;
      vf high = splat(-INFINITY), total = zeros();
      for (i64 i = begin; i < end; i += W) high = vmax(load(p + i), high);
      top = max_lanes(high);
      const float pivot = top == -INFINITY ? 0.0f : top;
      for (i64 i = begin; i < end; i += W) {
        const vf e = exp_nonpositive(load(p + i) - pivot);
        store(p + i, e);
        total += e;
      }
      sum = sum_lanes(total);
      decode_values(p + first, end - first, D, v + first * a.v_stride[2], a.v_stride[2], out);
    }
  });

  const auto merge = [&](i64 i) {
    const i64 r = i % rows, h_kv = i / rows % a.Hkv, b = i / rows / a.Hkv, h = h_kv * group + r / a.T, t = r % a.T;
    const float* first = partials.data + ((b * a.Hkv + h_kv) * runs * rows + r) * row_floats;
    const i64 step = rows * row_floats;
    float top = -INFINITY, sum = 0.0f;
    for (i64 run = 0; run < runs; run++) top = max_of(top, first[run * step + D_padded]);
    float factor[256];  // 65536 keys; longer contexts compute their factors again for every vector below
    const auto factor_of = [&](i64 run) { return ::expf(first[run * step + D_padded] - top); };
    for (i64 run = 0; run < runs; run++) {
      const float run_sum = first[run * step + D_padded + 1];
      const float f = run_sum == 0.0f ? 0.0f : factor_of(run);
      if (run < 256) factor[run] = f;
      sum += run_sum * f;
    }
    T* out = at<T>(a.out, a.out_stride, b, h, t);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (i64 d = 0; d < D; d += W) {
      const i64 n = min_of<i64>(W, D - d);
      vf o = zeros();
      for (i64 run = 0; run < runs; run++) {
        if (first[run * step + D_padded + 1] == 0.0f) continue;
        o += load(first + run * step + d) * (run < 256 ? factor[run] : factor_of(run));
      }
      store_upto(out + d, o * inverse, n);
    }
    a.lse[(b * a.H + h) * a.T + t] = sum == 0.0f ? -INFINITY : top + ::logf(sum);
  };
  for (i64 i = 0; i < a.B * a.Hkv * rows; i++) merge(i);
}
