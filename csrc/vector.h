// One vector of W floats, the same source for every instruction set: GCC and Clang vector extensions, and intrinsics
// only for the two bfloat16 conversions, which GCC takes apart.
//
// W comes from the including file (kernels_<isa>.cpp): 16 with AVX-512, 8 with AVX2, 4 otherwise. This file is included
// inside an anonymous namespace, so that no function compiled for one instruction set is ever linked into another; for
// the same reason nothing here or in the .inl files calls a template of the standard library.

constexpr int W = LLMFAST_VECTOR_WIDTH;

#define LLMFAST_INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
// The same, read from and written to memory at any alignment.
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

template <class A>
LLMFAST_INLINE A min_of(A a, A b) {
  return b < a ? b : a;
}
template <class A>
LLMFAST_INLINE A max_of(A a, A b) {
  return a < b ? b : a;
}
LLMFAST_INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
LLMFAST_INLINE i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

LLMFAST_INLINE vf zeros() { return vf{}; }
LLMFAST_INLINE vf splat(float a) { return a - vf{}; }
LLMFAST_INLINE vi splat_int(int32_t a) { return a - vi{}; }
LLMFAST_INLINE vi lane_index() {
#if LLMFAST_VECTOR_WIDTH == 16
  return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LLMFAST_VECTOR_WIDTH == 8
  return vi{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return vi{0, 1, 2, 3};
#endif
}
LLMFAST_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // where b is a NaN, b; so too vmin
LLMFAST_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// bfloat16 is the upper half of a float. Rounding is to nearest, ties to even; a NaN stays a NaN.
LLMFAST_INLINE float to_float(float a) { return a; }
LLMFAST_INLINE float to_float(bfloat16 a) {
  const uint32_t bits = uint32_t{a.bits} << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
LLMFAST_INLINE void from_float(float a, float* p) { *p = a; }
LLMFAST_INLINE void from_float(float a, bfloat16* p) {
  uint32_t u;
  memcpy(&u, &a, 4);
  p->bits = a != a ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

LLMFAST_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
LLMFAST_INLINE vf load(const bfloat16* p) {
#if LLMFAST_VECTOR_WIDTH == 16
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif LLMFAST_VECTOR_WIDTH == 8
  return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
  return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu) << 16);
#endif
}
// float16, finite: what holds a scale in a file.
LLMFAST_INLINE vf load(const float16* p) {
#if LLMFAST_VECTOR_WIDTH == 16
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LLMFAST_VECTOR_WIDTH == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Its exponent and fraction in a float's places are the number times 2^-112, subnormal ones too.
  const vu bits = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
  const vf magnitude = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vf)((vu)magnitude | (bits & 0x8000) << 16);
#endif
}
// Unsigned bytes.
LLMFAST_INLINE vf load_bytes(const uint8_t* p) {
#if LLMFAST_VECTOR_WIDTH == 16
  return (vf)_mm512_maskz_cvtepi32_ps(
      0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif LLMFAST_VECTOR_WIDTH == 8
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vf lanes{};
  for (int i = 0; i < W; i++) lanes[i] = float(p[i]);
  return lanes;
#endif
}
LLMFAST_INLINE void store(float* p, vf a) { *reinterpret_cast<vf_unaligned*>(p) = a; }
LLMFAST_INLINE void store(bfloat16* p, vf a) {
#if LLMFAST_BF16_DOT
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)a);  // numbers below 1e-38 become 0
  memcpy(p, &rounded, sizeof(rounded));
#else
  const vu u = (vu)a;
  const vu rounded = u + 0x7fff + ((u >> 16) & 1);
  const vu bits = (a == a ? rounded : u | 0x400000) >> 16;
#if LLMFAST_VECTOR_WIDTH == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits));
#else
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh);
#endif
#endif
}

LLMFAST_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // p need not be valid

