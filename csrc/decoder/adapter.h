// Low-rank adapters beside a model's packed weights, chosen for each sequence (Hu et al., 2021): y += s (x A^T) B^T.
// Plain data: native_adapter.cpp owns it, adapter.inl computes with it.
#pragma once

#include "../kernels.h"

namespace llmfast {

constexpr i64 RANKS = 4;     // a weight's ranks are filled up with zeros to a multiple of this
constexpr i64 STRETCH = 64;  // RANKS rows of A take turns, so much of each; what bytes of it multiply has one scale

// What is added to the product of one matrix. Weights that share the matrix (query, key and value) have an A each, one
// above the other; a vector of columns takes what the A of its own weight gave, and no others.
struct AdapterMatrix {
  i64 K, stride, rank;  // rank: of all its A together; 0: nothing is added. stride: of a row of A, in whole stretches
  i64 a, b;             // where A and B begin among the values
  i64 factors;          // and among the factors, one for each rank, that what A gives is multiplied by
  const i64* first;     // of each vector of columns, panel by panel: the first of its ranks
  const i64* start;     // and where its numbers begin in B, in vectors, one for each of its ranks; one more at the end
};

struct DecoderAdapter {
  i64 most_rank;
  const AdapterMatrix* matrix;  // of block i those from 4 i on: query_key_value, attention_out, mlp_in, mlp_out
  const float* factors;         // s, and the scales of the bytes
  const float* floats;          // the values; one of the two is null
  const uint8_t* bytes;         // in 8 bits, plus 128; of B, RANKS of a column side by side
};

}  // namespace llmfast
