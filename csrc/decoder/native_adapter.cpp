#include "native_adapter.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace llmfast {
namespace {

// The largest magnitude of n numbers, `step` apart.
float largest(const float* from, i64 n, i64 step) {
  float top = 0.0f;
  for (i64 i = 0; i < n; i++) {
    if (!std::isfinite(from[i * step])) throw std::runtime_error("an adapter holds a number that is not finite");
    top = std::max(top, std::fabs(from[i * step]));
  }
  return top;
}

}  // namespace

NativeAdapter::NativeAdapter(const NativeModel& model, const std::vector<int64_t>& parameters, i64 rank, float scale,
                             const float* a, i64 a_size, const float* b, i64 b_size, bool rounded)
    : model_(&model.ready()), rounded_(rounded) {
  const DecoderModel& m = *model_;
  const auto matrix = [&](i64 i) -> const PackedMatrix& {
    const DecoderBlock& block = m.block[i / 4];
    const PackedMatrix* of[] = {&block.query_key_value, &block.attention_out, &block.mlp_in, &block.mlp_out};
    return *of[i % 4];
  };
  if (rank < 1) throw std::runtime_error("an adapter's rank must be positive");
  std::vector<std::vector<Part>> parts(size_t(4 * m.blocks));
  i64 a_used = 0, b_used = 0;
  for (const int64_t number : parameters) {
    if (number < 0 || number >= model.parameters()) throw std::runtime_error("an adapter is for a parameter that is none");
    const NativeModel::Place& place = model.place(number);
    i64 at = 0;
    while (at < 4 * m.blocks && (!place.matrix || place.matrix != &matrix(at))) at++;
    if (at == 4 * m.blocks) throw std::runtime_error("an adapter is for a parameter that is no matrix of a block");
    std::vector<Part>& here = parts[size_t(at)];
    for (const Part& other : here)
      if (other.place == &place) throw std::runtime_error("an adapter has a parameter twice");
    if (rank > (a_size - a_used) / place.K || rank > (b_size - b_used) / place.N)
      throw std::runtime_error("an adapter has fewer numbers than its parameters take");
    here.push_back({&place, a + a_used, b + b_used});
    a_used += rank * place.K;
    b_used += rank * place.N;
  }
  if (a_used != a_size || b_used != b_size) throw std::runtime_error("an adapter has more numbers than its parameters take");

  for (i64 i = 0; i < 4 * m.blocks; i++) pack(matrix(i), parts[size_t(i)], rank, scale, model.kernels());
  for (size_t i = 0; i < matrices_.size(); i++) {
    matrices_[i].first = firsts_[i].data();
    matrices_[i].start = starts_[i].data();
    adapter_.most_rank = std::max(adapter_.most_rank, matrices_[i].rank);
  }
  adapter_.matrix = matrices_.data();
  adapter_.factors = factors_.data();
  adapter_.floats = rounded ? nullptr : floats_.data();
  adapter_.bytes = rounded ? bytes_.data() : nullptr;
}

void NativeAdapter::pack(const PackedMatrix& m, const std::vector<Part>& parts, i64 rank, float scale,
                         const Kernels& kernels) {
  const i64 W = kernels.lanes, columns = kernels.panel_columns, count = i64(parts.size());
  const i64 ranks = (rank + RANKS - 1) / RANKS * RANKS, stride = (m.K + STRETCH - 1) / STRETCH * STRETCH;
  const auto here = [&] { return i64(floats_.size() + bytes_.size()); };
  const auto put = [&](float value, float top) {
    if (rounded_)
      bytes_.push_back(uint8_t(128 + std::lrint(top > 0.0f ? value / top * 127 : 0.0f)));
    else
      floats_.push_back(value);
  };
  AdapterMatrix packed{m.K, stride, ranks * count, here(), 0, i64(factors_.size()), nullptr, nullptr};
  std::vector<float> b_tops;  // of each rank
  for (const Part& part : parts)
    for (i64 k0 = 0; k0 < ranks; k0 += RANKS) {
      float tops[RANKS];
      for (i64 r = 0; r < RANKS; r++) {
        const bool in = k0 + r < rank;
        tops[r] = in ? largest(part.a + (k0 + r) * m.K, m.K, 1) : 0.0f;
        b_tops.push_back(in ? largest(part.b + k0 + r, part.place->N, rank) : 0.0f);
        factors_.push_back(rounded_ ? scale * (tops[r] / 127) * (b_tops.back() / 127) : scale);
      }
      for (i64 i = 0; i < RANKS * stride; i++) {
        const i64 r = i / STRETCH % RANKS, j = i / (RANKS * STRETCH) * STRETCH + i % STRETCH;
        put(k0 + r < rank && j < m.K ? part.a[(k0 + r) * m.K + j] : 0.0f, tops[r]);
      }
    }
  packed.b = here();

  struct Row {
    i64 part = -1, n = 0;
  };
  std::vector<Row> rows(size_t(m.N + columns));  // of the matrix: of which weight each is which
  for (i64 p = 0; p < count; p++)
    for (i64 n = 0; n < parts[size_t(p)].place->N; n++)
      rows[size_t(kernels.packed_row(parts[size_t(p)].place->order, n))] = {p, n};

  std::vector<i64> first, start;
  i64 vectors = 0;
  for (i64 i = 0; i < m.parts; i++)
    for (i64 panel = 0; panel < m.part[i].N; panel += columns)
      for (i64 j = 0; j < columns; j += W) {
        const i64 column = m.part[i].first + panel + j, width = std::min(W, m.part[i].N - panel - j);
        i64 least = count, most = -1;  // the weights that have a column here
        for (i64 c = 0; c < width; c++)
          if (const i64 part = rows[size_t(column + c)].part; part >= 0)
            least = std::min(least, part), most = std::max(most, part);
        first.push_back(most < 0 ? 0 : least * ranks);
        start.push_back(vectors);
        for (i64 part = least; part <= most; part++, vectors += ranks)
          for (i64 i = 0; i < ranks * W; i++) {  // a rank after the other, or RANKS of each column
            const i64 k = rounded_ ? i / (RANKS * W) * RANKS + i % RANKS : i / W, c = (rounded_ ? i / RANKS : i) % W;
            const bool in = k < rank && c < width && rows[size_t(column + c)].part == part;
            put(in ? parts[size_t(part)].b[rows[size_t(column + c)].n * rank + k] : 0.0f, b_tops[size_t(part * ranks + k)]);
          }
      }
  start.push_back(vectors);
  matrices_.push_back(packed);
  firsts_.push_back(std::move(first));
  starts_.push_back(std::move(start));
}

}  // namespace llmfast
