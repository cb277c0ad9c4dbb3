// One step of the decoder: new tokens of one or several sequences in, the logits of the next ones out.
//
//   x = token[ids] * embedding multiplier + position      (rows, C), the residual stream, float32
//   for each block:
//     q, k, v = norm(x) W + b, q and k rotated            k and v go straight into the cache
//     attended = attention(q, cache)
//     x += (attended W + b) * residual multiplier
//     x += (mlp(norm(x)) W + b) * residual multiplier     mlp: act(h W + b), or act(h Wg + b) * (h Wu + b)
//   logits = norm(x) head^T / divisor
//
// Five phases a block (phases.inl). Norms and the rounding of activations have none of their own for a few rows: every
// thread does them for itself, which takes less time than to hand them round. Keys that are normalised by head, or kept in
// 8 bits, need whole heads, which a tile of the product need not have: the product leaves its rows in `inner`, and the
// attention that reads them first finishes them.
//
// Sequences of up to SHORT rows in a step (decoding, checking guesses) attend as attention_decode.inl does, each row with
// the same bits as if it came alone; longer ones (prompts) in tiles, as attention.inl does.

constexpr i64 SHORT = 16, ROWS_PER_CHUNK = 96;
constexpr i64 OWN_ROWS = 4;  // so many rows every thread prepares for itself
constexpr i64 PREPARED_AT_ONCE = 4;

LLMFAST_INLINE i64 cache_row_bytes(CacheType type, i64 D) {
  return type == CacheType::f32 ? 4 * D : type == CacheType::bf16 ? 2 * D : D + 4;
}
LLMFAST_INLINE i64 runs_of(i64 keys) { return max_of<i64>(1, ceil_div(keys, KEYS_PER_RUN)); }

LLMFAST_INLINE void normalise_row(Norm kind, const NormWeights& norm, const float* x, i64 N, float eps, float* out) {
  const float mean = kind == Norm::rms ? 0.0f : sum_over(N, [&](i64 j, i64 n) { return load_upto(x + j, n); }) / float(N);
  const float variance = sum_over(N,
                                  [&](i64 j, i64 n) {
                                    const vf d = first_lanes(load_upto(x + j, n) - mean, n);
                                    return d * d;
                                  }) /
                         float(N);
  const float rstd = 1.0f / ::sqrtf(variance + eps);
  if (norm.bias)
    for_each_vector(N, [&](i64 j, i64 n) {
      store_upto(out + j, (load_upto(x + j, n) - mean) * rstd * load_upto(norm.weight + j, n) + load_upto(norm.bias + j, n),
                 n);
    });
  else
    for_each_vector(N, [&](i64 j, i64 n) {
      store_upto(out + j, (load_upto(x + j, n) - mean) * rstd * load_upto(norm.weight + j, n), n);
    });
}

// How the pairs of a head turn at a position: R cosines, each twice, then R sines, each twice, the first one negative.
LLMFAST_INLINE void rotation_at(const DecoderModel& m, i64 position, float* out) {
  const i64 R = m.rotary_dim;
  for (i64 i = 0; i < R / 2; i++) {
    const float angle = float(position) * m.inverse_frequencies[i];
    const float c = ::cosf(angle) * m.rotary_factor, s = ::sinf(angle) * m.rotary_factor;
    out[2 * i] = out[2 * i + 1] = c;
    out[R + 2 * i] = -s;
    out[R + 2 * i + 1] = s;
  }
}

// Turns the pairs among channels c .. c + n of a head, n and c even: (a, b) becomes (a cos - b sin, b cos + a sin).
LLMFAST_INLINE void rotate(const float* rotation, i64 R, i64 c, i64 n, float* x) {
  n = min_of(n, R - c);
  i64 j = 0;
  for (; j + W <= n; j += W) {
    const vf a = load(x + j);
    store(x + j, a * load(rotation + c + j) + swap_neighbours(a) * load(rotation + R + c + j));
  }
  for (; j < n; j += 2) {
    const float a = x[j], b = x[j + 1];
    x[j] = a * rotation[c + j] + b * rotation[R + c + j];
    x[j + 1] = b * rotation[c + j + 1] + a * rotation[R + c + j + 1];
  }
}

