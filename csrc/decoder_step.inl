// One step of the decoder: new tokens of one or several sequences in, the logits of the next ones out.
//
//   x = token[ids] + position                          (rows, C), the residual stream, float32
//   for each layer:
//     q, k, v = ln_1(x) W + b                          k and v go straight into the cache
//     attended = attention(q, cache)
//     x += attended W + b
//     x += gelu(ln_2(x) W + b) W + b
//   logits = ln_f(x) head^T
//
// Five phases a layer (phases.inl). LayerNorm and the rounding of activations have none of their own for a few rows:
// every thread does them for itself, which takes less time than to hand them round.
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

LLMFAST_INLINE void normalise_row(const LayerNormWeights& norm, const float* x, i64 N, float eps, float* out) {
  const float mean = sum_over(N, [&](i64 j, i64 n) { return load_upto(x + j, n); }) / float(N);
  const float variance = sum_over(N, [&](i64 j, i64 n) {
    const vf d = first_lanes(load_upto(x + j, n) - mean, n);
    return d * d;
  }) / float(N);
  const float rstd = 1.0f / ::sqrtf(variance + eps);
  for (i64 j = 0; j < N; j += W) {
    const i64 n = min_of<i64>(W, N - j);
    store_upto(out + j, (load_upto(x + j, n) - mean) * rstd * load_upto(norm.weight + j, n) + load_upto(norm.bias + j, n), n);
  }
}

// A row of activations for a product, in its format; with two terms it becomes two rows, whose products are added up.
LLMFAST_INLINE void prepare_terms(const PackedMatrix& m, float* x, uint8_t* to) {
  prepare_row(m.format, x, m.K, to);
  if (m.terms < 2) return;
  const float scale = *reinterpret_cast<const float*>(to + scale_offset(m.format, m.K));
  for (i64 k = 0; k < m.K; k++) x[k] -= float(reinterpret_cast<const int8_t*>(to)[k]) * scale;
  prepare_row(m.format, x, m.K, to + row_bytes(m.format, m.K));
}

// The rows of the next product's input, in its format: source(row, out) gives them in float32. Every thread prepares a few
// rows for itself; more are shared out before the product, and where they are not too many, every thread takes a copy.
template <class Source>
struct Input {
  const PackedMatrix& m;
  const i64 rows;
  const Source source;
  uint8_t* own;           // the thread's copy, or null
  const uint8_t* shared;  // what was prepared together, or null
  mutable bool ready;     // the thread's copy, at its first chunk of the product

  const uint8_t* read(Commit& commit) const {
    if (!own) return shared;
    const i64 bytes = m.terms * row_bytes(m.format, m.K), stride = round_up(m.K, W);
    Scratch floats(ready || shared ? 1 : rows * stride);
    if (!ready && shared) memcpy(own, shared, size_t(rows * bytes));
    if (!ready && !shared)
      for (i64 r = 0; r < rows; r++) source(r, floats.data + r * stride);
    commit.detach();  // before the rounding, which takes the longest
    if (!ready && !shared)
      for (i64 r = 0; r < rows; r++) prepare_terms(m, floats.data + r * stride, own + r * bytes);
    ready = true;
    return own;
  }
};

template <class Source>
Input<Source> prepare(Worker& w, const PackedMatrix& m, i64 rows, uint8_t* own, const Source& source) {
  if (rows <= OWN_ROWS) return {m, rows, source, own, nullptr, false};
  const i64 bytes = m.terms * row_bytes(m.format, m.K);
  Scratch row(round_up(m.K, W));
  Scratch some(PREPARED_AT_ONCE * bytes / 4);
  uint8_t* to = reinterpret_cast<uint8_t*>(some.data);
  phase(w, ceil_div(rows, PREPARED_AT_ONCE), [&](i64 chunk, Commit& commit) {
    const i64 r0 = chunk * PREPARED_AT_ONCE, n = min_of(PREPARED_AT_ONCE, rows - r0);
    for (i64 r = 0; r < n; r++) {
      source(r0 + r, row.data);
      prepare_terms(m, row.data, to + r * bytes);
    }
    if (commit()) memcpy(w.d.prepared + r0 * bytes, to, size_t(n * bytes));
  });
  return {m, rows, source, rows <= SHORT ? own : nullptr, w.d.prepared, false};
}

