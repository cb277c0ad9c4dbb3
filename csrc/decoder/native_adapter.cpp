#include "native_adapter.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace llmfast {
namespace {

bfloat16 rounded_to_even(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace

NativeAdapter::NativeAdapter(const NativeModel& model, const std::vector<int64_t>& parameters, i64 rank, float scale,
                             const float* a, i64 a_size, const float* b, i64 b_size, bool rounded)
    : model_(&model.ready()) {
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

  for (i64 i = 0; i < 4 * m.blocks; i++) pack(matrix(i), parts[size_t(i)], rank, model.kernels());
  for (size_t i = 0; i < matrices_.size(); i++) {
    matrices_[i].first = firsts_[i].data();
    matrices_[i].start = starts_[i].data();
    adapter_.most_rank = std::max(adapter_.most_rank, matrices_[i].rank);
  }
  if (rounded) {
    bf16_.resize(f32_.size());
    std::transform(f32_.begin(), f32_.end(), bf16_.begin(), rounded_to_even);
    std::vector<float>().swap(f32_);
  }
  adapter_.scale = scale;
  adapter_.matrix = matrices_.data();
  adapter_.f32 = rounded ? nullptr : f32_.data();
  adapter_.bf16 = rounded ? bf16_.data() : nullptr;
}

void NativeAdapter::pack(const PackedMatrix& m, const std::vector<Part>& parts, i64 rank, const Kernels& kernels) {
  const i64 W = kernels.lanes, columns = kernels.panel_columns, count = i64(parts.size());
  AdapterMatrix packed{m.K, rank * count, i64(f32_.size()), 0, nullptr, nullptr};
  for (const Part& part : parts) f32_.insert(f32_.end(), part.a, part.a + rank * m.K);
  packed.b = i64(f32_.size());

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
        first.push_back(most < 0 ? 0 : least * rank);
        start.push_back(vectors);
        for (i64 part = least; part <= most; part++)
          for (i64 k = 0; k < rank; k++, vectors++)
            for (i64 c = 0; c < W; c++) {
              const Row row = c < width ? rows[size_t(column + c)] : Row{};
              f32_.push_back(row.part == part ? parts[size_t(part)].b[row.n * rank + k] : 0.0f);
            }
      }
  start.push_back(vectors);
  matrices_.push_back(packed);
  firsts_.push_back(std::move(first));
  starts_.push_back(std::move(start));
}

}  // namespace llmfast