// What the adapters of a step's rows make of one product's input, and add to its output. A thread's own copy goes with that
// of the prepared rows.
struct Narrow {
  const Worker& w;
  i64 block, number;  // of the product: which of the block's four
  bool any;           // some sequence has an adapter
  float* own;         // (SHORT, width)

  i64 width() const { return any ? w.d.narrow_width : 0; }
  float* own_row(i64 row) const { return own + row * width(); }
  const DecoderAdapter* adapter(i64 row) const {
    const Segment* s = w.segments;
    while (row >= s->row + s->count) s++;
    return w.d.adapters[s->slot];
  }
  void make(i64 row, const float* x, float* to) const {
    if (const DecoderAdapter* a = any ? adapter(row) : nullptr) adapter_narrow(*a, a->matrix[4 * block + number], x, to);
  }
  void add(i64 row, bool owned, i64 panel, float* tile) const {
    if (const DecoderAdapter* a = any ? adapter(row) : nullptr)
      adapter_widen(*a, a->matrix[4 * block + number], (owned ? own : w.d.narrow) + row * width(), panel, tile);
  }
  void ahead(i64 row, i64 panel) const {
    if (const DecoderAdapter* a = any ? adapter(row) : nullptr) adapter_ahead(*a, a->matrix[4 * block + number], panel);
  }
  void copy(i64 rows) const {
    if (any) memcpy(own, w.d.narrow, size_t(rows * width()) * 4);
  }
};

// The rows of the next product's input, in its format: source(row, out) gives them in float32. Every thread prepares a few
// rows for itself; more are shared out before the product, and where they are not too many, every thread takes a copy.
template <class Source>
struct Input {
  const PackedMatrix& m;
  const i64 rows;
  const Source source;
  uint8_t* own;                // the thread's copy, or null
  const uint8_t* shared;       // what was prepared together, or null
  const Narrow narrow;         // what adapters add
  mutable bool ready = false;  // the thread's copy, at its first chunk of the product

  // For a chunk that reads `panel` first, which is on its way from memory meanwhile.
  const uint8_t* read(Commit& commit, const uint8_t* panel) const {
    if (!own) return shared;
    const i64 bytes = prepared_bytes(m), stride = round_up(m.K, W);
    const bool round = !ready && !shared;
    Scratch floats(round ? rows * stride : 1);
    for (i64 i = 0; !ready && i < AHEAD; i += 64) prefetch(panel + i);
    for (i64 r = 0; round && r < rows; r++) source(r, floats.data + r * stride);
    if (!ready && shared) {
      memcpy(own, shared, size_t(rows * bytes));
      narrow.copy(rows);
    }
    commit.detach();  // before the rounding, which takes the longest
    for (i64 r = 0; round && r < rows; r++) narrow.make(r, floats.data + r * stride, narrow.own_row(r));
    for (i64 r = 0; round && r < rows; r++) prepare_row(m, floats.data + r * stride, own + r * bytes);
    ready = true;
    return own;
  }
};

template <class Source>
Input<Source> prepare(Worker& w, const PackedMatrix& m, i64 rows, uint8_t* own, const Narrow& narrow, const Source& source) {
  if (rows <= OWN_ROWS) return {m, rows, source, own, nullptr, narrow};
  const i64 bytes = prepared_bytes(m);
  Scratch row(round_up(m.K, W));
  Scratch some(PREPARED_AT_ONCE * bytes / 4), thin(PREPARED_AT_ONCE * narrow.width() + 1);
  uint8_t* to = reinterpret_cast<uint8_t*>(some.data);
  phase(w, ceil_div(rows, PREPARED_AT_ONCE), [&](i64 chunk, Commit& commit) {
    const i64 r0 = chunk * PREPARED_AT_ONCE, n = min_of(PREPARED_AT_ONCE, rows - r0);
    for (i64 r = 0; r < n; r++) {
      source(r0 + r, row.data);
      narrow.make(r0 + r, row.data, thin.data + r * narrow.width());
      prepare_row(m, row.data, to + r * bytes);
    }
    if (!commit()) return;
    memcpy(w.d.prepared + r0 * bytes, to, size_t(n * bytes));
    if (narrow.any) memcpy(w.d.narrow + r0 * narrow.width(), thin.data, size_t(n * narrow.width()) * 4);
  });
  return {m, rows, source, rows <= SHORT ? own : nullptr, w.d.prepared, narrow};
}