// finish(row, count, column, columns, tile) writes rows of act(input W^T + b): a tile of TILE_COLS wide rows.
template <class Input, class Finish>
void multiply(Worker& w, const PackedMatrix& m, i64 rows, const Input& input, Activation activation, const Finish& finish) {
  const i64 panels = ceil_div(m.N, TILE_COLS), blocks = ceil_div(rows, ROWS_PER_CHUNK);
  const i64 bytes = m.terms * row_bytes(m.format, m.K);
  Scratch tile(min_of(rows, ROWS_PER_CHUNK) * m.terms * TILE_COLS);
  phase(w, panels * blocks, [&](i64 chunk, Commit& commit) {
    const uint8_t* prepared = input.read(commit);
    const i64 panel = chunk / blocks, r0 = chunk % blocks * ROWS_PER_CHUNK, n = min_of(ROWS_PER_CHUNK, rows - r0);
    const i64 column = panel * TILE_COLS;
    panel_product(m, panel, n * m.terms, prepared + r0 * bytes, tile.data);
    if (m.terms == 2)
      for (i64 r = 0; r < n; r++)
        for (i64 j = 0; j < TILE_COLS; j += W)
          store(tile.data + r * TILE_COLS + j,
                load(tile.data + 2 * r * TILE_COLS + j) + load(tile.data + (2 * r + 1) * TILE_COLS + j));
    if (m.bias || activation != Activation::none)
      for (i64 r = 0; r < n; r++)
        for (i64 j = 0; j < TILE_COLS; j += W) {
          float* at = tile.data + r * TILE_COLS + j;
          store(at, activate(activation, m.bias ? load(at) + load(m.bias + column + j) : load(at)));
        }
    if (commit()) finish(r0, n, column, min_of<i64>(TILE_COLS, m.N - column), tile.data);
  });
}

struct DecoderStep {
  Worker& w;
  DecoderState& d;
  const DecoderModel& m;
  const i64 C, H, D, row_bytes_cached, partial_floats, most_runs;

  explicit DecoderStep(Worker& worker)
      : w(worker), d(worker.d), m(*worker.d.model), C(m.width), H(m.heads), D(m.width / m.heads),
        row_bytes_cached(cache_row_bytes(d.cache_type, D)), partial_floats(round_up(D, W) + 2), most_runs(runs_of(d.capacity)) {}

  const Segment& segment_of(i64 row) const {
    const Segment* s = w.segments;
    while (row >= s->row + s->count) s++;
    return *s;
  }

  uint8_t* cached(uint8_t* store, i64 layer, i64 slot, i64 head, i64 position) const {
    return store + (((layer * d.batch + slot) * H + head) * d.capacity + position) * row_bytes_cached;
  }

  void embed() const {
    Scratch own(PREPARED_AT_ONCE * C);
    Scratch token(C);
    phase(w, ceil_div(w.job.rows, PREPARED_AT_ONCE), [&](i64 chunk, Commit& commit) {
      const i64 r0 = chunk * PREPARED_AT_ONCE, n = min_of(PREPARED_AT_ONCE, w.job.rows - r0);
      for (i64 r = 0; r < n; r++) {
        const Segment& s = segment_of(r0 + r);
        const float* position = m.position_embedding + (s.start + r0 + r - s.row) * C;
        unpack_row(m.token_embedding, d.ids[r0 + r], token.data);
        for (i64 j = 0; j < C; j++) own.data[r * C + j] = token.data[j] + position[j];
      }
      if (commit()) memcpy(d.x + r0 * C, own.data, size_t(n * C) * 4);
    });
  }

  void store_cached(i64 layer, const Segment& s, i64 row, bool value, i64 channel, const float* from, i64 n) const {
    uint8_t* to = cached(value ? d.values : d.keys, layer, s.slot, channel / D, s.start + row - s.row);
    if (d.cache_type == CacheType::f32) {
      memcpy(to + channel % D * 4, from, size_t(n) * 4);
    } else {
      bfloat16* at = reinterpret_cast<bfloat16*>(to) + channel % D;
      for (i64 j = 0; j < n; j += W) store_upto(at + j, load_upto(from + j, n - j), n - j);
    }
  }

