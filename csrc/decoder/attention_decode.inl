// Attention for one to four queries a head, as in decoding: the same formula as attention.inl, bound by reading
// the keys and values, each of which is read once.
//
// A task is one batch element, one key/value head and a run of 256 keys, for all the queries that share them (the
// group's heads times T rows). W keys at a time give W dot products, summed across lanes together. Where a head has
// several runs each leaves its maximum, sum and unnormalised output, merged afterwards in the order of the keys; the
// runs have a fixed length, so the result does not depend on the number of threads.

constexpr i64 KEYS_PER_RUN = 256;

// Two vectors of keys or values in float32: neighbours of bfloat16 are the halves of four bytes, so that taking them apart
// by even and odd is half the work of widening a vector at a time. What they are multiplied with has the same order.
struct TwoVectors {
  vf first, second;
};
template <class T>
struct InOrder {  // of floats: as they lie
  static LLMFAST_INLINE TwoVectors load_two(const T* p) { return {load(p), load(p + W)}; }
  static LLMFAST_INLINE TwoVectors of(TwoVectors a) { return a; }
  static LLMFAST_INLINE TwoVectors back(TwoVectors a) { return a; }
};
template <>
struct InOrder<bfloat16> {
  static LLMFAST_INLINE TwoVectors load_two(const bfloat16* p) {
    const vu pairs = (vu)load(reinterpret_cast<const float*>(p));
    return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)};
  }
  static LLMFAST_INLINE TwoVectors of(TwoVectors a) { return {evens(a.first, a.second), odds(a.first, a.second)}; }
  static LLMFAST_INLINE TwoVectors back(TwoVectors a) {
    return {interleave_low(a.first, a.second), interleave_high(a.first, a.second)};
  }
};

// f(row, Count<N>) for all rows, N of them at once: as many queries as there are registers for, shared out evenly.
constexpr i64 MOST_AT_ONCE = W == 16 ? 3 : 2;
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class F>
LLMFAST_INLINE void for_rows_at_once(i64 rows, const F& f) {
  for (i64 r = 0; r < rows;) {
    const i64 left = rows - r, n = ceil_div(left, ceil_div(left, MOST_AT_ONCE));
    if (n == 1) f(r, Count<1>{});
    if (n == 2) f(r, Count<2>{});
    if (n == 3) f(r, Count<3>{});
    r += n;
  }
}

// While keys or values are read, others of the same shape may be on their way already: `next`, or null.
template <class T>
LLMFAST_INLINE void prefetch_row(const T* next, i64 columns) {
  for (i64 d = 0; d < columns; d += 64 / i64(sizeof(T))) prefetch(next + d);
}

// out[r][i] = q[r] . k[i] for ROWS queries, in the order of the keys' pairs, and up to W keys, each read once. D is a
// multiple of 2 W.
template <int ROWS, class T>
LLMFAST_INLINE void dot_products(const float* q, i64 D, const T* k, i64 k_row, i64 keys, const T* next, i64 next_row,
                                 float* out) {
  constexpr int AT_ONCE = ROWS == 1 ? W : W / 2;
  vf sums[ROWS][W];
#pragma GCC unroll 2
  for (int i0 = 0; i0 < W; i0 += AT_ONCE) {
    vf sum[ROWS][AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int i = 0; i < AT_ONCE; i++) sum[r][i] = zeros();
    for (i64 d = 0; d < D; d += 2 * W)
#pragma GCC unroll 16
      for (int i = 0; i < AT_ONCE; i++) {
        const TwoVectors key = InOrder<T>::load_two(k + min_of<i64>(i0 + i, keys - 1) * k_row + d);
        prefetch_row(next + (i0 + i) * next_row + d, 2 * W);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          sum[r][i] += load(q + r * D + d) * key.first;
          sum[r][i] += load(q + r * D + d + W) * key.second;
        }
      }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int i = 0; i < AT_ONCE; i++) sums[r][i0 + i] = sum[r][i];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) store(out + r * KEYS_PER_RUN, sum_each(sums[r]));
}

// The scores of `keys` keys for `rows` queries: scores[r][i] = q[r] . k[i], where i fills a vector with anything; q is
// padded with zeros to D_padded.
template <class T>
void decode_scores(const float* q, i64 rows, i64 D, i64 D_padded, const T* k, i64 k_row, i64 keys, const T* next,
                   i64 next_row, float* scores) {
  if (D % (2 * W) == 0) {
    Scratch ordered(rows * D);
    for (i64 i = 0; i < rows * D; i += 2 * W) {
      const TwoVectors a = InOrder<T>::of({load(q + i), load(q + i + W)});
      store(ordered.data + i, a.first);
      store(ordered.data + i + W, a.second);
    }
    for (i64 i = 0; i < keys; i += W)
      for_rows_at_once(rows, [&](i64 r, auto n) {
        dot_products<n.value>(ordered.data + r * D, D, k + i * k_row, k_row, min_of<i64>(W, keys - i),
                              (r ? k : next) + i * next_row, next_row, scores + r * KEYS_PER_RUN + i);
      });
    return;
  }
  const i64 D_whole = D / W * W;
  for (i64 i0 = 0; i0 < keys; i0 += W)
    for (i64 r = 0; r < rows; r++) {
      vf sums[W];
      for (int i = 0; i < W; i++) {
        const T* key = k + min_of(i0 + i, keys - 1) * k_row;
        sums[i] = zeros();
        for (i64 d = 0; d < D_whole; d += W) sums[i] += load(q + r * D_padded + d) * load(key + d);
        if (D_whole < D) sums[i] += load(q + r * D_padded + D_whole) * load_n(key + D_whole, D - D_whole);
      }
      store(scores + r * KEYS_PER_RUN + i0, sum_each(sums));
    }
}