// finish(row, count, column, columns, tile) writes rows of the product, TILE_COLS wide, that change(row, column, tile row)
// has changed in place. `change` reads nothing that a later phase rewrites, unless the input is shared.
template <class Input, class Change, class Finish>
void multiply(Worker& w, const PackedMatrix& m, i64 rows, const Input& input, const Change& change, const Finish& finish) {
  const i64 panels = panels_of(m), blocks = ceil_div(rows, ROWS_PER_CHUNK);
  Scratch tile(min_of(rows, ROWS_PER_CHUNK) * m.terms * TILE_COLS);
  phase(w, panels * blocks, [&](i64 chunk, Commit& commit) {
    const Panel panel = panel_of(m, chunk / blocks);
    const i64 r0 = chunk % blocks * ROWS_PER_CHUNK, n = min_of(ROWS_PER_CHUNK, rows - r0), column = panel.first;
    const uint8_t* prepared = input.read(commit, panel.data);
    input.narrow.ahead(r0, chunk / blocks);
    panel_product(m, panel, n, prepared + r0 * prepared_bytes(m), tile.data);
    for (i64 r = 0; r < n; r++) {
      float* row = tile.data + r * TILE_COLS;
      if (m.bias)
        for (i64 j = 0; j < TILE_COLS; j += W) store(row + j, load(row + j) + load(m.bias + column + j));
      input.narrow.add(r0 + r, input.own != nullptr, chunk / blocks, row);
      change(r0 + r, column, row);
    }
    if (commit()) finish(r0, n, column, panel.rows, tile.data);
  });
}

// The largest of the first n logits of a row of a tile, the first of several. Where one is not finite the index is -1, and
// the value above every other tile's.
LLMFAST_INLINE BestLogit best_logit(const float* row, i64 column, i64 n) {
  if (n <= 0) return {-INFINITY, int32_t(column)};
  vf high = splat(-INFINITY), difference = zeros();  // x - x is 0, and NaN where x is not finite
  for (i64 j = 0; j < n; j += W) {
    const vf x = load_upto(row + j, n - j);
    difference += x - x;
    high = vmax(first_lanes(x, n - j, splat(-INFINITY)), high);
  }
  if (sum_lanes(difference) != 0.0f) return {INFINITY, -1};
  const float top = max_lanes(high);
  vi before = splat_int(INT32_MIN);  // minus the place
  for (i64 j = 0; j < n; j += W) {
    const vi place = -(lane_index() + int32_t(j));
    const vi here = first_lanes(load_upto(row + j, n - j), n - j, splat(-INFINITY)) == top ? place : splat_int(INT32_MIN);
    before = here > before ? here : before;
  }
  return {top, int32_t(column) - max_lanes(before)};
}

constexpr auto UNCHANGED = [](i64, i64, float*) {};

struct DecoderStep {
  Worker& w;
  DecoderState& d;
  const DecoderModel& m;
  const i64 C, H, Hkv, group, D, R;
  const i64 row_bytes_cached, row_floats, most_runs;
  const bool whole_heads;      // queries, keys and values wait in `inner` until their heads are whole
  bool prompts = false;        // some sequence has more than SHORT rows
  const float* rotations;      // (rows, 2, R)
  uint8_t* const own;          // the thread's own room for SHORT prepared rows
  float* const own_narrow;     // for what adapters make of them
  float* const own_rotations;  // and for their rotations

