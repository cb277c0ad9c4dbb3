// The native decoder as its kernels see it: packed weights, the memory of the sequences being generated, and what one
// step is asked to do. Plain data: native_decoder.cpp owns it, packed.inl and decoder_step.inl compute with it.
#pragma once

#include "../kernels.h"
#include "adapter.h"
#include "team.h"

namespace llmfast {

// How a matrix holds its weights; all but the floats have the names of llmfast/quantization/encodings.py. f32_split are the
// same floats, for products of many rows (split_floats.inl).
enum class Format { f32, bf16, i8, i4, q8_0, q4_1, q4_k, f32_split };

// Rows `first` and on of a matrix, N of them, in panels of the instruction set's own width (packed.inl).
struct PackedRows {
  Format format;
  i64 first, N;
  uint8_t* panels;
};

// A matrix (N, K). Its weights (query, key and value) may be in formats of their own.
struct PackedMatrix {
  i64 N, K, parts;
  PackedRows part[3];  // which take activations in one and the same form
  const float* bias;   // (N, padded to whole panels) or null
  i64 terms;           // 2: activations are rounded twice, the second time what the first left over
};

// A weight (N, K) as it comes from a file: floats and i8 with any strides (in elements), the others in contiguous parts,
// as llmfast/quantization/encodings.py has them. Parts that a format has not are null.
struct WeightSource {
  Format format;
  const void* values;
  i64 row, col;
  const void *scale, *minimum;
  const uint8_t *scale_code, *minimum_code;
};

// Which rows of a matrix the rows of one of its weights become: from `first` on, and there
//   as_given   in their own order
//   pairs      heads of head_dim rows each, in which channel i and the channel that rotates with it, i + rotary_dim / 2,
//              become neighbours, so that a rotation never needs more than a tile of the product has
//   gate, up   a vector of the gate's rows, a vector of the other's, and so on: a tile of the product has both
struct RowOrder {
  enum class Kind { as_given, pairs, gate, up } kind = Kind::as_given;
  i64 first = 0, head_dim = 0, rotary_dim = 0;
};

enum class Norm { layer, rms };

struct NormWeights {
  const float *weight, *bias;  // no bias: null
};

struct DecoderBlock {
  NormWeights attention_norm, mlp_norm;
  const float *query_norm, *key_norm;  // (head_dim,), in pairs, or null
  PackedMatrix query_key_value, attention_out, mlp_in, mlp_out;
  bool rotary;
  i64 window;  // a position sees so many keys, itself the last; all before it where this is 0
};

// What a model computes, weights apart.
struct DecoderShape {
  i64 vocabulary, positions, width, blocks, heads, key_heads, head_dim, inner;
  i64 rotary_dim;  // so many channels of a head rotate with the position, from the first on; 0: none
  Norm norm;
  Activation activation;
  bool norms_heads;  // some block has a query_norm or a key_norm
  bool gated;        // the MLP is (act(x Wg) * (x Wu)) Wo, not act(x Wi) Wo
  float norm_epsilon, attention_scale, embedding_multiplier, residual_multiplier, logits_divisor;
  float rotary_factor;  // multiplies sine and cosine
  i64 query_channels() const { return heads * head_dim; }
  i64 key_channels() const { return key_heads * head_dim; }
  i64 projected_channels() const { return query_channels() + 2 * key_channels(); }
};

struct DecoderModel : DecoderShape {
  const float* position_embedding;     // (positions, width) or null
  const float* inverse_frequencies;    // (rotary_dim / 2,): a pair turns by position times this
  PackedMatrix token_embedding, head;  // the same panels where they are tied
  NormWeights final_norm;
  const DecoderBlock* block;
  // Of an encoder (encoder_step.inl), which has neither head nor final norm, and looks its tokens up in rows of float32:
  const float *token_rows, *type_embedding;  // (vocabulary, width), (width,)
  NormWeights embedding_norm;
};

// How the keys and values are kept; i8 rows have a float32 scale behind them.
enum class CacheType { f32, bf16, i8 };

// `count` new tokens of the sequence in `slot`, at positions `start` and on: rows `row` and on of the step.
struct Segment {
  i64 slot, start, count, row;
};

// What one step does. Every thread works from a copy of its own, so that one that was away never reads half a job.
struct StepJob {
  uint64_t first_phase;  // the tag of the step's first phase
  int threads;
  i64 rows, segments, outputs;  // outputs: how many rows of logits
  bool all_rows;                // logits of every row, or of each segment's last
  i64 vocabulary;               // `best` looks for the largest logit before this one only
  float* logits;                // (outputs, V) or null
};

// One thread's share of the chunks of a phase: the next one that no thread has taken, and how many are finished. Both words
// carry the tag of the phase they speak of, so that they need no reset in between.
struct alignas(64) PhaseRun {
  uint64_t next, done;
};

struct BestLogit {
  float value;
  int32_t index;  // -1, and an infinite value, where a logit is not finite
};

constexpr int MOST_THREADS = 64;

struct DecoderState : TeamJob {
  const DecoderModel* model;
  CacheType cache_type;
  i64 batch, capacity, most_rows;
  const DecoderAdapter* const* adapters;  // of each slot, null where it has none; or null
  i64 narrow_width;                       // the most ranks that an adapter has beside one matrix

  // Memory that all threads share, written by the thread that commits a chunk.
  uint8_t *keys, *values;  // (blocks, batch, key heads, capacity, row)
  float* x;                // (most_rows, width)
  float *q, *attended;     // (most_rows, heads * head_dim)
  float* inner;            // (most_rows, the MLP's width); before that queries, keys and values that wait for whole heads
  float* rotations;        // (most_rows, 2, rotary_dim)
  float* partials;         // (most_rows, heads, runs of keys, head_dim + 2), of short segments
  uint8_t* prepared;       // most_rows rows in the format of the next matrix
  float* narrow;           // (most_rows, narrow_width), what adapters make of them
  BestLogit* best;         // (outputs, panels of the head)
  i64* ids;                // (most_rows,)
  PhaseRun runs[MOST_THREADS];
  uint64_t* owners;  // of each chunk: the phase's tag, its thread, and how far that is (phases.inl)
};

}  // namespace llmfast