// out[r][d] = sum over i of p[r][i] v[i][d] for ROWS rows and as many pairs of vectors from v on.
template <int ROWS, int PAIRS, class T>
LLMFAST_INLINE void weighted_sums(const float* p, i64 p_row, i64 keys, const T* v, i64 v_row, const T* next, i64 next_row,
                                  float* out, i64 out_row) {
  TwoVectors sum[ROWS][PAIRS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int j = 0; j < PAIRS; j++) sum[r][j] = {zeros(), zeros()};
  for (i64 i = 0; i < keys; i++) {
    prefetch_row(next + i * next_row, PAIRS * 2 * W);
    TwoVectors value[PAIRS];
#pragma GCC unroll 4
    for (int j = 0; j < PAIRS; j++) value[j] = InOrder<T>::load_two(v + i * v_row + j * 2 * W);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int j = 0; j < PAIRS; j++) {
        sum[r][j].first += p[r * p_row + i] * value[j].first;
        sum[r][j].second += p[r * p_row + i] * value[j].second;
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int j = 0; j < PAIRS; j++) {
      const TwoVectors a = InOrder<T>::back(sum[r][j]);
      store(out + r * out_row + j * 2 * W, a.first);
      store(out + r * out_row + j * 2 * W + W, a.second);
    }
}

// out[r][d] = sum over i of p[r][i] v[i][d]; every value is read once for some rows.
template <class T>
void decode_values(i64 rows, const float* p, i64 p_row, i64 keys, i64 D, const T* v, i64 v_row, const T* next, i64 next_row,
                   float* out, i64 out_row) {
  for_rows_at_once(rows, [&](i64 r, auto n) {
    const float* weights = p + r * p_row;
    float* to = out + r * out_row;
    const auto sums = [&](i64 d, auto pairs) {
      const T* then = (next && r == 0 ? next : v) + d;
      weighted_sums<n.value, pairs.value>(weights, p_row, keys, v + d, v_row, then, next_row, to + d, out_row);
    };
    i64 d = 0;
    for (; d + 4 * W <= D; d += 4 * W) sums(d, Count<2>{});
    for (; d + 2 * W <= D; d += 2 * W) sums(d, Count<1>{});
    for (; d < D; d += W)
      for (i64 i = 0; i < n.value; i++) {
        vf sum = zeros();
        for (i64 key = 0; key < keys; key++) sum += weights[i * p_row + key] * load_upto(v + key * v_row + d, D - d);
        store(to + i * out_row + d, sum);
      }
  });
}

// What a run of keys gives a query: D floats of output that are not divided yet, padded to whole vectors, then the largest
// score and the sum of the exponentials.
LLMFAST_INLINE i64 partial_floats(i64 D) { return round_up(D, W) + 2; }

// exp(p - their maximum) for the keys from `first` to before `end`, in place, and its maximum and sum.
LLMFAST_INLINE void softmax_of_run(float* p, i64 first, i64 end, float* top, float* sum) {
  const i64 begin = first / W * W;
  for (i64 i = begin; i < first; i++) p[i] = -INFINITY;
  for (i64 i = end; i < round_up(end, W); i++) p[i] = -INFINITY;
  vf high = splat(-INFINITY), total = zeros();
  for (i64 i = begin; i < end; i += W) high = vmax(load(p + i), high);
  *top = max_lanes(high);
  const float pivot = *top == -INFINITY ? 0.0f : *top;
  for (i64 i = begin; i < end; i += W) {
    const vf e = exp_nonpositive(load(p + i) - pivot);
    store(p + i, e);
    total += e;
  }
  *sum = sum_lanes(total);
}