  DecoderStep(Worker& worker, uint8_t* own, float* own_narrow, float* own_rotations)
      : w(worker), d(worker.d), m(*worker.d.model), C(m.width), H(m.heads), Hkv(m.key_heads), group(H / Hkv), D(m.head_dim),
        R(m.rotary_dim), row_bytes_cached(cache_row_bytes(d.cache_type, D)), row_floats(partial_floats(D)),
        most_runs(runs_of(d.capacity)), whole_heads(d.cache_type == CacheType::i8 || m.norms_heads),
        rotations(w.job.rows <= SHORT ? own_rotations : d.rotations), own(own), own_narrow(own_narrow),
        own_rotations(own_rotations) {
    for (i64 i = 0; i < w.job.segments; i++) prompts |= w.segments[i].count > SHORT;
    if (rotations == own_rotations)
      for (i64 r = 0; r < w.job.rows && R; r++) rotation_at(m, position_of(r), own_rotations + r * 2 * R);
  }

  const Segment& segment_of(i64 row) const {
    const Segment* s = w.segments;
    while (row >= s->row + s->count) s++;
    return *s;
  }
  i64 position_of(i64 row) const {
    const Segment& s = segment_of(row);
    return s.start + row - s.row;
  }

  uint8_t* cached(uint8_t* store, i64 block, i64 slot, i64 key_head, i64 position) const {
    return store + (((block * d.batch + slot) * Hkv + key_head) * d.capacity + position) * row_bytes_cached;
  }

  void embed() const {
    Scratch memory(PREPARED_AT_ONCE * (C + 2 * R) + C);
    float *x = memory.data, *turns = x + PREPARED_AT_ONCE * C, *token = turns + PREPARED_AT_ONCE * 2 * R;
    phase(w, ceil_div(w.job.rows, PREPARED_AT_ONCE), [&](i64 chunk, Commit& commit) {
      const i64 r0 = chunk * PREPARED_AT_ONCE, n = min_of(PREPARED_AT_ONCE, w.job.rows - r0);
      const bool turn = R && rotations == d.rotations;
      for (i64 r = 0; r < n; r++) {
        unpack_row(m.token_embedding, d.ids[r0 + r], token);
        const float* position = m.position_embedding ? m.position_embedding + position_of(r0 + r) * C : nullptr;
        for (i64 j = 0; j < C; j++) x[r * C + j] = token[j] * m.embedding_multiplier + (position ? position[j] : 0.0f);
        if (turn) rotation_at(m, position_of(r0 + r), turns + r * 2 * R);
      }
      if (!commit()) return;
      memcpy(d.x + r0 * C, x, size_t(n * C) * 4);
      if (turn) memcpy(d.rotations + r0 * 2 * R, turns, size_t(n * 2 * R) * 4);
    });
  }

  // Whole vectors of the residual stream, normalised.
  auto normalised(const NormWeights& norm) const {
    return [this, &norm](i64 row, float* out) { normalise_row(m.norm, norm, d.x + row * C, C, m.norm_epsilon, out); };
  }

  template <class Input>
  void query_key_value(i64 block, const Input& input) const {
    const DecoderBlock& b = m.block[block];
    const i64 queries = m.query_channels(), keys = m.key_channels();
    const auto rotate_tile = [&](i64 r, i64 column, float* row) {
      if (whole_heads || !b.rotary) return;
      for (i64 j = 0; j < TILE_COLS && column + j < queries + keys;) {
        const i64 channel = (column + j) % D, n = min_of<i64>(TILE_COLS - j, D - channel);
        rotate(rotations + r * 2 * R, R, channel, n, row + j);
        j += n;
      }
    };
    multiply(w, b.query_key_value, w.job.rows, input, rotate_tile,
             [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
               for (i64 r = r0; r < r0 + n; r++) {
                 const float* from = tile + (r - r0) * TILE_COLS;
                 if (whole_heads) {
                   memcpy(d.inner + r * m.projected_channels() + column, from, size_t(columns) * 4);
                   continue;
                 }
                 const Segment& s = segment_of(r);
                 for (i64 j = 0; j < columns;) {
                   const bool query = column + j < queries;
                   const i64 channel = query ? column + j : (column + j - queries) % keys;
                   const i64 run = min_of(columns - j, query ? queries - channel : D - channel % D);
                   if (query)
                     memcpy(d.q + r * queries + channel, from + j, size_t(run) * 4);
                   else
                     store_cached(column + j < queries + keys ? d.keys : d.values, block, s, r, channel, from + j, run);
                   j += run;
                 }
               }
             });
  }

