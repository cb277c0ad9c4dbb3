// Attention, forward, without ever holding the (T, S) scores (the tiling of FlashAttention):
//
//   out[t] = sum over the keys s that t sees of softmax(scale * q[t] . k[s]) v[s]     q, out (B, H, T, D)
//   lse[t] = log sum over the same s of exp(scale * q[t] . k[s])                      k, v (B, Hkv, S, D)
//
// A query at position p sees keys p - window + 1 .. p. Queries are the last T of the keys' positions; in bidirectional
// attention they stand behind all keys, so that they see them all.
//
// A task is one head and up to 512 queries (in panels of TILE_COLS), and walks over the keys in blocks of 96. All is kept
// transposed, queries in the vector lanes:
//
//   S^T (keys, queries) = K Q^T       the panel Q^T is packed once per task, scale folded in
//   m, l                              running maximum and sum: one lane a query, so no sums across lanes
//   P^T = exp(S^T - m)
//   O^T (D, queries) += V^T P^T       rescaled by exp(m_old - m_new) where a maximum moved
//
// Both products are matmul.inl's register tile, with K, V and P used as they lie. What is seen is in the loop bounds: of a
// block that not all queries see, each vector of queries takes the keys that one of its queries sees (`Reach`), and only
// there positions are compared. Threads take (batch, head, queries) tasks, those with the most keys first; a task never
// splits a sum, so the result depends neither on the number of threads nor on the number of queries to a task.
//
// Where the CPU multiplies bfloat16 directly K, Q, P and V enter the products in pairs of bfloat16 (matmul.inl), which
// halves their time. P is then rounded as PyTorch's attention rounds it; the scale stays out of Q, which it would round.
//
// One to four queries (decoding) read far more than they compute, and go to attention_decode.inl instead.

constexpr i64 QUERIES_PER_TASK = 128, MOST_QUERIES_PER_TASK = 512, KEYS_PER_BLOCK = 96;

template <class T>
LLMFAST_INLINE const T* at(const void* data, const i64 (&stride)[3], i64 b, i64 h, i64 t) {
  return static_cast<const T*>(data) + b * stride[0] + h * stride[1] + t * stride[2];
}
template <class T>
LLMFAST_INLINE T* at(void* data, const i64 (&stride)[3], i64 b, i64 h, i64 t) {
  return static_cast<T*>(data) + b * stride[0] + h * stride[1] + t * stride[2];
}

// Multiplies a panel (rows, vectors * W) in place.
LLMFAST_INLINE void scale_panel(float* panel, i64 floats, float factor) {
  for (i64 i = 0; i < floats; i += W) store(panel + i, load(panel + i) * factor);
}

// Writes dst[t][d] = src[d][t] * factor[t], for t < count; the inverse of packing a transposed panel.
template <class T>
void unpack_panel(const float* src, i64 width, i64 D, i64 count, const float* factor, T* dst, i64 dst_row) {
  for (i64 t0 = 0; t0 < count; t0 += W)
    for (i64 d0 = 0; d0 < D; d0 += W) {
      const i64 n = min_of<i64>(W, D - d0);
      vf block[W];
      const vf f = load(factor + t0);
      for (int i = 0; i < W; i++) block[i] = i < n ? load(src + (d0 + i) * width + t0) * f : zeros();
      transpose(block);
      for (i64 i = 0; i < min_of<i64>(W, count - t0); i++) store_upto(dst + (t0 + i) * dst_row + d0, block[i], n);
    }
}

// keep[i] = 1 / (1 - p) for the kept elements of queries t0 + i at key s, 0 for the dropped ones.
LLMFAST_INLINE void dropout_factors(const AttentionArgs& a, i64 s, i64 t0, i64 bh, i64 lanes, float* keep) {
  uint32_t words[TILE_COLS];
  philox_words(a.seed, uint32_t(s), uint32_t(t0), uint32_t(bh), lanes, words);
  const uint32_t threshold = dropout_threshold(a.dropout_p);
  const float kept = a.dropout_p < 1.0 ? float(1.0 / (1.0 - a.dropout_p)) : 0.0f;
  for (i64 i = 0; i < lanes; i++) keep[i] = (words[i] >> 1) >= threshold ? kept : 0.0f;
}

