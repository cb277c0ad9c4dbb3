// Low-rank adapters beside a model's packed weights, chosen for each sequence (Hu et al., 2021): y += s (x A^T) B^T.
// Plain data: native_adapter.cpp owns it, adapter.inl computes with it.
#pragma once

#include "../kernels.h"

namespace llmfast {

// What is added to the product of one matrix. Weights that share the matrix (query, key and value) have an A each, one
// above the other; a vector of columns takes what the A of its own weight gave, and no others.
struct AdapterMatrix {
  i64 K, rank;       // rank: of all its A together; 0: nothing is added
  i64 a, b;          // where A, (rank, K), and B begin among the values
  const i64* first;  // of each vector of columns, panel by panel: the first of its ranks
  const i64* start;  // and where its numbers begin in B, in vectors, one for each of its ranks; one more at the end
};

struct DecoderAdapter {
  float scale;
  i64 most_rank;
  const AdapterMatrix* matrix;  // of block i those from 4 i on: query_key_value, attention_out, mlp_in, mlp_out
  const float* f32;             // the values; one of the two is null
  const bfloat16* bf16;         // rounded, which takes half the time to read
};

}  // namespace llmfast
