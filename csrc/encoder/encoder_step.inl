// An encoder of BERT's family: the tokens of several texts in, one vector a text out.
//
//   x = norm(token[id] + (position + type))          (rows, C), float32
//   for each block:
//     q, k, v = x W + b
//     x = norm(x + attention(q, k, v) W + b)         every token of a text sees all of it
//     x = norm(x + act(x W + b) W + b)
//   out = the mean, the first or the last row of each text
//
// The texts stand one behind the other, without padding: products run over all rows, attention over those of a text. A row
// has the same bits whatever texts go with it, because the products promise that (packed.inl) and everything else takes a
// row or a text by itself.
//
// Texts go in groups of about ENCODER_ROWS tokens. A thread takes a whole group through all blocks: no thread waits for
// another, and what lies between two products stays in its own cache. Where there are fewer groups than threads (a
// question), all texts are one group, and the threads share each of its steps.
//
// Queries, keys and values are in bfloat16 where the weights are rounded and the CPU multiplies it, else in float32.

constexpr i64 ENCODER_ROWS = 256;

template <class T>
struct EncoderGroup {
  const EncoderJob& job;
  const DecoderModel& m;
  const Threads& threads;
  const i64 first, end;  // of its texts
  const i64 row0, rows, C, H, D;
  Scratch memory;
  float *x, *inner;   // (rows, C) and (rows, the MLP's width)
  T* projected;       // (rows, 3 C): queries, keys and values; then in place of the queries what was attended
  uint8_t* prepared;  // the rows of the next product's input, in its format

  EncoderGroup(const EncoderJob& job, i64 first, i64 end, const Threads& threads)
      : job(job), m(*job.model), threads(threads), first(first), end(end), row0(job.begin[first]),
        rows(job.begin[end] - row0), C(m.width), H(m.heads), D(m.head_dim),
        memory(rows * (C + m.inner + m.projected_channels()) + rows * decoder_row_bytes(m) / 4 + ALIGN) {
    prepared = reinterpret_cast<uint8_t*>(memory.data);
    x = memory.data + rows * decoder_row_bytes(m) / 4;
    inner = x + rows * C;
    projected = reinterpret_cast<T*>(inner + rows * m.inner);
  }

  template <class F>
  void for_rows(const F& f) const {
    constexpr i64 AT_ONCE = 16;
    for_each_task(threads, ceil_div(rows, AT_ONCE), [&](i64 task) {
      for (i64 r = task * AT_ONCE; r < min_of(rows, (task + 1) * AT_ONCE); r++) f(r);
    });
  }

  void embed() const {
    for_each_task(threads, end - first, [&](i64 i) {
      const i64 begin = job.begin[first + i], count = job.begin[first + i + 1] - begin;
      for (i64 t = 0; t < count; t++) {
        const float *token = m.token_rows + job.ids[begin + t] * C, *position = m.position_embedding + t * C;
        float* to = x + (begin - row0 + t) * C;
        for_each_vector(C, [&](i64 j, i64 n) {
          const vf place = load_upto(position + j, n) + load_upto(m.type_embedding + j, n);
          store_upto(to + j, load_upto(token + j, n) + place, n);
        });
      }
    });
  }

  // finish(row, column, n, values) for every vector of n columns of (prepared rows) W + b.
  template <class Finish>
  void multiply(const PackedMatrix& w, const Finish& finish) const {
    const i64 blocks = ceil_div(rows, ROWS_PER_CHUNK), bytes = prepared_bytes(w);
    for_each_task(threads, panels_of(w) * blocks, [&](i64 task) {
      const Panel panel = panel_of(w, task / blocks);
      const i64 r0 = task % blocks * ROWS_PER_CHUNK, count = min_of(ROWS_PER_CHUNK, rows - r0);
      Scratch tile(count * w.terms * TILE_COLS);
      panel_product(w, panel, count, prepared + r0 * bytes, tile.data);
      for (i64 r = 0; r < count; r++)
        for (i64 j = 0; j < panel.rows; j += W) {
          const vf sum = load(tile.data + r * TILE_COLS + j), b = w.bias ? load(w.bias + panel.first + j) : zeros();
          finish(r0 + r, panel.first + j, panel.rows - j, sum + b);
        }
    });
  }
  void add_product(const PackedMatrix& w) const {
    multiply(w, [&](i64 row, i64 column, i64 n, vf value) {
      float* to = x + row * C + column;
      store_upto(to, load_upto(to, n) + value, n);
    });
  }

  // The stream, normalised, as input of `next` if there is one.
  void normalise(const NormWeights& norm, const PackedMatrix* next) const {
    for_rows([&](i64 r) {
      Scratch row(round_up(C, W));
      normalise_row(m.norm, norm, x + r * C, C, m.norm_epsilon, x + r * C);
      if (!next) return;
      memcpy(row.data, x + r * C, size_t(C) * 4);
      prepare_row(*next, row.data, prepared + r * prepared_bytes(*next));
    });
  }

