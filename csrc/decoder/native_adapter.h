// The owner of what adapter.h describes.
#pragma once

#include <vector>

#include "adapter.h"
#include "native_decoder.h"

namespace llmfast {

class NativeAdapter {
 public:
  // `parameters` are the model's, by their numbers; `a` and `b` hold (rank, K) and (N, rank) of one after the other.
  NativeAdapter(const NativeModel& model, const std::vector<int64_t>& parameters, i64 rank, float scale, const float* a,
                i64 a_size, const float* b, i64 b_size, bool rounded);
  NativeAdapter(const NativeAdapter&) = delete;

  const DecoderAdapter& ready() const { return adapter_; }
  const DecoderModel& model() const { return *model_; }
  size_t bytes() const { return 4 * f32_.size() + 2 * bf16_.size(); }

 private:
  // A weight that has an adapter: where its rows stand in the matrix, and its own A and B.
  struct Part {
    const NativeModel::Place* place;
    const float *a, *b;
  };
  void pack(const PackedMatrix& m, const std::vector<Part>& parts, i64 rank, const Kernels& kernels);

  const DecoderModel* model_;
  DecoderAdapter adapter_{};
  std::vector<AdapterMatrix> matrices_;
  std::vector<std::vector<i64>> firsts_, starts_;  // of each matrix
  std::vector<float> f32_;
  std::vector<bfloat16> bf16_;
};

}  // namespace llmfast
