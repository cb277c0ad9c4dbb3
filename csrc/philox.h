// Philox4x32-10, the counter-based random numbers behind attention dropout: the same bits on every backend and for
// every split of the work, since an element's number depends only on its own position.
//
// key = the two halves of the seed, counter = (key index s, query index t, batch * heads + head, 0); the first of the
// four output words is used. An element is kept when (word >> 1) >= dropout_p * 2^31.

// words[i] for queries t0 + i, i < n, at one key s. A plain loop that the compiler vectorises.
inline void philox_words(uint64_t seed, uint32_t s, uint32_t t0, uint32_t bh, i64 n, uint32_t* words) {
  for (i64 i = 0; i < n; i++) {
    uint32_t c0 = s, c1 = t0 + uint32_t(i), c2 = bh, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      const uint32_t high0 = uint32_t((uint64_t{0xD2511F53u} * c0) >> 32), low0 = 0xD2511F53u * c0;
      const uint32_t high1 = uint32_t((uint64_t{0xCD9E8D57u} * c2) >> 32), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[i] = c0;
  }
}

LLMFAST_INLINE uint32_t dropout_threshold(double p) { return uint32_t(p * 2147483648.0); }