  void store_cached(uint8_t* store, i64 block, const Segment& s, i64 row, i64 channel, const float* from, i64 n) const {
    uint8_t* to = cached(store, block, s.slot, channel / D, s.start + row - s.row);
    if (d.cache_type == CacheType::f32) {
      memcpy(to + channel % D * 4, from, size_t(n) * 4);
    } else if (d.cache_type == CacheType::bf16) {
      bfloat16* at = reinterpret_cast<bfloat16*>(to) + channel % D;
      for (i64 j = 0; j < n; j += W) store_upto(at + j, load_upto(from + j, n - j), n - j);
    } else {
      store_cache_row(from, D, reinterpret_cast<int8_t*>(to));
    }
  }

  // A head of queries or keys that has waited in `inner`, normalised and turned.
  void finish_head(i64 block, i64 row, i64 channel, const float* norm, float* out) const {
    const float* from = d.inner + row * m.projected_channels() + channel;
    if (norm)
      normalise_row(Norm::rms, {norm, nullptr}, from, D, m.norm_epsilon, out);
    else
      memcpy(out, from, size_t(D) * 4);
    if (m.block[block].rotary) rotate(rotations + row * 2 * R, R, 0, D, out);
  }
  void finish_query(i64 block, i64 row, i64 head, float* out) const {
    finish_head(block, row, head * D, m.block[block].query_norm, out);
  }
  void finish_key_and_value(i64 block, const Segment& s, i64 row, i64 key_head) const {
    Scratch key(round_up(D, W));
    const i64 channel = key_head * D;
    finish_head(block, row, m.query_channels() + channel, m.block[block].key_norm, key.data);
    store_cached(d.keys, block, s, row, channel, key.data, D);
    const float* value = d.inner + row * m.projected_channels() + m.query_channels() + m.key_channels() + channel;
    store_cached(d.values, block, s, row, channel, value, D);
  }
  void finish_rows(i64 block) const {
    phase(w, w.job.rows, [&](i64 row, Commit& commit) {
      if (!commit()) return;
      for (i64 head = 0; head < H; head++) finish_query(block, row, head, d.q + (row * H + head) * D);
      for (i64 head = 0; head < Hkv; head++) finish_key_and_value(block, segment_of(row), row, head);
    });
  }

  // The first key that the query at a position sees.
  i64 first_key(i64 block, i64 position) const {
    const i64 window = m.block[block].window;
    return window ? max_of<i64>(0, position + 1 - window) : 0;
  }
  i64 first_run(i64 block, const Segment& s) const { return first_key(block, s.start) / KEYS_PER_RUN; }

  i64 attention_chunks(i64 block, const Segment& s) const {
    return s.count <= SHORT ? Hkv * (runs_of(s.start + s.count) - first_run(block, s))
                            : H * ceil_div(s.count, QUERIES_PER_TASK);
  }

  // What a run of keys gives one head of one row of a short segment.
  float* partial_of(const Segment& s, i64 row, i64 head, i64 run) const {
    return d.partials + (((s.slot * SHORT + row - s.row) * H + head) * most_runs + run) * row_floats;
  }

