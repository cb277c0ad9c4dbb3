// The next token from a row of logits, as llmfast/inference/sampling.py chooses it.
#pragma once

#include "../kernels.h"

namespace llmfast {

struct SamplingArgs {
  const float* logits;  // (n,)
  i64 n;
  double temperature;   // 0: the likeliest
  i64 top_k;            // 0: all
  double top_p, min_p;  // 1 and 0: all
  double uniform;       // in [0, 1): where in the distribution to draw
  const int32_t* mask;  // a bit for each token that may be drawn, the lowest first, or null: all
};

// -1 where the logits are not finite, or the mask leaves none.
i64 sample(const SamplingArgs& args);

}  // namespace llmfast