  template <class Input>
  void query_key_value(i64 layer, const Input& input) const {
    const bool eight_bits = d.cache_type == CacheType::i8;
    multiply(w, m.layer[layer].qkv, w.job.rows, input, Activation::none, [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
      for (i64 r = 0; r < n; r++) {
        const Segment& s = segment_of(r0 + r);
        for (i64 j = 0; j < columns;) {
          const i64 part = (column + j) / C, channel = (column + j) % C;
          const i64 run = min_of(columns - j, part == 0 ? C - channel : D - channel % D);
          const float* from = tile + r * TILE_COLS + j;
          if (part == 0)
            memcpy(d.q + (r0 + r) * C + channel, from, size_t(run) * 4);
          else if (eight_bits)  // a row's scale needs the whole row: it waits for the next phase
            memcpy(d.inner + ((r0 + r) * 2 + part - 1) * C + channel, from, size_t(run) * 4);
          else
            store_cached(layer, s, r0 + r, part == 2, channel, from, run);
          j += run;
        }
      }
    });
    if (!eight_bits) return;
    Scratch own(2 * H * row_bytes_cached / 4 + 1);
    int8_t* rows = reinterpret_cast<int8_t*>(own.data);
    phase(w, w.job.rows, [&](i64 row, Commit& commit) {
      for (i64 i = 0; i < 2 * H; i++) store_cache_row(d.inner + row * 2 * C + i * D, D, rows + i * row_bytes_cached);
      if (!commit()) return;
      const Segment& s = segment_of(row);
      for (i64 i = 0; i < 2 * H; i++)
        memcpy(cached(i < H ? d.keys : d.values, layer, s.slot, i % H, s.start + row - s.row), rows + i * row_bytes_cached,
               size_t(row_bytes_cached));
    });
  }

  i64 attention_chunks(const Segment& s) const {
    return H * (s.count <= SHORT ? runs_of(s.start + s.count) : ceil_div(s.count, QUERIES_PER_TASK));
  }

  // One head, one run of keys, all rows of a short segment: what attention_decode.inl does, into `partials`.
  template <class T>
  void attend_run(i64 layer, const Segment& s, i64 head, i64 run, Commit& commit) const {
    const i64 s0 = run * KEYS_PER_RUN, keys = min_of(KEYS_PER_RUN, s.start + s.count - s0), D_padded = round_up(D, W);
    const i64 stride = row_bytes_cached / i64(sizeof(T));
    const T* k = reinterpret_cast<const T*>(cached(d.keys, layer, s.slot, head, s0));
    const T* v = reinterpret_cast<const T*>(cached(d.values, layer, s.slot, head, s0));
    const float scale = 1.0f / ::sqrtf(float(D));
    Scratch memory(s.count * (D_padded + KEYS_PER_RUN + partial_floats));
    float *q = memory.data, *scores = q + s.count * D_padded, *out = scores + s.count * KEYS_PER_RUN;
    for (i64 r = 0; r < s.count; r++)
      for (i64 j = 0; j < D; j += W) store(q + r * D_padded + j, load_upto(d.q + (s.row + r) * C + head * D + j, D - j) * scale);
    commit.detach();  // the rows of the cache stay: a step that goes back waits for us (native_decoder.cpp)
    // 8-bit keys and values are widened once for all rows.
    constexpr bool widen = sizeof(T) == 1;
    Scratch wide(widen ? 2 * keys * D : 1);
    float *wide_k = wide.data, *wide_v = wide.data + keys * D;
    if constexpr (widen) {
      copy_rows(k, stride, keys, D, wide_k, D);
      copy_rows(v, stride, keys, D, wide_v, D);
      decode_scores(q, s.count, D, D_padded, wide_k, D, keys, scores);
    } else {
      decode_scores(q, s.count, D, D_padded, k, stride, keys, scores);
    }
    for (i64 r = 0; r < s.count; r++) {
      float *p = scores + r * KEYS_PER_RUN, *partial = out + r * partial_floats;
      const i64 visible = min_of(keys, s.start + r + 1 - s0);
      partial[D_padded] = -INFINITY;
      partial[D_padded + 1] = 0.0f;
      if (visible <= 0) continue;
      for (i64 i = visible; i < round_up(visible, W); i++) p[i] = -INFINITY;
      vf high = splat(-INFINITY), total = zeros();
      for (i64 i = 0; i < visible; i += W) high = vmax(load(p + i), high);
      const float top = max_lanes(high), pivot = top == -INFINITY ? 0.0f : top;
      for (i64 i = 0; i < visible; i += W) {
        const vf e = exp_nonpositive(load(p + i) - pivot);
        store(p + i, e);
        total += e;
      }
      partial[D_padded] = top;
      partial[D_padded + 1] = sum_lanes(total);
      if constexpr (widen)
        decode_values(p, visible, D, wide_v, D, partial);
      else
        decode_values(p, visible, D, v, stride, partial);
    }
    if (!commit()) return;
    for (i64 r = 0; r < s.count; r++)
      memcpy(d.partials + (((s.row + r) * H + head) * most_runs + run) * partial_floats, out + r * partial_floats,
             size_t(partial_floats) * 4);
  }