  // One head of keys, one run of them, all rows of a short segment and all heads of queries that share these keys.
  template <class T>
  void attend_keys(i64 block, const Segment& s, i64 key_head, i64 run, Commit& commit) const {
    const i64 s0 = run * KEYS_PER_RUN, keys = min_of(KEYS_PER_RUN, s.start + s.count - s0), D_padded = round_up(D, W);
    const i64 rows = group * s.count, stride = row_bytes_cached / i64(sizeof(T));
    const T* k = reinterpret_cast<const T*>(cached(d.keys, block, s.slot, key_head, s0));
    const T* v = reinterpret_cast<const T*>(cached(d.values, block, s.slot, key_head, s0));
    const auto head_of = [&](i64 r) { return key_head * group + r / s.count; };
    const auto row_of = [&](i64 r) { return s.row + r % s.count; };
    const bool finish = whole_heads && !prompts;
    Scratch memory(rows * (D_padded + row_floats) + D_padded);
    float *q = memory.data, *out = q + rows * D_padded, *whole = out + rows * row_floats;
    for (i64 r = 0; r < rows; r++) {
      const float* from = finish ? whole : d.q + (row_of(r) * H + head_of(r)) * D;
      if (finish) finish_query(block, row_of(r), head_of(r), whole);
      for (i64 j = 0; j < D; j += W) store(q + r * D_padded + j, load_upto(from + j, D - j) * m.attention_scale);
    }
    // No other thread has this part of the cache: a chunk that was never detached has one owner.
    for (i64 row = s.row; finish && !commit.again && row < s.row + s.count; row++)
      if (const i64 i = s.start + row - s.row - s0; i >= 0 && i < keys) finish_key_and_value(block, s, row, key_head);
    commit.detach();  // the rows of the cache stay: a step that goes back waits for us (native_decoder.cpp)

    const auto first = [&](i64 t) { return max_of<i64>(0, first_key(block, s.start + t) - s0); };
    const auto end = [&](i64 t) { return min_of(keys, s.start + t + 1 - s0); };
    if constexpr (sizeof(T) == 1) {  // 8-bit keys and values are widened once for all rows
      const i64 from = first(0);
      Scratch wide(2 * keys * D);
      float *wide_k = wide.data, *wide_v = wide.data + keys * D;
      copy_rows(k + from * stride, stride, keys - from, D, wide_k + from * D, D);
      copy_rows(v + from * stride, stride, keys - from, D, wide_v + from * D, D);
      for (i64 i = from / W * W * D; i < from * D; i++) wide_k[i] = 0.0f;  // read with the others of a vector of keys
      attend_run<float>(q, group, s.count, D, wide_k, D, wide_v, D, first, end, false, out);
    } else {
      attend_run<T>(q, group, s.count, D, k, stride, v, stride, first, end, run + 1 < runs_of(s.start + s.count), out);
    }
    if (!commit()) return;
    for (i64 r = 0; r < rows; r++)
      memcpy(partial_of(s, row_of(r), head_of(r), run), out + r * row_floats, size_t(row_floats) * 4);
  }

  template <class T>
  void attend_tile(i64 block, const Segment& s, i64 head, i64 tile, Commit& commit) const {
    AttentionArgs a{};
    a.B = 1;
    a.H = H;
    a.Hkv = Hkv;
    a.T = s.count;
    a.S = s.start + s.count;
    a.D = D;
    a.scale = m.attention_scale;
    a.window = m.block[block].window;
    a.q = d.q + s.row * H * D;
    a.k = cached(d.keys, block, s.slot, 0, 0);
    a.v = cached(d.values, block, s.slot, 0, 0);
    a.out = d.attended + s.row * H * D;
    const i64 row = row_bytes_cached / i64(sizeof(T));
    a.q_stride[1] = a.out_stride[1] = D;
    a.q_stride[2] = a.out_stride[2] = H * D;
    a.k_stride[1] = a.v_stride[1] = d.capacity * row;
    a.k_stride[2] = a.v_stride[2] = row;
    attention_tile<float, T>(a, 0, head, tile * QUERIES_PER_TASK, [&] { return commit(); });
  }