// A run of keys for `heads` heads of `queries` queries each: q (heads, queries, D_padded), already scaled, and `partials`
// after it in the same order. `first` and `end` give the keys of the run that a query sees, which only grow with it. Where
// `goes_on`, the keys behind this run will be read next.
template <class T, class First, class End>
void attend_run(const float* q, i64 heads, i64 queries, i64 D, const T* k, i64 k_row, const T* v, i64 v_row,
                const First& first, const End& end, bool goes_on, float* partials) {
  const i64 rows = heads * queries, D_padded = round_up(D, W), row_floats = partial_floats(D);
  const i64 from = first(0) / W * W, to = end(queries - 1);
  Scratch scores(rows * KEYS_PER_RUN);
  if (from < to)
    decode_scores(q, rows, D, D_padded, k + from * k_row, k_row, to - from, v + from * v_row, v_row, scores.data + from);
  for (i64 t = 0; t < queries; t++) {
    const i64 seen = max_of<i64>(0, end(t) - first(t));
    for (i64 r = t; r < rows; r += queries) {
      float *top = partials + r * row_floats + D_padded, *sum = top + 1;
      *top = -INFINITY;  // of a run that the query does not see
      *sum = 0.0f;
      if (seen) softmax_of_run(scores.data + r * KEYS_PER_RUN, first(t), end(t), top, sum);
    }
    if (seen)
      decode_values(heads, scores.data + t * KEYS_PER_RUN + first(t), queries * KEYS_PER_RUN, seen, D, v + first(t) * v_row,
                    v_row, goes_on && t == 0 ? k + KEYS_PER_RUN * k_row : nullptr, k_row, partials + t * row_floats,
                    queries * row_floats);
  }
}

// Adds up what runs of keys, `stride` floats apart, gave a query: its output, and the logarithm of the sum of all
// exponentials, -infinity where it saw no key.
template <class T>
LLMFAST_INLINE float merge_runs(const float* partials, i64 stride, i64 runs, i64 D, T* out) {
  const i64 D_padded = round_up(D, W), vectors = D_padded / W;
  float top = -INFINITY, sum = 0.0f;
  for (i64 run = 0; run < runs; run++) top = max_of(top, partials[run * stride + D_padded]);
  constexpr i64 AT_ONCE = 16;
  vf o[AT_ONCE];
  for (i64 j0 = 0; j0 < vectors; j0 += AT_ONCE) {
    const i64 n = min_of(AT_ONCE, vectors - j0);
    for (i64 j = 0; j < n; j++) o[j] = zeros();
    sum = 0.0f;
    for (i64 run = 0; run < runs; run++) {
      const float* partial = partials + run * stride;
      if (partial[D_padded + 1] == 0.0f) continue;
      const float factor = runs == 1 ? 1.0f : ::expf(partial[D_padded] - top);
      sum += partial[D_padded + 1] * factor;
      for (i64 j = 0; j < n; j++) o[j] += load(partial + (j0 + j) * W) * factor;
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (i64 j = 0; j < n; j++) store_upto(out + (j0 + j) * W, o[j] * inverse, D - (j0 + j) * W);
  }
  return sum == 0.0f ? -INFINITY : top + ::logf(sum);
}

template <class T>
void attention_decode(const AttentionArgs& a, const Threads& threads) {
  const i64 D = a.D, D_padded = round_up(D, W), group = a.H / a.Hkv, rows = group * a.T, row_floats = partial_floats(D);
  i64 longest = a.kv_lengths ? 0 : a.S;
  if (a.kv_lengths)
    for (i64 b = 0; b < a.B; b++) longest = max_of(longest, a.kv_lengths[b]);
  const i64 runs = max_of<i64>(1, ceil_div(longest, KEYS_PER_RUN));
  Scratch partials(a.B * a.Hkv * runs * rows * row_floats);

  for_each_task(threads, a.B * a.Hkv * runs, [&](i64 task) {
    const i64 run = task % runs, h_kv = task / runs % a.Hkv, b = task / runs / a.Hkv, s0 = run * KEYS_PER_RUN;
    const Sight sight(a, b);
    Scratch q(rows * D_padded);
    for (i64 r = 0; r < rows; r++) {  // row r is head h_kv * group + r / T, query r % T
      const T* from = at<T>(a.q, a.q_stride, b, h_kv * group + r / a.T, r % a.T);
      for (i64 d = 0; d < D_padded; d++) q.data[r * D_padded + d] = d < D ? to_float(from[d]) * a.scale : 0.0f;
    }
    attend_run(
        q.data, group, a.T, D, at<T>(a.k, a.k_stride, b, h_kv, s0), a.k_stride[2], at<T>(a.v, a.v_stride, b, h_kv, s0),
        a.v_stride[2], [&](i64 t) { return max_of<i64>(0, sight.first(t) - s0); },
        [&](i64 t) { return min_of(KEYS_PER_RUN, sight.end(t) - s0); }, run + 1 < runs,
        partials.data + task * rows * row_floats);
  });

  for (i64 i = 0; i < a.B * a.Hkv * rows; i++) {
    const i64 r = i % rows, h_kv = i / rows % a.Hkv, b = i / rows / a.Hkv, h = h_kv * group + r / a.T, t = r % a.T;
    const float* first = partials.data + ((b * a.Hkv + h_kv) * runs * rows + r) * row_floats;
    a.lse[(b * a.H + h) * a.T + t] = merge_runs(first, rows * row_floats, runs, D, at<T>(a.out, a.out_stride, b, h, t));
  }
}
