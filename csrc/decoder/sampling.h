// The next token from a row of logits, as llmfast/inference/sampling.py chooses it.
#pragma once

#include "../kernels.h"

namespace llmfast {

struct SamplingArgs {
  const float* logits;  // (n,)
  i64 n;
  double temperature;   // above 0
  i64 top_k;            // 0: all
  double top_p, min_p;  // 1 and 0: all
  double uniform;       // in [0, 1): where in the distribution to draw
};

// -1 where the logits are not finite.
i64 sample(const SamplingArgs& args);

}  // namespace llmfast