// One panel of queries: what the walk over the keys carries along.
struct QueryPanel {
  i64 t0, count, vectors;      // queries t0 .. t0 + count, in `vectors` vectors
  float *q, *out, *max, *sum;  // Q^T (D, width), O^T (D, width), m and l (width)
};

// The keys that queries see: query t keys first(t) .. t + offset, as far as there are `length`.
struct Sight {
  i64 length, offset, window;

  Sight(const AttentionArgs& a, i64 b)
      : length(a.kv_lengths ? a.kv_lengths[b] : a.S), offset(a.bidirectional ? length : length - a.T), window(a.window) {}
  i64 first(i64 t) const { return window ? max_of<i64>(0, t + offset - window + 1) : 0; }
  i64 end(i64 t) const { return min_of(length, t + offset + 1); }
};

// Which keys of a block the vectors of a panel of queries take part in: those between the first and the last that one of
// the vector's queries sees, widened to whole register tiles. Neither end is before that of the vector before.
struct Reach {
  i64 vectors, from[TILE_VECTORS], to[TILE_VECTORS];
  bool all;  // every query sees every key of the block

  // t0 is the panel's first query, s0 the block's first key.
  Reach(const Sight& sight, i64 vectors, i64 t0, i64 s0, i64 block_keys)
      : vectors(vectors), all(t0 + sight.offset + 1 >= s0 + block_keys && sight.first(t0 + vectors * W - 1) <= s0) {
    for (i64 v = 0; v < vectors; v++) {
      const i64 t = t0 + v * W, end = max_of<i64>(0, t + W + sight.offset - s0), first = max_of<i64>(0, sight.first(t) - s0);
      to[v] = all ? block_keys : min_of(block_keys, round_up(end, TILE_ROWS));
      from[v] = all ? 0 : min_of(to[v], first / TILE_ROWS * TILE_ROWS);
    }
  }
  // The vectors from first_vector(i) to before end_vector(i) take part in key i.
  i64 first_vector(i64 i) const {
    i64 v = 0;
    while (v < vectors && to[v] <= i) v++;
    return v;
  }
  i64 end_vector(i64 i) const {
    i64 v = vectors;
    while (v > 0 && from[v - 1] > i) v--;
    return v;
  }
};

// scores (keys, queries) = K Q^T where keys are reached; elsewhere they mean nothing.
//
// Tile registers multiply a whole block in less time than vectors do what is reached of it: there both products take in all
// of it, with zeros for what no query reaches.
template <bool PAIRS>
void score_product(const Reach& reach, i64 keys, i64 D_units, const float* k, const float* q, float* scores) {
  const i64 width = reach.vectors * W;
  if (reach.all || on_tile_registers<PAIRS>())
    return panel_matmul<PAIRS>(keys, reach.vectors, D_units, k, D_units, 1, q, scores, width, false);
  for (i64 i = 0; i < keys; i += TILE_ROWS) {
    const i64 first = reach.first_vector(i), vectors = reach.end_vector(i) - first, rows = min_of<i64>(TILE_ROWS, keys - i);
    if (vectors > 0)
      register_tile_within_for<PAIRS>(rows, vectors)(D_units, k + i * D_units, D_units, 1, q + first * W, width,
                                                     scores + i * width + first * W, width, false);
  }
}

// A matrix (D, keys), element (d, k) at data[d * row + k * col]; k counts units, as in matmul.inl.
struct Columns {
  const float* data;
  i64 row, col;
};

