// The owner of what adapter.h describes.
#pragma once

#include <vector>

#include "adapter.h"
#include "native_decoder.h"

namespace llmfast {

class NativeAdapter {
 public:
  // `parameters` are the model's, by their numbers; `a` and `b` hold (rank, K) and (N, rank) of one after the other, finite.
  // `rounded`: to 8 bits, each rank by its largest magnitude in A and in B.
  NativeAdapter(const NativeModel& model, const std::vector<int64_t>& parameters, i64 rank, float scale, const float* a,
                i64 a_size, const float* b, i64 b_size, bool rounded);
  NativeAdapter(const NativeAdapter&) = delete;

  const DecoderAdapter& ready() const { return adapter_; }
  const DecoderModel& model() const { return *model_; }
  size_t bytes() const { return 4 * floats_.size() + bytes_.size(); }

 private:
  // A weight that has an adapter: where its rows stand in the matrix, and its own A and B.
  struct Part {
    const NativeModel::Place* place;
    const float *a, *b;
  };
  void pack(const PackedMatrix& m, const std::vector<Part>& parts, i64 rank, float scale, const Kernels& kernels);

  const DecoderModel* model_;
  const bool rounded_;
  DecoderAdapter adapter_{};
  std::vector<AdapterMatrix> matrices_;
  std::vector<std::vector<i64>> firsts_, starts_;  // of each matrix
  std::vector<float> factors_, floats_;
  std::vector<uint8_t> bytes_;
};

}  // namespace llmfast