  template <class T>
  void attend_as(i64 block) const {
    i64 chunks = 0;
    for (i64 i = 0; i < w.job.segments; i++) chunks += attention_chunks(block, w.segments[i]);
    phase(w, chunks, [&](i64 chunk, Commit& commit) {
      const Segment* s = w.segments;
      for (; chunk >= attention_chunks(block, *s); s++) chunk -= attention_chunks(block, *s);
      if (const i64 runs = attention_chunks(block, *s) / Hkv; s->count <= SHORT)  // neighbouring runs of a head lie in a row
        attend_keys<T>(block, *s, chunk / runs, first_run(block, *s) + chunk % runs, commit);
      else  // the tiles with the most keys first
        attend_tile<T>(block, *s, chunk % H, ceil_div(s->count, QUERIES_PER_TASK) - 1 - chunk / H, commit);
    });
  }

  void attend(i64 block) const {
    if (whole_heads && prompts) finish_rows(block);
    switch (d.cache_type) {
      case CacheType::f32:
        return attend_as<float>(block);
      case CacheType::bf16:
        return attend_as<bfloat16>(block);
      case CacheType::i8:
        return attend_as<int8_t>(block);
    }
  }

  // The attention's output of one row, from the runs of keys where it has several.
  void merge_row(i64 block, i64 row, float* out) const {
    const Segment& s = segment_of(row);
    if (s.count > SHORT) {
      memcpy(out, d.attended + row * H * D, size_t(H * D) * 4);
      return;
    }
    const i64 position = s.start + row - s.row, first = first_key(block, position) / KEYS_PER_RUN;
    for (i64 head = 0; head < H; head++)
      merge_runs(partial_of(s, row, head, first), row_floats, runs_of(position + 1) - first, D, out + head * D);
  }

  template <class Input>
  void add_to_residual(const PackedMatrix& matrix, const Input& input) const {
    multiply(w, matrix, w.job.rows, input, UNCHANGED, [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
      for (i64 r = 0; r < n; r++) {
        float* to = d.x + (r0 + r) * C + column;
        for (i64 j = 0; j < columns; j += W) {
          const i64 k = columns - j;
          store_upto(to + j, load_upto(to + j, k) + load_upto(tile + r * TILE_COLS + j, k) * m.residual_multiplier, k);
        }
      }
    });
  }

  // The MLP's inside, into `inner`. A tile of a gated one has for each vector of the gate the vector that it multiplies.
  template <class Input>
  void mlp_in(const PackedMatrix& matrix, const Input& input) const {
    const auto activated = [&](i64, i64, float* row) {
      for (i64 j = 0; j < TILE_COLS; j += W)
        if (!m.gated)
          store(row + j, activate(m.activation, load(row + j)));
        else if (j % (2 * W) == 0)
          store(row + j / 2, activate(m.activation, load(row + j)) * load(row + j + W));
    };
    const i64 share = m.gated ? 2 : 1, inner = m.inner;
    multiply(w, matrix, w.job.rows, input, activated, [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
      const i64 channel = column / share, channels = min_of(columns / share, inner - channel);
      for (i64 r = 0; r < n; r++) memcpy(d.inner + (r0 + r) * inner + channel, tile + r * TILE_COLS, size_t(channels) * 4);
    });
  }

  void block(i64 i) const {
    const DecoderBlock& b = m.block[i];
    const i64 rows = w.job.rows, inner = m.inner;
    query_key_value(i, prepare(w, b.query_key_value, rows, own, narrow(i, 0), normalised(b.attention_norm)));
    attend(i);
    add_to_residual(b.attention_out,
                    prepare(w, b.attention_out, rows, own, narrow(i, 1), [&](i64 r, float* out) { merge_row(i, r, out); }));
    mlp_in(b.mlp_in, prepare(w, b.mlp_in, rows, own, narrow(i, 2), normalised(b.mlp_norm)));
    add_to_residual(b.mlp_out, prepare(w, b.mlp_out, rows, own, narrow(i, 3),
                                       [&](i64 r, float* out) { memcpy(out, d.inner + r * inner, size_t(inner) * 4); }));
  }

  Narrow narrow(i64 block, i64 number) const {
    bool any = false;
    for (i64 i = 0; d.adapters && i < w.job.segments; i++) any |= d.adapters[w.segments[i].slot] != nullptr;
    return {w, block, number, any, own_narrow};
  }
  Narrow unadapted() const { return {w, 0, 0, false, own_narrow}; }

