// What the C++ of lesson 15 begins with: vectors of floats, exp of a vector, and work dealt out to threads.
#pragma once
#include <cmath>
#include <thread>
#include <vector>

#define EXPORT extern "C" void

// GCC's and Clang's vector extensions: +, -, *, / and comparisons work lane by lane, on any machine.
#ifdef __AVX512F__
constexpr long W = 16, ROWS = 12;  // lanes of a register; rows of a tile that fit in 32 registers
#else
constexpr long W = 8, ROWS = 6;  // 16 registers
#endif
typedef float vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int ivec __attribute__((vector_size(4 * W), aligned(4)));

// e^x lane by lane: x = k ln 2 + r, so e^x = 2^k e^r with |r| <= ln 2 / 2, where a short polynomial is enough; and 2^k
// is k written into the exponent's bits.
static inline vec vexp(vec x) {
  x = x > 87.0f ? vec{} + 87.0f : x < -87.0f ? vec{} - 87.0f : x;
  const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const vec k = shifted - 12582912.0f, r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
  vec p = 1.0f / 720 * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const ivec exponent = ((ivec)shifted - 0x4b400000 + 127) << 23;
  return p * (vec)exponent;
}

// Calls work(first, last) on as many threads, each with its share of 0 … n in multiples of `step`.
template <class Work>
void in_parallel(long n, long step, long threads, Work work) {
  const long steps = (n + step - 1) / step, share = (steps + threads - 1) / threads * step;
  std::vector<std::thread> team;
  for (long first = 0; first < n; first += share)
    team.emplace_back([=] { work(first, first + share < n ? first + share : n); });
  for (auto& thread : team) thread.join();
}