// out (D, queries) += V^T P over the keys that are reached. P has a row for a key or, in PAIRS, for two.
template <bool PAIRS>
void value_product(const Reach& reach, i64 keys, i64 D, const Columns& v, const float* p, float* out) {
  constexpr i64 UNIT = PAIRS ? 2 : 1;
  static_assert(TILE_ROWS % 2 == 0, "a reach must not split a pair");
  const i64 width = reach.vectors * W;
  if (reach.all || on_tile_registers<PAIRS>())
    return panel_matmul<PAIRS>(D, reach.vectors, ceil_div(keys, UNIT), v.data, v.row, v.col, p, out, width, true);
  for (i64 i = 0; i < keys;) {  // runs of keys in which the same vectors take part
    const i64 first = reach.first_vector(i), vectors = reach.end_vector(i) - first, unit = i / UNIT;
    i64 next = keys;
    for (i64 j = 0; j < reach.vectors; j++) {
      if (reach.to[j] > i) next = min_of(next, reach.to[j]);
      if (reach.from[j] > i) next = min_of(next, reach.from[j]);
    }
    for (i64 d = 0; d < D && vectors > 0; d += TILE_ROWS)
      register_tile_within_for<PAIRS>(min_of<i64>(TILE_ROWS, D - d), vectors)(
          ceil_div(next - i, UNIT), v.data + d * v.row + unit * v.col, v.row, v.col, p + unit * width + first * W, width,
          out + d * width + first * W, width, true);
    i = next;
  }
}

// (rows, D) of bfloat16, for a product over D and for one over the rows: pairs of neighbours in a row, and pairs of
// neighbouring rows, an odd last one with zeros.
inline void pair_columns(const bfloat16* src, i64 row, i64 rows, i64 D, float* dst) {
  i64 dst_row, dst_k;
  pack_rows_pairs(src, row, 1, rows, D, dst, &dst_row, &dst_k);
}
inline Columns paired_rows(const float* pairs, i64 rows, i64 D) {
#if LLMFAST_TILE_REGISTERS
  return {pairs, ceil_div(rows, 2), 1};
#else
  return {pairs, 1, D};
#endif
}
inline Columns pair_rows(const bfloat16* src, i64 row, i64 rows, i64 D, float* dst) {
  i64 dst_row, dst_k;
  pack_rows_pairs(src, 1, row, D, rows, dst, &dst_row, &dst_k);
  return paired_rows(dst, rows, D);
}

// W queries from t on and the keys of a block from s0 on.
struct Lanes {
  vi first, last;        // the keys that each sees, counted from s0
  i64 all_from, all_to;  // these all of them see: all_from <= i < all_to

  Lanes(const Sight& sight, i64 t, i64 s0)
      : last(lane_index() + int32_t(t + sight.offset - s0)), all_from(max_of<i64>(0, sight.first(t + W - 1) - s0)),
        all_to(max_of<i64>(0, t + sight.offset + 1 - s0)) {
    first = sight.window ? last - int32_t(sight.window - 1) : splat_int(int32_t(-s0));
  }
  LLMFAST_INLINE vi see(i64 i) const {
    const vi key = splat_int(int32_t(i));
    return (key <= last) & (key >= first);
  }
};

