// Texts to vectors by a model's packed weights.
#pragma once

#include <memory>

#include "../decoder/native_decoder.h"
#include "encoder.h"

namespace llmfast {

// `ids` are those of all texts, one behind the other, `lengths` says how many each has. Writes `out`, (texts, width).
// Throws where an id or a length does not fit the model.
void encode(const NativeModel& model, const int64_t* ids, i64 count, const std::vector<i64>& lengths, Pooling pooling,
            int threads, float* out);

}  // namespace llmfast