  template <class T>
  void attend_tile(i64 layer, const Segment& s, i64 head, i64 tile, Commit& commit) const {
    AttentionArgs a{};
    a.B = 1;
    a.H = a.Hkv = H;
    a.T = s.count;
    a.S = s.start + s.count;
    a.D = D;
    a.scale = 1.0f / ::sqrtf(float(D));
    a.q = d.q + s.row * C;
    a.k = cached(d.keys, layer, s.slot, 0, 0);
    a.v = cached(d.values, layer, s.slot, 0, 0);
    a.out = d.attended + s.row * C;
    const i64 row = row_bytes_cached / i64(sizeof(T));
    a.q_stride[1] = a.out_stride[1] = D;
    a.q_stride[2] = a.out_stride[2] = C;
    a.k_stride[1] = a.v_stride[1] = d.capacity * row;
    a.k_stride[2] = a.v_stride[2] = row;
    attention_tile<float, T>(a, 0, head, tile * QUERIES_PER_TASK, [&] { return commit(); });
  }

  template <class T>
  void attend_as(i64 layer) const {
    i64 chunks = 0;
    for (i64 i = 0; i < w.job.segments; i++) chunks += attention_chunks(w.segments[i]);
    phase(w, chunks, [&](i64 chunk, Commit& commit) {
      const Segment* s = w.segments;
      for (; chunk >= attention_chunks(*s); s++) chunk -= attention_chunks(*s);
      const i64 head = chunk % H, part = chunk / H;
      if (s->count <= SHORT)
        attend_run<T>(layer, *s, head, part, commit);
      else  // the tiles with the most keys first
        attend_tile<T>(layer, *s, head, ceil_div(s->count, QUERIES_PER_TASK) - 1 - part, commit);
    });
  }

  void attend(i64 layer) const {
    switch (d.cache_type) {
      case CacheType::f32: return attend_as<float>(layer);
      case CacheType::bf16: return attend_as<bfloat16>(layer);
      case CacheType::i8: return attend_as<int8_t>(layer);
    }
  }

  // The attention's output of one row, from the runs of keys where it has several.
  void merge_row(i64 row, float* out) const {
    const Segment& s = segment_of(row);
    if (s.count > SHORT) {
      memcpy(out, d.attended + row * C, size_t(C) * 4);
      return;
    }
    const i64 runs = runs_of(s.start + row - s.row + 1), D_padded = round_up(D, W);
    for (i64 head = 0; head < H; head++) {
      const float* first = d.partials + (row * H + head) * most_runs * partial_floats;
      float top = -INFINITY, sum = 0.0f;
      for (i64 run = 0; run < runs; run++) top = max_of(top, first[run * partial_floats + D_padded]);
      vf o[16];
      const i64 vectors = D_padded / W;
      float* to = out + head * D;
      for (i64 j0 = 0; j0 < vectors; j0 += 16) {
        const i64 n = min_of<i64>(16, vectors - j0);
        for (i64 j = 0; j < n; j++) o[j] = zeros();
        sum = 0.0f;
        for (i64 run = 0; run < runs; run++) {
          const float* partial = first + run * partial_floats;
          const float factor = runs == 1 ? 1.0f : ::expf(partial[D_padded] - top);
          sum += partial[D_padded + 1] * factor;
          for (i64 j = 0; j < n; j++) o[j] += load(partial + (j0 + j) * W) * factor;
        }
        for (i64 j = 0; j < n; j++) store_upto(to + (j0 + j) * W, o[j] * (1.0f / sum), D - (j0 + j) * W);
      }
    }
  }

  template <class Input>
  void add_to_residual(const PackedMatrix& matrix, const Input& input) const {
    multiply(w, matrix, w.job.rows, input, Activation::none, [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
      for (i64 r = 0; r < n; r++) {
        float* to = d.x + (r0 + r) * C + column;
        for (i64 j = 0; j < columns; j += W)
          store_upto(to + j, load_upto(to + j, columns - j) + load_upto(tile + r * TILE_COLS + j, columns - j), columns - j);
      }
    });
  }