// Keys and values as they lie, or paired as above.
template <bool PAIRS>
void attend_block(const AttentionArgs& a, const Sight& sight, QueryPanel& p, i64 bh, i64 s0, i64 keys, const float* k,
                  const Columns& v, float* scores) {
  constexpr i64 UNIT = PAIRS ? 2 : 1;
  const i64 width = p.vectors * W;
  const Reach reach(sight, p.vectors, p.t0, s0, keys);
  score_product<PAIRS>(reach, keys, ceil_div(a.D, UNIT), k, p.q, scores);

  const auto score = [&](const float* at) { return PAIRS ? load(at) * a.scale : load(at); };
  bool moved = false;
  float rescale[TILE_COLS];
  for (i64 j = 0; j < width; j += W) {
    float* column = scores + j;
    const i64 from = reach.from[j / W], to = reach.to[j / W];
    if (!reach.all) {
      const Lanes lanes(sight, p.t0 + j, s0);
      const auto hide = [&](i64 i) {
        float* row = column + i * width;
        const vf hidden = splat(PAIRS && a.scale < 0 ? INFINITY : -INFINITY);
        store(row, lanes.see(i) ? load(row) : hidden);
      };
      for (i64 i = from; i < min_of(to, lanes.all_from); i++) hide(i);
      for (i64 i = max_of(from, max_of(lanes.all_from, lanes.all_to)); i < to; i++) hide(i);
    }
    const vf old_max = load(p.max + j);
    vf m0 = old_max, m1 = old_max;
    i64 i = from;
    for (; i + 2 <= to; i += 2) {
      m0 = vmax(score(column + i * width), m0);
      m1 = vmax(score(column + (i + 1) * width), m1);
    }
    if (i < to) m0 = vmax(score(column + i * width), m0);
    const vf new_max = vmax(m0, m1);
    const vf pivot = new_max == -INFINITY ? zeros() : new_max;  // a row that has seen no key yet: all terms exp(-inf)
    vf l0 = zeros(), l1 = zeros();
    for (i = from; i + 2 <= to; i += 2) {
      float* row = column + i * width;
      const vf e0 = exp_nonpositive(score(row) - pivot), e1 = exp_nonpositive(score(row + width) - pivot);
      if (PAIRS) {
        store(column + i / 2 * width, round_to_pairs(e0, e1));  // this row was read already
      } else {
        store(row, e0);
        store(row + width, e1);
      }
      l0 += e0;
      l1 += e1;
    }
    if (i < to) {
      const vf e = exp_nonpositive(score(column + i * width) - pivot);
      store(column + i / UNIT * width, PAIRS ? round_to_pairs(e, zeros()) : e);
      l0 += e;
    }
    if (on_tile_registers<PAIRS>()) {
      for (i64 r = 0; r < from / UNIT; r++) store(column + r * width, zeros());
      for (i64 r = ceil_div(to, UNIT); r < ceil_div(keys, UNIT); r++) store(column + r * width, zeros());
    }
    const vf factor = exp_nonpositive(old_max - pivot);
    store(p.sum + j, load(p.sum + j) * factor + (l0 + l1));
    store(p.max + j, new_max);
    store(rescale + j, factor);
    for (int lane = 0; lane < W; lane++) moved |= !(rescale[j + lane] == 1.0f);
  }
  if (!PAIRS && a.dropout_p > 0)
    for (i64 i = 0; i < keys; i++) {
      float keep[TILE_COLS];
      dropout_factors(a, s0 + i, p.t0, bh, width, keep);
      for (i64 j = reach.first_vector(i) * W; j < reach.end_vector(i) * W; j += W)
        store(scores + i * width + j, load(scores + i * width + j) * load(keep + j));
    }
  if (moved)
    for (i64 d = 0; d < a.D; d++)
      for (i64 j = 0; j < width; j += W) store(p.out + d * width + j, load(p.out + d * width + j) * load(rescale + j));
  value_product<PAIRS>(reach, keys, a.D, v, scores, p.out);
}