  void attend() const {
    AttentionArgs a{};
    a.B = 1, a.H = a.Hkv = H, a.D = D;
    a.bidirectional = true;
    a.scale = m.attention_scale;
    a.q_stride[1] = a.k_stride[1] = a.v_stride[1] = a.out_stride[1] = D;
    a.q_stride[2] = a.k_stride[2] = a.v_stride[2] = a.out_stride[2] = 3 * C;
    for_each_task(threads, (end - first) * H, [&](i64 task) {
      const i64 text = first + task / H;
      AttentionArgs of = a;
      T* q = projected + (job.begin[text] - row0) * 3 * C;
      of.T = of.S = job.begin[text + 1] - job.begin[text];
      of.q = of.out = q;  // a task reads its queries before it writes
      of.k = q + C;
      of.v = q + 2 * C;
      for (i64 t = 0; t < of.T; t += MOST_QUERIES_PER_TASK)
        attention_tile<T, T>(of, 0, task % H, t, [] { return true; }, MOST_QUERIES_PER_TASK);
    });
  }

  void block(const DecoderBlock& b, const PackedMatrix* next) const {
    multiply(b.query_key_value,
             [&](i64 row, i64 column, i64 n, vf value) { store_upto(projected + row * 3 * C + column, value, n); });
    attend();
    for_rows([&](i64 r) {
      Scratch row(round_up(C, W));
      for_each_vector(C, [&](i64 j, i64 n) { store_upto(row.data + j, load_upto(projected + r * 3 * C + j, n), n); });
      prepare_row(b.attention_out, row.data, prepared + r * prepared_bytes(b.attention_out));
    });
    add_product(b.attention_out);
    normalise(b.attention_norm, &b.mlp_in);
    with_activation(m.activation, [&](auto act) {
      multiply(b.mlp_in, [&](i64 row, i64 column, i64 n, vf value) {
        store_upto(inner + row * m.inner + column, decltype(act)::value(value), n);
      });
    });
    for_rows([&](i64 r) { prepare_row(b.mlp_out, inner + r * m.inner, prepared + r * prepared_bytes(b.mlp_out)); });
    add_product(b.mlp_out);
    normalise(b.mlp_norm, next);
  }

  void pool() const {
    for_each_task(threads, end - first, [&](i64 i) {
      const i64 begin = job.begin[first + i] - row0, count = job.begin[first + i + 1] - row0 - begin;
      const i64 from = job.pooling == Pooling::last ? count - 1 : 0, to = job.pooling == Pooling::first ? 1 : count;
      for_each_vector(C, [&](i64 j, i64 n) {
        vf sum = zeros();
        for (i64 r = begin + from; r < begin + to; r++) sum += load_upto(x + r * C + j, n);
        store_upto(job.out + (first + i) * C + j, sum / float(to - from), n);
      });
    });
  }

  void run() const {
    embed();
    normalise(m.embedding_norm, m.blocks ? &m.block[0].query_key_value : nullptr);
    for (i64 i = 0; i < m.blocks; i++) block(m.block[i], i + 1 < m.blocks ? &m.block[i + 1].query_key_value : nullptr);
    pool();
  }
};

template <class T>
void encode_as(const EncoderJob& job, const Threads& threads) {
  // The text behind the group that begins with `first`.
  const auto end_of = [&](i64 first) {
    i64 end = first + 1;
    while (end < job.texts && job.begin[end + 1] - job.begin[first] <= ENCODER_ROWS) end++;
    return end;
  };
  i64 groups = 0;
  for (i64 first = 0; first < job.texts; first = end_of(first)) groups++;
  if (groups < threads.count) return EncoderGroup<T>(job, 0, job.texts, threads).run();
  Scratch memory(2 * groups);
  i64* firsts = reinterpret_cast<i64*>(memory.data);
  for (i64 first = 0, i = 0; first < job.texts; first = end_of(first)) firsts[i++] = first;
  const Threads alone{1, nullptr};
  for_each_task(threads, groups, [&](i64 i) { EncoderGroup<T>(job, firsts[i], end_of(firsts[i]), alone).run(); });
}

void encode(const EncoderJob& job, const Threads& threads) {
  if (job.texts == 0) return;
#if LLMFAST_BF16_DOT
  const Format format = job.model->blocks ? job.model->block[0].query_key_value.part[0].format : Format::f32;
  if (format != Format::f32 && format != Format::f32_split) return encode_as<bfloat16>(job, threads);
#endif
  encode_as<float>(job, threads);
}
