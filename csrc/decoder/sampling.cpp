// p[i] = exp((logit[i] - max) / temperature), but 0 for what top-k, top-p and min-p leave out; the token is the first at
// which the sum of p over the tokens up to it exceeds `uniform` times the whole sum.

#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace llmfast {
namespace {

constexpr i64 kBlock = 64;

// The k-th largest of n values, without sorting them: the k-th largest of the blocks' maxima is a lower bound for it, and
// few blocks reach that.
float kth_largest(const float* x, i64 n, i64 k, const std::vector<float>& block_max) {
  float bound = -INFINITY;
  if (k <= i64(block_max.size())) {
    std::vector<float> ordered(block_max);
    std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<float>());
    bound = ordered[size_t(k - 1)];
  }
  std::vector<float> found;
  for (size_t b = 0; b < block_max.size(); b++)
    if (block_max[b] >= bound)
      for (i64 i = i64(b) * kBlock; i < std::min(n, i64(b + 1) * kBlock); i++)
        if (x[i] >= bound) found.push_back(x[i]);
  if (i64(found.size()) < k) return -INFINITY;
  std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<float>());
  return found[size_t(k - 1)];
}

// Sets all but the likeliest tokens with total probability `top_p` to 0.
void keep_nucleus(std::vector<float>& p, double top_p) {
  double total = 0;
  for (const float value : p) total += value;
  // What is less likely than this can't belong: all such tokens together have less than 1 - top_p.
  const float least = float((1 - top_p) * total / double(p.size()) / 2);
  std::vector<std::pair<float, i64>> order;
  for (size_t i = 0; i < p.size(); i++)
    if (p[i] > 0 && p[i] >= least) order.emplace_back(-p[i], i64(i));
  std::sort(order.begin(), order.end());  // of equally likely ones the first comes first
  std::vector<float> kept(p.size());
  double before = 0;
  for (const auto& [negative, i] : order) {
    if (before >= top_p * total) break;
    kept[size_t(i)] = -negative;
    before -= double(negative);
  }
  p = std::move(kept);
}

// The logits of the tokens that may be drawn, and the least number there is for the others.
std::vector<float> masked(const float* logits, i64 n, const int32_t* mask) {
  std::vector<float> left(size_t(n), std::numeric_limits<float>::lowest());
  for (i64 first = 0; first < n; first += 32)
    for (uint32_t bits = uint32_t(mask[first / 32]); bits; bits &= bits - 1)
      if (const i64 i = first + __builtin_ctz(bits); i < n) left[size_t(i)] = logits[i];
  return left;
}

i64 likeliest(const float* logits, i64 n) {
  i64 best = -1;
  float top = std::numeric_limits<float>::lowest();
  for (i64 i = 0; i < n; i++)
    if (logits[i] > top) top = logits[i], best = i;
  return best;
}

i64 draw(const SamplingArgs& a) {
  std::vector<float> block_max(size_t((a.n + kBlock - 1) / kBlock), -INFINITY);
  float top = -INFINITY;
  for (i64 i = 0; i < a.n; i++) {
    float& high = block_max[size_t(i / kBlock)];
    high = a.logits[i] > high ? a.logits[i] : high;
  }
  for (const float high : block_max) top = std::max(top, high);
  std::vector<float> p(size_t(a.n));
  const double temperature = std::max(a.temperature, double(std::numeric_limits<float>::min()));
  kernels().exp_of_scaled(a.logits, a.n, top, float(temperature), p.data());
  const auto leave_out = [&](auto unlikely) {
    for (i64 i = 0; i < a.n; i++)
      if (unlikely(i)) p[size_t(i)] = 0;
  };
  if (a.top_k > 0 && a.top_k < a.n) {
    const float least = kth_largest(a.logits, a.n, a.top_k, block_max);
    leave_out([&](i64 i) { return a.logits[i] < least; });
  }
  if (a.top_p < 1) keep_nucleus(p, a.top_p);
  if (a.min_p > 0) leave_out([&](i64 i) { return double(p[size_t(i)]) < a.min_p; });

  std::vector<double> sums(block_max.size());
  double total = 0;
  for (size_t b = 0; b < sums.size(); b++) {
    double sum = 0;
    for (i64 i = i64(b) * kBlock; i < std::min(a.n, i64(b + 1) * kBlock); i++) sum += p[size_t(i)];
    total += sums[b] = sum;
  }
  if (!(total > 0) || !std::isfinite(total)) return -1;
  const double target = a.uniform * total;
  double sum = 0;
  i64 last = 0;
  for (size_t b = 0; b < sums.size(); b++) {
    if (sum + sums[b] <= target) {
      sum += sums[b];
      continue;
    }
    for (i64 i = i64(b) * kBlock; i < std::min(a.n, i64(b + 1) * kBlock); i++) {
      if (p[size_t(i)] > 0) last = i;
      sum += p[size_t(i)];
      if (sum > target) return i;
    }
  }
  if (p[size_t(last)] == 0)  // rounding carried the target past the end: the last token that can be
    for (i64 i = 0; i < a.n; i++)
      if (p[size_t(i)] > 0) last = i;
  return last;
}

}  // namespace

i64 sample(const SamplingArgs& args) {
  SamplingArgs a = args;
  std::vector<float> left;
  if (a.mask) {
    left = masked(a.logits, a.n, a.mask);
    a.logits = left.data();
    if (const i64 best = likeliest(a.logits, a.n); best < 0 || a.temperature == 0) return best;
  }
  return a.temperature == 0 ? likeliest(a.logits, a.n) : draw(a);
}

}  // namespace llmfast