  void layer(i64 i, uint8_t* own) const {
    const DecoderLayer& l = m.layer[i];
    const i64 rows = w.job.rows, inner = m.inner;
    const float eps = m.layer_norm_epsilon;
    const auto normalised = [&](const LayerNormWeights& norm) {
      return [&](i64 r, float* out) { normalise_row(norm, d.x + r * C, C, eps, out); };
    };
    query_key_value(i, prepare(w, l.qkv, rows, own, normalised(l.ln_1)));
    attend(i);
    add_to_residual(l.attention_out, prepare(w, l.attention_out, rows, own, [&](i64 r, float* out) { merge_row(r, out); }));
    const auto input = prepare(w, l.mlp_in, rows, own, normalised(l.ln_2));
    multiply(w, l.mlp_in, rows, input, m.activation, [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
      for (i64 r = 0; r < n; r++) memcpy(d.inner + (r0 + r) * inner + column, tile + r * TILE_COLS, size_t(columns) * 4);
    });
    add_to_residual(l.mlp_out, prepare(w, l.mlp_out, rows, own, [&](i64 r, float* out) {
      memcpy(out, d.inner + r * inner, size_t(inner) * 4);
    }));
  }

  i64 output_row(i64 output) const {
    return w.job.all_rows ? output : w.segments[output].row + w.segments[output].count - 1;
  }

  void logits(uint8_t* own) const {
    const i64 V = m.vocabulary, panels = ceil_div(V, TILE_COLS);
    const float eps = m.layer_norm_epsilon;
    const auto input = prepare(w, m.head, w.job.outputs, own, [&](i64 output, float* out) {
      normalise_row(m.ln_f, d.x + output_row(output) * C, C, eps, out);
    });
    multiply(w, m.head, w.job.outputs, input, Activation::none, [&](i64 r0, i64 n, i64 column, i64 columns, const float* tile) {
      for (i64 r = 0; r < n; r++) {
        const float* row = tile + r * TILE_COLS;
        if (w.job.logits) memcpy(w.job.logits + (r0 + r) * V + column, row, size_t(columns) * 4);
        const i64 known = min_of(columns, w.job.vocabulary - column);
        BestLogit best{-INFINITY, int32_t(column)};
        for (i64 j = 0; j < known; j++)
          if (row[j] > best.value) best = {row[j], int32_t(column + j)};
        vf difference = zeros();  // x - x is 0, and NaN where x is not finite
        for (i64 j = 0; j < known; j += W) {
          const vf x = load_upto(row + j, known - j);
          difference += x - x;
        }
        if (sum_lanes(difference) != 0.0f) best = {INFINITY, -1};  // above every other panel's
        d.best[(r0 + r) * panels + column / TILE_COLS] = best;
      }
    });
  }
};

// Enough for a row prepared for any of the model's products, in any format: two terms of bytes take half of a float row,
// and the scales less than the rest, but for the narrowest.
i64 decoder_row_bytes(const DecoderModel& m) { return row_bytes(Format::f32, max_of(m.width, m.inner)) + 4 * ROW_ALIGN; }

i64 decoder_partial_floats(const DecoderState& d) {
  const DecoderModel& m = *d.model;
  return d.most_rows * m.heads * runs_of(d.capacity) * (round_up(m.width / m.heads, W) + 2);
}

// Walks one thread through the whole step.
void decoder_step(DecoderState& d, const StepJob& job, const Segment* segments, int index, uint64_t* last_phase) {
  Worker w{d, job, segments, index, job.first_phase};
  const DecoderStep step(w);
  const DecoderModel& m = *d.model;
  Scratch own(min_of(job.rows, SHORT) * decoder_row_bytes(m) / 4);
  step.embed();
  for (i64 i = 0; i < m.layers; i++) step.layer(i, reinterpret_cast<uint8_t*>(own.data));
  if (job.outputs > 0) step.logits(reinterpret_cast<uint8_t*>(own.data));
  *last_phase = w.tag;
}

// The most chunks a phase can have.
i64 decoder_chunks(const DecoderState& d) {
  const DecoderModel& s = *d.model;
  const i64 widest = max_of(s.vocabulary, max_of(3 * s.width, s.inner));
  const i64 products = ceil_div(widest, TILE_COLS) * ceil_div(d.most_rows, ROWS_PER_CHUNK);
  const i64 segments = min_of(d.batch, d.most_rows);
  const i64 attention = s.heads * segments * (runs_of(d.capacity) + ceil_div(d.most_rows, QUERIES_PER_TASK) + 1);
  return max_of(max_of(products, attention), d.most_rows);
}

void exp_of_scaled(const float* x, i64 n, float top, float temperature, float* out) {
  for (i64 i = 0; i < n; i += W)
    store_upto(out + i, exp_nonpositive((load_upto(x + i, n - i) - top) / temperature), n - i);
}
