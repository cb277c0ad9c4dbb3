// An encoder's call as its kernels see it: the weights are packed as the decoder's are (decoder.h), and a call keeps nothing.
#pragma once

#include "../decoder/decoder.h"

namespace llmfast {

enum class Pooling { mean, first, last };  // of the vectors of a text's tokens

// Texts without padding: text i has the ids from begin[i] to before begin[i + 1]. Every one has some, and none more than
// the model has positions.
struct EncoderJob {
  const DecoderModel* model;
  const i64 *ids, *begin;
  i64 texts;
  Pooling pooling;
  float* out;  // (texts, width)
};

}  // namespace llmfast