// The first n < W elements; the other lanes read as zero and are never touched in memory.
template <class T>
LLMFAST_INLINE vf load_n(const T* p, i64 n) {
  T lanes[W] = {};
  for (i64 i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
LLMFAST_INLINE void store_n(T* p, vf a, i64 n) {
  T lanes[W];
  store(lanes, a);
  for (i64 i = 0; i < n; i++) p[i] = lanes[i];
}
template <class T>
LLMFAST_INLINE vf load_upto(const T* p, i64 n) {
  return n >= W ? load(p) : load_n(p, n);
}
template <class T>
LLMFAST_INLINE void store_upto(T* p, vf a, i64 n) {
  if (n >= W)
    store(p, a);
  else
    store_n(p, a, n);
}

// interleave_low(a, b) = a0 b0 a1 b1 ..., interleave_high the same from the upper halves.
#if LLMFAST_VECTOR_WIDTH == 16
#define LLMFAST_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LLMFAST_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LLMFAST_VECTOR_WIDTH == 8
#define LLMFAST_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LLMFAST_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LLMFAST_LOW 0, 4, 1, 5
#define LLMFAST_HIGH 2, 6, 3, 7
#endif
template <int... LANES>
LLMFAST_INLINE vf shuffle(vf a, vf b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANES...);
#else
  return __builtin_shuffle(a, b, vi{LANES...});
#endif
}
// Lane i of the result is lane i + BY of a, counted around.
template <int BY>
LLMFAST_INLINE vf rotate_lanes(vf a) {
#if LLMFAST_VECTOR_WIDTH == 16
  return shuffle<BY % 16, (BY + 1) % 16, (BY + 2) % 16, (BY + 3) % 16, (BY + 4) % 16, (BY + 5) % 16, (BY + 6) % 16,
                 (BY + 7) % 16, (BY + 8) % 16, (BY + 9) % 16, (BY + 10) % 16, (BY + 11) % 16, (BY + 12) % 16, (BY + 13) % 16,
                 (BY + 14) % 16, (BY + 15) % 16>(a, a);
#elif LLMFAST_VECTOR_WIDTH == 8
  return shuffle<BY % 8, (BY + 1) % 8, (BY + 2) % 8, (BY + 3) % 8, (BY + 4) % 8, (BY + 5) % 8, (BY + 6) % 8, (BY + 7) % 8>(
      a, a);
#else
  return shuffle<BY % 4, (BY + 1) % 4, (BY + 2) % 4, (BY + 3) % 4>(a, a);
#endif
}
// The first lane of a after it has been folded in halves: f(lower half, upper half), and so on. One fixed order.
template <class F>
LLMFAST_INLINE vf fold_lanes(vf a, const F& f) {
#if LLMFAST_VECTOR_WIDTH >= 16
  a = f(a, rotate_lanes<8>(a));
#endif
#if LLMFAST_VECTOR_WIDTH >= 8
  a = f(a, rotate_lanes<4>(a));
#endif
  a = f(a, rotate_lanes<2>(a));
  return f(a, rotate_lanes<1>(a));
}
LLMFAST_INLINE float sum_lanes(vf a) {
  return fold_lanes(a, [](vf x, vf y) { return x + y; })[0];
}
LLMFAST_INLINE int32_t sum_lanes(vi a) {
  return ((vi)fold_lanes((vf)a, [](vf x, vf y) { return (vf)((vi)x + (vi)y); }))[0];
}
LLMFAST_INLINE int32_t max_lanes(vi a) {
  return ((vi)fold_lanes((vf)a, [](vf x, vf y) { return (vf)((vi)x > (vi)y ? (vi)x : (vi)y); }))[0];
}
LLMFAST_INLINE float max_lanes(vf a) {
  return fold_lanes(a, [](vf x, vf y) { return vmax(x, y); })[0];
}

// And back: a0 a2 ... b0 b2 ..., and a1 a3 ... b1 b3 ...
#if LLMFAST_VECTOR_WIDTH == 16
LLMFAST_INLINE vf evens(vf a, vf b) { return shuffle<0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30>(a, b); }
LLMFAST_INLINE vf odds(vf a, vf b) { return shuffle<1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31>(a, b); }
#elif LLMFAST_VECTOR_WIDTH == 8
LLMFAST_INLINE vf evens(vf a, vf b) { return shuffle<0, 2, 4, 6, 8, 10, 12, 14>(a, b); }
LLMFAST_INLINE vf odds(vf a, vf b) { return shuffle<1, 3, 5, 7, 9, 11, 13, 15>(a, b); }
#else
LLMFAST_INLINE vf evens(vf a, vf b) { return shuffle<0, 2, 4, 6>(a, b); }
LLMFAST_INLINE vf odds(vf a, vf b) { return shuffle<1, 3, 5, 7>(a, b); }
#endif
#if LLMFAST_VECTOR_WIDTH == 16
LLMFAST_INLINE vf swap_neighbours(vf a) { return shuffle<1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14>(a, a); }
#elif LLMFAST_VECTOR_WIDTH == 8
LLMFAST_INLINE vf swap_neighbours(vf a) { return shuffle<1, 0, 3, 2, 5, 4, 7, 6>(a, a); }
#else
LLMFAST_INLINE vf swap_neighbours(vf a) { return shuffle<1, 0, 3, 2>(a, a); }
#endif
LLMFAST_INLINE vf interleave_low(vf a, vf b) { return shuffle<LLMFAST_LOW>(a, b); }
LLMFAST_INLINE vf interleave_high(vf a, vf b) { return shuffle<LLMFAST_HIGH>(a, b); }

// W rows become W columns: log2(W) perfect shuffles.
LLMFAST_INLINE void transpose(vf (&rows)[W]) {
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; i++) {
      next[2 * i] = interleave_low(rows[i], rows[i + W / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = next[i];
  }
}

// Lane i of the result is the sum over the lanes of rows[i].
LLMFAST_INLINE vf sum_each(vf (&rows)[W]) {
#if LLMFAST_VECTOR_WIDTH == 16
  // Shuffles that stay within a quarter, then of whole quarters: cheaper than those that cross lanes one by one. In the
  // end lane 4 b + a is the sum of row 4 a + {0, 2, 1, 3}[b].
#pragma GCC unroll 2
  for (int half = 8; half >= 4; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++)
      rows[i] = shuffle<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(rows[i], rows[i + half]) +
                shuffle<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(rows[i], rows[i + half]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    rows[i] = shuffle<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(rows[i], rows[i + 2]) +
              shuffle<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(rows[i], rows[i + 2]);
  const vf sums = shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(rows[0], rows[1]) +
                  shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(rows[0], rows[1]);
  return shuffle<0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15>(sums, sums);
#endif
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; i++)
      rows[i] = interleave_low(rows[i], rows[i + half]) + interleave_high(rows[i], rows[i + half]);
  return rows[0];
}

// e^x = 2^n e^r with x = n ln 2 + r and |r| <= ln(2) / 2, ln 2 in two parts so that r is exact. `shifted` holds n in its
// low bits.
struct ExpParts {
  vf shifted, n, e_to_r;
};
LLMFAST_INLINE ExpParts exp_parts(vf x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vf shifted = x * 1.44269504f + kRound;
  const vf n = shifted - kRound;
  const vf r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  vf p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return {shifted, n, p};
}

// e^x, within about 1 ulp, for |x| <= 87.3 (and NaN for the NaNs that arithmetic makes).
LLMFAST_INLINE vf exp_bounded(vf x) {
  const ExpParts e = exp_parts(x);
  return (vf)((vu)e.e_to_r + ((vu)e.shifted << 23));  // the bits of kRound itself fall off at the top
}

// The same for x <= 0, as in a softmax: 0 below the normal numbers, NaN for any NaN.
LLMFAST_INLINE vf exp_nonpositive(vf x) {
#if LLMFAST_VECTOR_WIDTH == 16
  const ExpParts e = exp_parts(x);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)e.e_to_r, (__m512)e.n);
#else
  const vf result = exp_bounded(x);
  return x < -87.3f ? zeros() : (x == x ? result : x);
#endif
}