template <bool PAIRS, class Q, class T, class Commit>
void attention_tile_as(const AttentionArgs& a, i64 b, i64 h, i64 t_begin, const Commit& commit, i64 queries) {
  constexpr i64 PANELS = MOST_QUERIES_PER_TASK / TILE_COLS;
  const i64 D = a.D, bh = b * a.H + h, h_kv = h / (a.H / a.Hkv);
  const Sight sight(a, b);
  const i64 t_end = min_of(a.T, t_begin + queries), panels = ceil_div(t_end - t_begin, TILE_COLS);
  const i64 panel_floats = (2 * D + 2) * TILE_COLS;
  Scratch memory(2 * KEYS_PER_BLOCK * D + KEYS_PER_BLOCK * TILE_COLS + panels * panel_floats);
  float *k = memory.data, *v = k + KEYS_PER_BLOCK * D, *scores = v + KEYS_PER_BLOCK * D;
  float* next = scores + KEYS_PER_BLOCK * TILE_COLS;

  QueryPanel panel[PANELS];
  for (i64 i = 0; i < panels; i++, next += panel_floats) {
    QueryPanel& p = panel[i];
    p.t0 = t_begin + i * TILE_COLS;
    p.count = min_of<i64>(TILE_COLS, t_end - p.t0);
    p.vectors = vectors_for(p.count);
    const i64 width = p.vectors * W;
    p.q = next;
    p.out = p.q + D * width;
    p.max = p.out + D * width;
    p.sum = p.max + width;
    const Q* q = at<Q>(a.q, a.q_stride, b, h, p.t0);
    if constexpr (PAIRS) {
      pack_panel_pairs(q, 1, a.q_stride[2], D, p.count, p.q);
    } else {
      pack_panel(q, 1, a.q_stride[2], D, p.count, p.q);
      scale_panel(p.q, D * width, a.scale);
    }
    memset(p.out, 0, size_t(D * width) * sizeof(float));
    for (i64 j = 0; j < width; j++) {
      p.max[j] = -INFINITY;
      p.sum[j] = 0.0f;
    }
  }

  const i64 key_end = sight.end(t_end - 1);
  // Blocks lie where they would without a window, so that the order of the sums is the same for any share of the queries.
  for (i64 s0 = sight.first(t_begin) / KEYS_PER_BLOCK * KEYS_PER_BLOCK; s0 < key_end; s0 += KEYS_PER_BLOCK) {
    const i64 keys = min_of(KEYS_PER_BLOCK, key_end - s0);
    const T *k_rows = at<T>(a.k, a.k_stride, b, h_kv, s0), *v_rows = at<T>(a.v, a.v_stride, b, h_kv, s0);
    Columns columns{v, 1, D};
    if constexpr (PAIRS) {
      pair_columns(k_rows, a.k_stride[2], keys, D, k);
      columns = pair_rows(v_rows, a.v_stride[2], keys, D, v);
    } else {
      copy_rows(k_rows, a.k_stride[2], keys, D, k, D);
      copy_rows(v_rows, a.v_stride[2], keys, D, v, D);
    }
    for (i64 i = 0; i < panels; i++) {
      const i64 end = sight.end(panel[i].t0 + panel[i].count - 1) - s0;  // of this block, for the panel's last query
      if (end > 0 && sight.first(panel[i].t0) < s0 + keys)
        attend_block<PAIRS>(a, sight, panel[i], bh, s0, min_of(keys, end), k, columns, scores);
    }
  }

  if (!commit()) return;
  for (i64 i = 0; i < panels; i++) {
    const QueryPanel& p = panel[i];
    float inverse[TILE_COLS];
    for (i64 j = 0; j < p.vectors * W; j++) inverse[j] = p.sum[j] == 0.0f ? 0.0f : 1.0f / p.sum[j];
    for (i64 j = 0; a.lse && j < p.count; j++)
      a.lse[bh * a.T + p.t0 + j] = p.sum[j] == 0.0f ? -INFINITY : p.max[j] + ::logf(p.sum[j]);
    unpack_panel(p.out, p.vectors * W, D, p.count, inverse, at<Q>(a.out, a.out_stride, b, h, p.t0), a.out_stride[2]);
  }
}

// The `queries` (at most MOST_QUERIES_PER_TASK) from t_begin on. Q is the type of queries and output, T that of keys and
// values. `commit()` is asked once, before anything is written: where it says no, another thread has already done this
// tile.
template <class Q, class T, class Commit>
void attention_tile(const AttentionArgs& a, i64 b, i64 h, i64 t_begin, const Commit& commit,
                    i64 queries = QUERIES_PER_TASK) {
  constexpr bool PAIRS = multiplies_pairs<Q, T>();
  if (a.dropout_p > 0) return attention_tile_as<false, Q, T>(a, b, h, t_begin, commit, queries);
  attention_tile_as<PAIRS, Q, T>(a, b, h, t_begin, commit, queries);
}

template <class T>
void attention_decode(const AttentionArgs& a, const Threads& threads);

template <class T>
void attention_as(const AttentionArgs& a, const Threads& threads) {
  if (a.T <= 4 && a.dropout_p == 0) return attention_decode<T>(a, threads);
  // The more queries a task has, the fewer times keys and values are packed; the threads must share them evenly, though.
  const i64 heads = a.B * a.H;
  i64 queries = MOST_QUERIES_PER_TASK;
  while (threads.count > 1 && queries > QUERIES_PER_TASK && heads * ceil_div(a.T, queries) < 8 * threads.count) queries /= 2;
  const i64 tiles = ceil_div(a.T, queries);
  for_each_task(threads, heads * tiles, [&](i64 task) {
    const i64 bh = task % heads, tile = tiles - 1 - task / heads;
    attention_tile<T, T>(a, bh / a.H, bh % a.H, tile * queries, [] { return true; }, queries);
  });
}

void attention(const AttentionArgs& a, const Threads& threads) {
  a.dtype == DType::f32 ? attention_as<float>(a, threads) : attention_as<bfloat16>(a, threads);
}
