#include "native_encoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace llmfast {

void encode(const NativeModel& model, const int64_t* ids, i64 count, const std::vector<i64>& lengths, Pooling pooling,
            int threads, float* out) {
  const DecoderModel& m = model.ready();
  if (!m.token_rows) throw std::runtime_error("the model is a decoder, not an encoder");
  std::vector<i64> begin{0};
  for (const i64 length : lengths) {
    if (length < 1 || length > m.positions || length > count - begin.back())
      throw std::runtime_error("a text has " + std::to_string(length) + " tokens, expected 1 to " +
                               std::to_string(m.positions) + ", and no more than there are ids");
    begin.push_back(begin.back() + length);
  }
  if (begin.back() != count)
    throw std::runtime_error("the texts have " + std::to_string(begin.back()) + " tokens, ids " + std::to_string(count));
  for (i64 i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= m.vocabulary)
      throw std::runtime_error("token id " + std::to_string(ids[i]) + " is not in the vocabulary of " +
                               std::to_string(m.vocabulary));
  const EncoderJob job{&m, ids, begin.data(), i64(lengths.size()), pooling, out};
  model.kernels().encode(job, team_threads(std::max(1, std::min(threads, MOST_THREADS))));
}

}  // namespace llmfast