// e^x for any x: 0 below the normal numbers, infinity above them, NaN for any NaN.
LLMFAST_INLINE vf exp(vf x) {
#if LLMFAST_VECTOR_WIDTH == 16
  return exp_nonpositive(vmin(splat(100.0f), x));  // where the power of two overflows it is infinity already
#else
  const vf result = exp_bounded(x > 88.8f ? splat(88.8f) : x);
  return x < -87.3f ? zeros() : (x > 88.72f ? splat(INFINITY) : (x == x ? result : x));
#endif
}

// Runs f(task) for every task in [0, tasks). Each thread has a run of neighbouring tasks of its own, so that threads
// write to different pages, and when that is done helps with the runs of the others, so that a slow or busy core costs
// no more than one task. Which thread runs a task never changes its result.
template <class F>
void for_each_task(const Threads& threads, i64 tasks, const F& f) {
  constexpr i64 MOST_RUNS = 64;
  struct alignas(64) Run {
    i64 next, end;
  };
  const i64 runs = min_of<i64>(min_of<i64>(threads.count, tasks), MOST_RUNS);
  if (runs <= 1) {
    for (i64 task = 0; task < tasks; task++) f(task);
    return;
  }
  struct Shared {
    const F* f;
    i64 runs;
    Run run[MOST_RUNS];
  } shared;
  shared.f = &f;
  shared.runs = runs;
  for (i64 r = 0; r < runs; r++) shared.run[r] = {tasks * r / runs, tasks * (r + 1) / runs};
  threads.run(
      runs,
      [](i64 own, i64, void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (i64 i = 0; i < s.runs; i++) {
          Run& run = s.run[(own + i) % s.runs];
          for (;;) {
            const i64 task = __atomic_fetch_add(&run.next, i64{1}, __ATOMIC_RELAXED);
            if (task >= run.end) break;
            (*s.f)(task);
          }
        }
      },
      &shared);
}

// Elements (floats) of scratch memory, given back at the end of the scope.
struct Scratch {
  float* data;
  explicit Scratch(i64 floats) : data(static_cast<float*>(scratch_take(size_t(floats) * sizeof(float)))) {}
  ~Scratch() { scratch_give(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};