  i64 output_row(i64 output) const {
    return w.job.all_rows ? output : w.segments[output].row + w.segments[output].count - 1;
  }

  void logits() const {
    const i64 V = m.vocabulary, panels = ceil_div(V, TILE_COLS);
    const auto norm = normalised(m.final_norm);
    const auto input =
        prepare(w, m.head, w.job.outputs, own, unadapted(), [&](i64 output, float* out) { norm(output_row(output), out); });
    const auto divided = [&](i64, i64, float* row) {
      if (m.logits_divisor == 1.0f) return;
      for (i64 j = 0; j < TILE_COLS; j += W) store(row + j, load(row + j) / m.logits_divisor);
    };
    multiply(w, m.head, w.job.outputs, input, divided, [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
      for (i64 r = 0; r < n; r++) {
        const float* row = tile + r * TILE_COLS;
        if (w.job.logits) memcpy(w.job.logits + (r0 + r) * V + column, row, size_t(columns) * 4);
        d.best[(r0 + r) * panels + column / TILE_COLS] = best_logit(row, column, min_of(columns, w.job.vocabulary - column));
      }
    });
  }
};

// Enough for a row prepared for any of the model's products, in any format: two terms of bytes take half of a float row,
// and the scales less than the rest, but for the narrowest; floats that are split take half as much again.
i64 decoder_row_bytes(const DecoderModel& m) {
  const i64 widest = max_of(max_of(m.width, m.inner), m.query_channels());
  const bool split = m.blocks && m.block[0].mlp_out.part[0].format == Format::f32_split;
  return (split ? PackedSplit::row_bytes(widest) : PackedF32::row_bytes(widest)) + 4 * ALIGN;
}

i64 decoder_partial_floats(const DecoderState& d) {
  const DecoderModel& m = *d.model;
  return d.batch * SHORT * m.heads * runs_of(d.capacity) * partial_floats(m.head_dim);
}

// Walks one thread through the whole step.
void decoder_step(DecoderState& d, const StepJob& job, const Segment* segments, int index, uint64_t* last_phase) {
  Worker w{d, job, segments, index, job.first_phase};
  const DecoderModel& m = *d.model;
  const i64 own = min_of(job.rows, SHORT);
  Scratch rows(own * decoder_row_bytes(m) / 4), rotations(own * 2 * m.rotary_dim), narrow(own * d.narrow_width + 1);
  const DecoderStep step(w, reinterpret_cast<uint8_t*>(rows.data), narrow.data, rotations.data);
  step.embed();
  for (i64 i = 0; i < m.blocks; i++) step.block(i);
  if (job.outputs > 0) step.logits();
  *last_phase = w.tag;
}

// The rows of the MLP's first matrix: of a gated one whole vectors of gates and of what they multiply.
i64 mlp_in_rows(const DecoderShape& s) { return s.gated ? 2 * round_up(s.inner, W) : s.inner; }

// The most chunks a phase can have.
i64 decoder_chunks(const DecoderState& d) {
  const DecoderModel& m = *d.model;
  const i64 widest = max_of(max_of(m.vocabulary, m.width), max_of(m.projected_channels(), mlp_in_rows(m)));
  const i64 products = (ceil_div(widest, TILE_COLS) + 2) * ceil_div(d.most_rows, ROWS_PER_CHUNK);  // 2: of three parts
  const i64 segments = min_of(d.batch, d.most_rows);
  const i64 attention = m.heads * segments * (runs_of(d.capacity) + ceil_div(d.most_rows, QUERIES_PER_TASK) + 1);
  return max_of(max_of(products, attention), d.most_rows);
}

void exp_of_scaled(const float* x, i64 n, float top, float temperature, float* out) {
  for (i64 i = 0; i < n; i += W) store_upto(out + i, exp_nonpositive((load_upto(x + i, n - i) - top) / temperature), n - i);
}
